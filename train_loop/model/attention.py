"""Attention document by document.

transformers tells packed documents, and padding, by a dense mask: its kernel then multiplies every token with every other one of
the row and throws most of it away. Here the kernel is called for each document, as plain causal attention.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

NAME = "by_document"  # what transformers finds it by
FEW_TOKENS = 128  # documents so short together share a call: it costs more than what it saves

Span = tuple[int, int, bool]  # of positions [start, end); whether they are one document


def attend_by_document(model: Any) -> None:
    """Have a model that attends by torch's kernel for CPUs, in place, do so document by document."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    reads_only = model.config is model.config.get_text_config()
    if reads_only and model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Of query[rows, heads, seq, width] and so on; returns [rows, seq, heads, width]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as attention

    is_plain = attention_mask is not None and kwargs.get("position_bias") is None and query.shape[2] == key.shape[2]
    rows = _spans(attention_mask, len(query)) if is_plain and attention_mask is not None else None
    if attention_mask is None or rows is None:
        return attention(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    masks = attention_mask.expand(len(query), -1, -1, -1)
    outputs = []
    for r, spans in enumerate(rows):
        parts = []
        for start, end, is_one in spans:
            part = (slice(r, r + 1), slice(None), slice(start, end))
            mask = None if is_one else masks[(*part, slice(start, end))]
            said = kwargs | {"is_causal": True}
            parts.append(attention(module, query[part], key[part], value[part], mask, **said)[0])
        padding = query.shape[2] - spans[-1][1]
        parts.append(query.new_zeros(1, padding, query.shape[1], value.shape[-1]))
        outputs.append(torch.cat(parts, dim=1))
    return torch.cat(outputs), None


def _spans(mask: torch.Tensor, num_rows: int) -> list[list[Span]] | None:
    """What mask[rows or 1, 1, seq, seq] lets see what, by rows; None where that is more than documents one after another, with
    padding at the end. All layers are given the same tensor: what is found is kept with it."""
    if not hasattr(mask, "spans"):
        mask.spans = _found(mask[:, 0]) if mask.dtype == torch.bool and mask.shape[1] == 1 else None  # type: ignore[attr-defined]
    found: list[list[Span]] | None = mask.spans  # type: ignore[attr-defined]
    return found * num_rows if found is not None and len(found) < num_rows else found


def _found(mask: torch.Tensor) -> list[list[Span]] | None:
    seq = mask.shape[-1]
    at = torch.arange(seq)
    real = mask.diagonal(dim1=1, dim2=2)  # [rows, seq]: padding doesn't see itself
    first = mask.int().argmax(-1)  # the first position that each sees
    starts = (first == at) & real
    # Each sees all from its document's first position to itself, and the real ones come first.
    begun = torch.where(starts, at, 0).cummax(-1).values
    if not ((first == begun) & (mask.sum(-1) == at - first + 1))[real].all() or (real[:, 1:] & ~real[:, :-1]).any():
        return None
    return [_shared([*s.nonzero()[:, 0].tolist(), int(n)]) for s, n in zip(starts, real.sum(-1), strict=True)]


def _shared(edges: list[int]) -> list[Span]:
    """Spans between the edges, of several documents where they are short."""
    spans: list[Span] = []
    for start, end in itertools.pairwise(edges):
        if spans and end - spans[-1][0] <= FEW_TOKENS:
            spans[-1] = (spans[-1][0], end, False)
        else:
            spans.append((start, end, True))
    return spans
