"""Attention document by document.

transformers tells packed documents, and padding, by a dense mask: its kernel then multiplies every token with every other one of
the row and throws most of it away. Here a CPU attends within one document after the other, as plain causal attention; torch's
flash kernel for GPUs is told where each begins, and no mask is made at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

NAME = "by_document"  # what transformers finds it by
NAME_VARLEN = "by_document_varlen"  # not "flash": it would be looked for on the hub
WIDEST = 256  # heads that the flash kernel takes
FEW_TOKENS = 128  # documents so short together share a call: it costs more than what it saves
SCORES = 2**20  # how many are held at a time: they stay in a CPU's caches

Span = tuple[int, int, bool]  # of positions [start, end); whether they are one document, whose tokens see all before them


def attend_by_document(model: Any, device: torch.device) -> None:
    """Have a model that attends by torch's own kernels do so document by document on `device`, in place.

    Of one that sees, only what reads and writes text: it looks at an image's patches as it did.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    reads_only = model.config is model.config.get_text_config()
    reader = model if reads_only else model.get_decoder()
    if not (reader.config._attn_implementation == "sdpa" and reader._can_set_attn_implementation()):
        return
    if device.type == "cpu":
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        reader.set_attn_implementation(NAME)
    elif torch.cuda.get_device_capability(device) >= (8, 0):  # Ampere, the first that the flash kernel runs on
        AttentionInterface.register(NAME_VARLEN, _flash_attention)
        AttentionMaskInterface.register(NAME_VARLEN, _edges)
        reader.set_attn_implementation(NAME_VARLEN)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Of query[rows, heads, seq, width] and so on; returns [rows, seq, heads, width]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as attention

    by_products = value.dtype is torch.bfloat16 and not kwargs.get("dropout") and kwargs.get("softcap") is None
    rows = None
    if kwargs.get("position_bias") is None and query.shape[2] == key.shape[2]:
        if attention_mask is not None:
            rows = _spans(attention_mask, len(query))
        elif by_products and (getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]):
            rows = [[(0, query.shape[2], True)]] * len(query)  # a document each
    if rows is None:
        return attention(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    masks = None if attention_mask is None else attention_mask.expand(len(query), -1, -1, -1)
    outputs = []
    for r, spans in enumerate(rows):
        parts = []
        for start, end, is_whole in spans:
            part = (slice(r, r + 1), slice(None), slice(start, end))
            mask = None if is_whole or masks is None else masks[(*part, slice(start, end))]
            tensors = query[part], key[part], value[part]
            if by_products:
                parts.append(_by_products(*tensors, mask, kwargs.get("scaling")))
            else:
                parts.append(attention(module, *tensors, mask, **kwargs | {"is_causal": True})[0])
        padding = query.shape[2] - spans[-1][1]
        parts.append(query.new_zeros(1, padding, query.shape[1], value.shape[-1]))
        outputs.append(torch.cat(parts, dim=1))
    return torch.cat(outputs), None


class _InBlocks(torch.autograd.Function):
    """`softmax(scale * q @ k.T + bias) @ v` of q[heads, n * group, width], k and v[heads, n, width]: `group` query heads share
    one of keys and values, and their rows of a position lie one after another.

    bias[n, n] is added to the scores. Where they aren't `masked`, it is a causal mask's corner, for blocks on the diagonal.

    torch's kernel for CPUs multiplies bfloat16 in small tiles, at a fraction of the speed of the products of a block of queries
    with all keys before it. Shares are computed again for the gradient, as it does.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, masked: bool, scale: float
    ) -> torch.Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        for rows, seen, shares in _shares(q, k, bias, masked, scale):
            out[:, rows] = shares @ v[:, :seen]
        ctx.save_for_backward(q, k, v, bias)
        ctx.masked, ctx.scale = masked, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        of_q = torch.empty_like(q)
        # Of every block something is added, which bfloat16 would round each time.
        of_k, of_v = (torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (k, v))
        for rows, seen, shares in _shares(q, k, bias, ctx.masked, ctx.scale):
            of_out = grads[0][:, rows]
            of_v[:, :seen] += shares.mT @ of_out
            of_shares = of_out @ v[:, :seen].mT
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            of_q[:, rows] = _scaled(of_scores, k[:, :seen], ctx.scale)
            of_k[:, :seen] += _scaled(of_scores.mT, q[:, rows], ctx.scale)
        return of_q, of_k.to(k.dtype), of_v.to(v.dtype), None, None, None


def _shares(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, masked: bool, scale: float
) -> Iterator[tuple[slice, int, torch.Tensor]]:
    """Block by block: its rows of q, how many of the first keys they may see, and the shares[heads, rows, keys] of these."""
    heads, length = k.shape[:2]
    group = q.shape[1] // length
    for start in range(0, length, size := _block(heads * group, length)):
        end = min(start + size, length)
        rows, seen = slice(start * group, end * group), length if masked else end
        scores = _scaled(q[:, rows], k[:, :seen].mT, scale)
        by_position = scores.view(heads, end - start, group, seen)
        if masked:
            by_position += bias[start:end, None]
        else:
            by_position[..., start:] += bias[: end - start, None, : end - start]
        yield rows, seen, scores.softmax(-1)


def _block(heads: int, length: int) -> int:
    """How many positions are a block."""
    return max(1, min(length, SCORES // (heads * length)))


def _scaled(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * a @ b, rounded once."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """[1, n, heads, width] of query[1, heads, n, width] and so on; each sees what mask[1, 1, n, n] says, or all before it."""
    (heads, length, width), num_keys = query.shape[1:], key.shape[1]
    q = query.view(num_keys, heads // num_keys, length, width).transpose(1, 2).reshape(num_keys, -1, width)
    if mask is None:
        size = _block(heads, length)
        unseen = torch.ones(size, size, dtype=torch.bool).triu(1)
    else:
        unseen = ~mask[0, 0]
    bias = torch.zeros(unseen.shape, dtype=query.dtype).masked_fill_(unseen, -torch.inf)
    k, v = key[0].contiguous(), value[0].contiguous()
    out: torch.Tensor = _InBlocks.apply(q, k, v, bias, mask is not None, width**-0.5 if scale is None else scale)
    return out.view(num_keys, length, -1, value.shape[-1]).transpose(0, 1).reshape(1, length, heads, -1)


def _spans(mask: torch.Tensor, num_rows: int) -> list[list[Span]] | None:
    """What mask[rows or 1, 1, seq, seq] lets see what, by rows; None where that isn't documents one after another, with padding
    at the end. All layers are given the same tensor: what is found is kept with it."""
    if not hasattr(mask, "spans"):
        mask.spans = _found(mask[:, 0]) if mask.dtype == torch.bool and mask.shape[1] == 1 else None  # type: ignore[attr-defined]
    found: list[list[Span]] | None = mask.spans  # type: ignore[attr-defined]
    return found * num_rows if found is not None and len(found) < num_rows else found


def _found(mask: torch.Tensor) -> list[list[Span]] | None:
    seq = mask.shape[-1]
    at = torch.arange(seq)
    real = mask.diagonal(dim1=1, dim2=2)  # [rows, seq]: padding doesn't see itself
    if (real[:, 1:] & ~real[:, :-1]).any():
        return None
    first = torch.where(real, mask.byte().argmax(-1), at)  # the first position that each sees, and the last
    last = torch.where(real, seq - 1 - mask.byte().flip(-1).argmax(-1), at)
    # A document starts where nothing from there on sees what is before, and nothing before sees what comes.
    back = first.flip(-1).cummin(-1).values.flip(-1)
    ahead = F.pad(last.cummax(-1).values[:, :-1], (1, 0), value=-1)
    starts = real & (back == at) & (ahead < at)
    begun = torch.where(starts, at, 0).cummax(-1).values
    is_plain = (last == at) & (mask.sum(-1) == at - begun + 1)
    return [
        _shared([*s.nonzero()[:, 0].tolist(), int(n)], plain) for s, n, plain in zip(starts, real.sum(-1), is_plain, strict=True)
    ]


def _shared(edges: list[int], is_plain: torch.Tensor) -> list[Span]:
    """Spans between the edges, of several documents where they are short."""
    spans: list[Span] = []
    for start, end in itertools.pairwise(edges):
        if spans and end - spans[-1][0] <= FEW_TOKENS:
            spans[-1] = (spans[-1][0], end, False)
        else:
            spans.append((start, end, bool(is_plain[start:end].all())))
    return spans


def _edges(batch_size: int, q_length: int, kv_length: int, **told: Any) -> torch.Tensor | None:
    """Where documents begin in rows laid one after another, and the end of the last: int32 [documents + 1], in place of a mask.
    A mask after all where that doesn't say it all. Padding is many documents of a token.

    It carries the length of the longest, and how many tokens each sees of its own (-1: all).
    """
    from transformers.masking_utils import and_masks, padding_mask_function, sdpa_mask

    alone = all(isinstance(at := told.get(name, 0), int) and at == 0 for name in ("q_offset", "kv_offset"))  # nothing is cached
    if q_length == kv_length and alone and not told.get("use_vmap"):
        device, sees = told["device"], told["mask_function"]
        if (real := told.get("attention_mask")) is not None:
            sees = and_masks(sees, padding_mask_function(real))
        row = torch.arange(batch_size, device=device)[:, None]
        head, at = torch.zeros_like(row), torch.arange(1, q_length, device=device)[None]
        ahead, back = (sees(row, head, *pair).expand(batch_size, q_length - 1) for pair in ((at - 1, at), (at, at - 1)))
        if not ahead.any():
            begins = torch.cat([torch.ones_like(row, dtype=torch.bool), ~back], dim=1).flatten().nonzero()[:, 0]
            edges: Any = torch.cat([begins, begins.new_tensor([batch_size * q_length])]).int()
            edges.longest, edges.window = int(edges.diff().max()), told.get("local_size") or -1
            return edges  # type: ignore[no-any-return]
    mask: torch.Tensor | None = sdpa_mask(batch_size, q_length, kv_length, **told)
    return mask


def _flash_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """As `_attention`, with the edges of documents for a mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as attention

    if attention_mask is None or attention_mask.ndim != 1:
        return attention(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    edges, rows, seq = attention_mask, len(query), query.shape[2]
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    fits = query.is_cuda and dtype.itemsize == 2 and query.shape[-1] == value.shape[-1] <= WIDEST
    if not fits or kwargs.get("dropout") or kwargs.get("position_bias") is not None:
        return attention(module, query, key, value, _dense(edges, rows, seq), **kwargs)  # type: ignore[no-any-return]
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t.transpose(1, 2).flatten(0, 1).to(dtype) for t in (query, key, value))
    out: Any = varlen_attn(
        *(q, k, v, edges, edges, edges.longest, edges.longest),
        scale=kwargs.get("scaling"),
        window_size=(edges.window - 1 if edges.window > 0 else -1, 0),
        enable_gqa=True,
    )
    return out.view(rows, seq, *out.shape[1:]), None


def _dense(edges: Any, rows: int, seq: int) -> torch.Tensor:
    """The edges as a mask[rows, 1, seq, seq]."""
    at = torch.arange(seq, device=edges.device)
    document = torch.searchsorted(edges, torch.arange(rows * seq, device=edges.device), right=True).view(rows, 1, seq)
    mask = (document[..., :, None] == document[..., None, :]) & (at[:, None] >= at)
    return mask & (at[:, None] - at < edges.window) if edges.window > 0 else mask
