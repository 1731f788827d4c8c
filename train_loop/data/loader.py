"""A rank's micro-batches, step by step, tokenised ahead of the step in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from train_loop.data.formats import RowRejected
from train_loop.data.packing import MicroBatch, collate

if TYPE_CHECKING:
    from train_loop.data.sampler import BatchPlan
    from train_loop.data.shards import ShardSet
    from train_loop.data.tokenize import ChatTokenizer, Sample


@dataclass(frozen=True)
class Layout:
    """How rows become tensors. `tokenizer` is None when they were tokenised before."""

    tokenizer: ChatTokenizer | None
    max_length: int
    packing: bool
    pad_id: int

    def micro_batch(self, shards: ShardSet, rows: Sequence[int] | np.ndarray) -> MicroBatch | None:
        """The rows as one micro-batch, without those that turn out unusable; None when none is left."""
        samples = [s for s in (self._sample(shards, int(row)) for row in rows) if s is not None]
        return collate(samples, max_length=self.max_length, packing=self.packing, pad_id=self.pad_id)

    def _sample(self, shards: ShardSet, row: int) -> Sample | None:
        if self.tokenizer is None:
            return shards.sample(row)
        try:
            return self.tokenizer.encode(shards.conversation(row))
        except RowRejected:
            return None


@dataclass(frozen=True)
class _Steps(Dataset[list[MicroBatch]]):
    """Item i is this rank's part of step start_step + i."""

    shards: ShardSet
    ids: np.ndarray
    plan: BatchPlan
    rank: int
    world_size: int
    layout: Layout
    start_step: int

    def __len__(self) -> int:
        return max(0, self.plan.total_steps - self.start_step + 1)

    def __getitem__(self, i: int) -> list[MicroBatch]:
        stripes = self.plan.micro_batches(self.start_step + i, self.rank, self.world_size)
        batches = (self.layout.micro_batch(self.shards, self.ids[stripe]) for stripe in stripes)
        return [b for b in batches if b is not None]


def step_batches(
    shards: ShardSet,
    ids: np.ndarray,
    plan: BatchPlan,
    rank: int,
    world_size: int,
    layout: Layout,
    *,
    num_workers: int,
    start_step: int,
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, micro-batches) from `start_step` to the last step; fewer micro-batches where samples have run out."""
    steps = _Steps(shards, ids, plan, rank, world_size, layout, start_step)
    if len(steps) == 0:
        return
    # batch_size=None: an item is already a step. DataLoader draws a seed for its workers; give it a generator of its own so
    # that the number of workers doesn't move the dropout masks.
    loader: DataLoader[list[MicroBatch]] = DataLoader(
        steps,
        batch_size=None,
        num_workers=min(num_workers, len(steps)),
        multiprocessing_context="fork" if num_workers else None,
        generator=torch.Generator(),
    )
    yield from enumerate(loader, start_step)


def eval_batches(
    shards: ShardSet, ids: np.ndarray, rank: int, world_size: int, batch_size: int, layout: Layout
) -> Iterator[MicroBatch]:
    """This rank's share of an evaluation, in batches of at most `batch_size` samples."""
    mine = ids[rank::world_size]
    for start in range(0, len(mine), batch_size):
        batch = layout.micro_batch(shards, mine[start : start + batch_size])
        if batch is not None:
            yield batch
