"""A rank's micro-batches, step by step, tokenised ahead of the step in processes of their own.

Of a streamed dataset in threads: they wait for the network most of the time, and neither connections nor the way to fresh keys
survive a fork.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from train_loop.data.formats import RowRejected
from train_loop.data.packing import MicroBatch, VisionCollate, collate
from train_loop.errors import Cause, RunFault, UserError

if TYPE_CHECKING:
    from train_loop.data.image_tokens import ImageTokens
    from train_loop.data.sampler import BatchPlan
    from train_loop.data.shards import ShardSet
    from train_loop.data.tokenize import ChatTokenizer, Sample

BYTES_PER_TOKEN = 4  # about: it decides who gets a row, and nothing else
STEPS_AHEAD = 2  # of each process or thread


@dataclass(frozen=True)
class Vision:
    """How pictures become tensors: each by itself, then those of a micro-batch together."""

    images: ImageTokens
    collate: VisionCollate


@dataclass(frozen=True)
class Collator:
    """How rows become tensors. `tokenizer` is None when they were tokenised before, `vision` where the model sees no pictures.

    `capacity` is how many tokens a row of a micro-batch takes, as `collate` has it.
    """

    tokenizer: ChatTokenizer | None
    max_length: int
    capacity: int | None
    pad_id: int
    vision: Vision | None = None

    def micro_batch(self, shards: ShardSet, rows: Sequence[int] | np.ndarray) -> MicroBatch | None:
        """The rows as one micro-batch; None when there are none."""
        made = [self._sample(shards, int(row)) for row in rows]
        batch = collate(
            [sample for sample, _ in made],
            capacity=self.capacity,
            pad_id=self.pad_id,
            pictures=[pictures for _, pictures in made],
            see=None if self.vision is None else self.vision.collate,
        )
        return None if batch is None else replace(batch, rows=tuple(int(row) for row in rows))

    def _sample(self, shards: ShardSet, row: int) -> tuple[Sample, list[dict[str, torch.Tensor]]]:
        """The row's sample, and of each picture in it the tensors."""
        pictures = shards.pictures(row) if self.vision is not None else []
        sample = self._encoded(shards, row, [(picture.width, picture.height) for picture in pictures])
        return sample, self.vision.images.inputs([pictures[i] for i in sample.images]) if self.vision is not None else []

    def _encoded(self, shards: ShardSet, row: int, sizes: Sequence[tuple[int, int]]) -> Sample:
        if self.tokenizer is None:
            return shards.sample(row)
        try:
            return self.tokenizer.encode(shards.conversation(row), sizes)
        except RowRejected as error:  # the preparation has judged the rows, by this tokenizer
            uri, line = shards.source(row)
            raise RunFault(
                Cause.INTERNAL, f"line {line} of {uri} was found usable and now isn't: {error.reason}. Has the tokenizer changed?"
            ) from error


@dataclass(frozen=True)
class _Steps(Dataset["list[MicroBatch] | UserError | RunFault"]):
    """Item i is this rank's part of step start_step + i, or why there is none.

    An error that DataLoader carries over from a process of its own arrives as a traceback's text, without its code.
    """

    shards: ShardSet
    ids: np.ndarray
    sizes: np.ndarray  # of the ids' rows
    plan: BatchPlan
    rank: int
    world_size: int
    collator: Collator
    start_step: int

    def __len__(self) -> int:
        return max(0, self.plan.total_steps - self.start_step + 1)

    def __getitem__(self, i: int) -> list[MicroBatch] | UserError | RunFault:
        stripes = self.plan.micro_batches(self.start_step + i, self.rank, self.world_size, self.sizes)
        try:
            batches = [self.collator.micro_batch(self.shards, self.ids[stripe]) for stripe in stripes]
        except (UserError, RunFault) as error:
            return error
        return [b for b in batches if b is not None]


def step_batches(
    shards: ShardSet,
    ids: np.ndarray,
    plan: BatchPlan,
    rank: int,
    world_size: int,
    collator: Collator,
    *,
    num_workers: int,
    start_step: int,
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, micro-batches) from `start_step` to the last step; fewer micro-batches where samples have run out."""
    sizes = shards.sizes(ids)
    if collator.tokenizer is not None:  # of a long row no more than this is read
        sizes = np.minimum(sizes, BYTES_PER_TOKEN * collator.max_length)
    steps = _Steps(shards, ids, sizes, plan, rank, world_size, collator, start_step)
    if len(steps) == 0:
        return
    if shards.streamed:
        yield from enumerate(_in_threads(steps, max(1, num_workers)), start_step)
        return
    # batch_size=None: an item is already a step. DataLoader draws a seed for its workers; give it a generator of its own so
    # that the number of workers doesn't move the dropout masks.
    loader: DataLoader[list[MicroBatch] | UserError | RunFault] = DataLoader(
        steps,
        batch_size=None,
        num_workers=min(num_workers, len(steps)),
        multiprocessing_context="fork" if num_workers else None,
        prefetch_factor=STEPS_AHEAD if num_workers else None,
        generator=torch.Generator(),
    )
    for step, item in enumerate(loader, start_step):
        if isinstance(item, UserError | RunFault):
            raise item
        yield step, item


def _in_threads(steps: _Steps, num_threads: int) -> Iterator[list[MicroBatch]]:
    """The steps in order, each thread some ahead as DataLoader's processes are."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="rows")
    try:
        read = (pool.submit(steps.__getitem__, i) for i in range(len(steps)))
        ahead = deque(islice(read, STEPS_AHEAD * num_threads))
        while ahead:
            item = ahead.popleft().result()
            if isinstance(item, UserError | RunFault):
                raise item
            ahead.extend(islice(read, 1))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def eval_batches(
    shards: ShardSet, ids: np.ndarray, rank: int, world_size: int, batch_size: int, collator: Collator
) -> Iterator[MicroBatch | None]:
    """This rank's share of an evaluation, in batches of at most `batch_size` samples.

    As many on every rank; None where this one has no row left.
    """
    mine = ids[rank::world_size]
    for start in range(0, math.ceil(len(ids) / world_size), batch_size):
        yield collator.micro_batch(shards, mine[start : start + batch_size])
