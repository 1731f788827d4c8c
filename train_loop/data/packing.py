"""Lay a micro-batch's samples out as tensors: a padded row for each, several in a row, or all in one.

The batch size counts samples any way: packing only removes padding, so packed and unpacked runs take the same steps. Packed
documents are isolated by position ids that restart at 0. Where attention goes by document (model/attention.py) a row costs what
is in it: all lie in one, and nothing is padding. Where it goes by a mask, with a place for any two tokens of a row, rows are no
longer than a sample may be, and padded to the longest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from train_loop.data.tokenize import IGNORE_INDEX, Sample

NO_LIMIT = sys.maxsize  # the capacity of a row that takes all samples of a micro-batch


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group documents into bins of at most `capacity` tokens, first-fit decreasing.

    Returns indices into `lengths`; every index appears exactly once. O(n log n) with a segment tree over free space.
    Raises ValueError if any length exceeds `capacity`.
    Source: Johnson 1973; used for SFT packing in Ding et al., "Fewer Truncations", 2024.
    """
    if not lengths:
        return []
    if max(lengths) > capacity:
        raise ValueError(f"a document of {max(lengths)} tokens doesn't fit {capacity}")
    leaves = 1 << (len(lengths) - 1).bit_length()
    free = [capacity] * (2 * leaves)  # a heap-shaped tree: node i covers nodes 2i and 2i + 1, the root is 1
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        node = 1
        while node < leaves:
            node = 2 * node if free[2 * node] >= lengths[index] else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(index)
        free[node] -= lengths[index]
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return bins


def rows_of(lengths: Sequence[int], capacity: int | None) -> list[list[int]]:
    """Which documents lie in each row, as `pack` has it; each in a row of its own where there is no capacity."""
    return [[i] for i in range(len(lengths))] if capacity is None else pack(lengths, capacity)


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of shape [rows, seq].

    `labels` are ALREADY SHIFTED: labels[r, t] is the target of position t, the next token of the same document, or
    IGNORE_INDEX. `attention_mask` is None when packed: without it a row is full of documents, the last of them maybe padding.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    num_tokens: int
    rows: tuple[int, ...] = ()  # of the ShardSet it was made from
    vision: dict[str, torch.Tensor] = field(default_factory=dict)  # a model's inputs for its images, beside or in place of these

    @property
    def num_supervised(self) -> int:
        """Positions that carry loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            attention_mask=mask,
            vision={name: tensor.to(device) for name, tensor in self.vision.items()},
        )


class VisionCollate(Protocol):
    """How a model that sees wants the pictures of a micro-batch: its inputs by name."""

    def __call__(
        self, pictures: Sequence[dict[str, torch.Tensor]], input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`pictures` are the image processor's tensors of each, in the order of `input_ids [rows, seq]`."""


def collate(
    samples: Sequence[Sample],
    *,
    capacity: int | None,
    pad_id: int,
    pictures: Sequence[Sequence[dict[str, torch.Tensor]]] = (),
    see: VisionCollate | None = None,
) -> MicroBatch | None:
    """One micro-batch of the samples, or None when there are none: in rows of at most `capacity` tokens, or one for each sample
    (None). Rows are padded to the longest row only.

    Where the model is to `see`, `pictures` are those of each sample.
    """
    if not samples:
        return None
    lengths = [len(s.input_ids) for s in samples]
    rows = rows_of(lengths, capacity)
    seq = max(sum(lengths[i] for i in row) for row in rows)
    input_ids = np.full((len(rows), seq), pad_id, dtype=np.int64)
    labels = np.full((len(rows), seq), IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros((len(rows), seq), dtype=np.int64)
    filled = np.zeros((len(rows), seq), dtype=np.int64)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            end = at + lengths[i]
            input_ids[r, at:end] = samples[i].input_ids
            labels[r, at : end - 1] = samples[i].labels[1:]
            position_ids[r, at:end] = np.arange(lengths[i])
            at = end
        filled[r, :at] = 1
        # Padding is a document of its own, which nothing attends to.
        position_ids[r, at:] = np.arange(seq - at)
    ids, positions = torch.from_numpy(input_ids), torch.from_numpy(position_ids)
    in_order = [picture for row in rows for i in row for picture in pictures[i]] if see is not None else []
    return MicroBatch(
        input_ids=ids,
        labels=torch.from_numpy(labels),
        position_ids=positions,
        attention_mask=None if capacity is not None else torch.from_numpy(filled),
        num_tokens=sum(lengths),
        vision={} if see is None else see(in_order, ids, positions),
    )
