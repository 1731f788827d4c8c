"""Attention document by document.

transformers tells packed documents, and padding, by a dense mask: its kernel then multiplies every token with every other one of
the row and throws most of it away. Here what tells them is where documents begin. torch's flash kernel for GPUs takes that as it
is; elsewhere each document is attended to by itself, as plain causal attention. Either way a row may be as long as all documents
of a micro-batch: no token is multiplied with one of another.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

NAME = "by_document"  # what transformers finds it by
WIDEST, WIDTHS_APART = 256, 8  # heads that the flash kernel takes: of widths that are multiples of this
FEW_TOKENS = 128  # documents so short together share a call: it costs more than what it saves
SCORES = 2**20  # how many are held at a time: they stay in a CPU's caches
# Those whose tokens have places in time, height and width, and which look for documents in a fourth position alone.
OF_FOUR_POSITIONS = ("qwen2_vl_text", "qwen2_5_vl_text")
# A document is made longer to a multiple of so many positions, or of so few where it is one block: oneDNN compiles a product for
# each size that it meets, which takes as long as some products, and keeps half a MiB for each.
TILE, SMALL_TILE = 128, 16

Span = tuple[int, int, torch.Tensor | None]  # of positions [start, end); what they see of each other, None: all before them


def can_attend_by_document(model: Any) -> bool:
    """Whether a model, as transformers makes it, attends by torch's own kernels and lets others do it."""
    reader = _reader(model)
    return reader.config._attn_implementation == "sdpa" and bool(reader._can_set_attn_implementation())


def attend_by_document(model: Any) -> None:
    """Have a model that can do so attend document by document, in place.

    Of one that sees, only what reads and writes text: it looks at an image's patches as it did.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if can_attend_by_document(model):
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _edges)
        reader = _reader(model)
        reader.set_attn_implementation(NAME)
        if reader.config.model_type in OF_FOUR_POSITIONS:
            reader.register_forward_pre_hook(_with_four_positions, with_kwargs=True)


def _reader(model: Any) -> Any:
    reads_only = model.config is model.config.get_text_config()
    return model if reads_only else model.get_decoder()


def _with_four_positions(
    reader: Any, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Make position_ids[rows, seq], of text alone, the [4, rows, seq] by which the model tells documents apart."""
    positions = inputs.get("position_ids")
    if positions is None or positions.ndim != 2:
        return None
    return args, inputs | {"position_ids": positions.expand(4, *positions.shape)}


@contextlib.contextmanager
def heard() -> Iterator[set[bool]]:
    """Hear how attention is told inside what tokens see: True is by the edges of documents, False by a mask or a bias."""
    from transformers import AttentionInterface

    by_edges = set[bool]()

    def listening(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        by_edges.add(attention_mask is not None and attention_mask.ndim == 1 and kwargs.get("position_bias") is None)
        return _attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(NAME, listening)
    try:
        yield by_edges
    finally:
        AttentionInterface.register(NAME, _attention)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Of query[rows, heads, seq, width] and so on; returns [rows, seq, heads, width]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as attention

    if (out := _flash_attention(query, key, value, attention_mask, **kwargs)) is not None:
        return out, None
    by_products = _goes_by_products(query, value, kwargs)
    if attention_mask is not None:
        rows = _spans(attention_mask, query, key)
    else:
        rows = [[(0, query.shape[2], None)]] * len(query) if by_products and _is_causal(module, query, key, kwargs) else None
    if rows is None:
        return attention(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    bias = kwargs.get("position_bias")
    outputs = []
    for r, spans in enumerate(rows):
        parts, filled = [], 0
        for start, filled, mask in spans:
            part = (slice(r, r + 1), slice(None), slice(start, filled))
            tensors = query[part], key[part], value[part]
            if by_products:
                parts.append(_by_products(*tensors, mask, kwargs.get("scaling")))
                continue
            of_part = None if bias is None else bias.expand(len(rows), -1, -1, -1)[(*part, part[-1])]
            parts.append(attention(module, *tensors, mask, **kwargs | {"is_causal": True, "position_bias": of_part})[0])
        if filled < query.shape[2]:  # with padding, which nothing sees
            parts.append(query.new_zeros(1, query.shape[2] - filled, query.shape[1], value.shape[-1]))
        outputs.append(_joined(parts, dim=1))
    return _joined(outputs, dim=0), None


def _goes_by_products(query: torch.Tensor, value: torch.Tensor, told: Mapping[str, Any]) -> bool:
    """Whether `_by_products` does what is asked for, and is faster."""
    is_plain = not told.get("dropout") and told.get("softcap") is None and told.get("position_bias") is None
    return query.dtype is value.dtype is torch.bfloat16 and not query.is_cuda and is_plain


def _is_causal(module: Any, query: torch.Tensor, key: torch.Tensor, told: Mapping[str, Any]) -> bool:
    """Whether, without a mask, a token sees those before it and itself, as transformers' own reads what it is told."""
    asked = told.get("is_causal")
    return query.shape[2] == key.shape[2] and bool(getattr(module, "is_causal", True) if asked is None else asked)


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)  # of one it would be a copy to keep for the backward pass


class _InBlocks(torch.autograd.Function):
    """`softmax(scale * q @ k.T) @ v` of q[heads, n * group, width], k and v[heads, n, width]: `group` query heads share one of
    keys and values, and their rows of a position lie one after another. mask[n, n] says what sees what; without it a position
    sees those before it and itself.

    torch's kernel for CPUs multiplies bfloat16 in small tiles, at a fraction of the speed of the products of a block of queries
    with all keys before it. Shares are computed again for the gradient, as it does.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        for rows, seen, shares in _shares(q, k, mask, scale):
            out[:, rows] = shares @ v[:, :seen]
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        of_q = torch.empty_like(q)
        # Of every block something is added, which bfloat16 would round each time.
        of_k, of_v = (torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (k, v))
        for rows, seen, shares in _shares(q, k, mask, ctx.scale):
            of_out = grads[0][:, rows]
            of_v[:, :seen] += shares.mT @ of_out
            of_shares = of_out @ v[:, :seen].mT
            of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            of_q[:, rows] = _scaled(of_scores, k[:, :seen], ctx.scale)
            of_k[:, :seen] += _scaled(of_scores.mT, q[:, rows], ctx.scale)
        return of_q, of_k.to(k.dtype), of_v.to(v.dtype), None, None


def _shares(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> Iterator[tuple[slice, int, torch.Tensor]]:
    """Block by block: its rows of q, how many of the first keys they may see, and the shares[heads, rows, keys] of these."""
    heads, length = k.shape[:2]
    group, tile = q.shape[1] // length, TILE if length % TILE == 0 else length
    unseen = torch.ones(tile, tile, dtype=torch.bool).triu(1) if mask is None else ~mask
    bias = torch.zeros(unseen.shape, dtype=q.dtype).masked_fill_(unseen, -torch.inf)
    for first in range(0, length, tile):
        seen, size = first + tile if mask is None else length, tile
        while size % 2 == 0 and heads * group * size * seen > SCORES:
            size //= 2
        for start in range(first, first + tile, size):
            rows = slice(start * group, (start + size) * group)
            scores = _scaled(q[:, rows], k[:, :seen].mT, scale)
            by_position = scores.view(heads, size, group, seen)
            if mask is None:  # all before the tile is seen
                by_position[..., first:] += bias[start - first : start - first + size, None]
            else:
                by_position += bias[start : start + size, None]
            yield rows, seen, scores.softmax(-1)


def _scaled(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * a @ b, rounded once."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """[1, n, heads, width] of query[1, heads, n, width] and so on; each sees what mask[1, 1, n, n] says, or all before it."""
    (heads, length, width), num_keys = query.shape[1:], key.shape[1]
    more = -length % (SMALL_TILE if heads * length**2 <= SCORES else TILE)
    q = _longer(query.view(num_keys, heads // num_keys, length, width).transpose(1, 2), more).reshape(num_keys, -1, width)
    k, v = _longer(key[0], more).contiguous(), _longer(value[0], more).contiguous()
    # What is behind the end isn't seen, and sees whatever there is.
    sees = None if mask is None else F.pad(F.pad(mask[0, 0], (0, more)), (0, 0, 0, more), value=True)
    out: torch.Tensor = _InBlocks.apply(q, k, v, sees, width**-0.5 if scale is None else scale)
    by_position = out.view(num_keys, length + more, -1, value.shape[-1])[:, :length]
    return by_position.transpose(0, 1).reshape(1, length, heads, -1)


def _longer(tensor: torch.Tensor, more: int) -> torch.Tensor:
    """The tensor with so many more zeros in its second dimension."""
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, more)) if more else tensor


def _flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, edges: Any, **kwargs: Any
) -> torch.Tensor | None:
    """What `_attention` returns, of edges; None where the flash kernel can't, or knows nothing of it."""
    if edges is None or edges.ndim != 1 or not query.is_cuda or torch.cuda.get_device_capability(query.device) < (8, 0):
        return None  # Ampere is the first that it runs on
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    width = query.shape[-1]
    fits = dtype.itemsize == 2 and width == value.shape[-1] <= WIDEST and width % WIDTHS_APART == 0
    if not fits or kwargs.get("dropout") or kwargs.get("position_bias") is not None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t.transpose(1, 2).flatten(0, 1).to(dtype) for t in (query, key, value))
    out: Any = varlen_attn(
        *(q, k, v, edges, edges, edges.longest, edges.longest),
        scale=kwargs.get("scaling"),
        window_size=(edges.window - 1 if edges.window > 0 else -1, 0),
        enable_gqa=True,
    )
    return out.view(len(query), -1, *out.shape[1:])  # type: ignore[no-any-return]


def _edges(batch_size: int, q_length: int, kv_length: int, **told: Any) -> torch.Tensor | None:
    """Where documents begin in rows laid one after another, and the end of the last: int32 [documents + 1], in place of a mask.
    A mask after all where that doesn't say it all. Padding is many documents of a token.

    It carries the length of the longest, how many tokens each sees of its own (-1: all), and what of each row isn't padding
    behind it.
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
            numbers = torch.arange(1, q_length + 1, device=device).expand(batch_size, -1)
            edges.filled = (numbers if real is None else numbers * real).amax(1)
            return edges  # type: ignore[no-any-return]
    mask: torch.Tensor | None = sdpa_mask(batch_size, q_length, kv_length, **told)
    return mask


def _spans(mask: Any, query: torch.Tensor, key: torch.Tensor) -> list[list[Span]] | None:
    """What is computed by itself, by rows, of edges or of a mask[rows or 1, 1, seq, seq]; None of one that doesn't come to
    documents one after another, with padding at the end. All layers are given the same tensor: what is found is kept with it."""
    if not hasattr(mask, "spans"):
        if mask.ndim == 1:
            mask.spans = _of_edges(mask, query.shape[2])
        else:  # on a GPU it would be waited for
            is_plain = mask.dtype == torch.bool and mask.shape[1] == 1 and query.shape[2] == key.shape[2]
            mask.spans = _found(mask) if is_plain and not mask.is_cuda else None
    found: list[list[Span]] | None = mask.spans
    return found * len(query) if found is not None and len(found) < len(query) else found


def _of_edges(edges: Any, seq: int) -> list[list[Span]]:
    places: list[int] = edges.tolist()
    rows = []
    for begin, filled in zip(range(0, places[-1], seq), edges.filled.tolist(), strict=True):
        own = [place - begin for place in places if begin <= place < begin + filled]
        rows.append([(group[0], group[-1], _mask(group, edges)) for group in _shared([*own, filled])])
    return rows


def _mask(group: Sequence[int], edges: Any) -> torch.Tensor | None:
    """[1, 1, n, n] of documents with these edges, which see no more than their window; None where it has all before a token."""
    start, end, window = group[0], group[-1], edges.window if edges.window > 0 else edges.longest
    if len(group) == 2 and end - start <= window:
        return None
    at = torch.arange(start, end, device=edges.device)
    document = torch.bucketize(at, torch.tensor(group, device=edges.device), right=True)
    behind = at[:, None] - at
    sees: torch.Tensor = (document[:, None] == document) & (behind >= 0) & (behind < window)
    return sees[None, None]


def _found(mask: torch.Tensor) -> list[list[Span]] | None:
    seq, sees = mask.shape[-1], mask[:, 0]
    at = torch.arange(seq)
    real = sees.diagonal(dim1=1, dim2=2)  # [rows, seq]: padding doesn't see itself
    if (real[:, 1:] & ~real[:, :-1]).any():
        return None
    first = torch.where(real, sees.byte().argmax(-1), at)  # the first position that each sees, and the last
    last = torch.where(real, seq - 1 - sees.byte().flip(-1).argmax(-1), at)
    # A document starts where nothing from there on sees what is before, and nothing before sees what comes.
    back = first.flip(-1).cummin(-1).values.flip(-1)
    ahead = F.pad(last.cummax(-1).values[:, :-1], (1, 0), value=-1)
    starts = real & (back == at) & (ahead < at)
    begun = torch.where(starts, at, 0).cummax(-1).values
    is_plain = (last == at) & (sees.sum(-1) == at - begun + 1)
    rows = []
    for r, (begins, plain) in enumerate(zip(starts, is_plain, strict=True)):
        spans = list[Span]()
        for group in _shared([*begins.nonzero()[:, 0].tolist(), int(real[r].sum())]):
            part = slice(group[0], group[-1])
            is_whole = len(group) == 2 and bool(plain[part].all())
            spans.append((part.start, part.stop, None if is_whole else mask[r : r + 1, :, part, part]))
        rows.append(spans)
    return rows


def _shared(edges: Sequence[int]) -> list[list[int]]:
    """The edges of documents in groups that share a call: of several where they are short."""
    groups: list[list[int]] = []
    for start, end in itertools.pairwise(edges):
        if groups and end - groups[-1][0] <= FEW_TOKENS:
            groups[-1].append(end)
        else:
            groups.append([start, end])
    return groups
