"""Which samples make up which step: a pure function of seed and epoch, the same for any number of workers."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the samples in `epoch` (from 0): a permutation of range(num_samples)."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_samples)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class BatchPlan:
    """The arithmetic of a run's batches. Steps count from 1; batch sizes count samples.

    `world_size` is the job's. An attempt may have fewer workers: it takes the same steps in more micro-batches.
    """

    num_samples: int
    per_device_batch_size: int
    world_size: int
    accumulation_steps: int
    num_epochs: float
    max_steps: int | None
    seed: int

    @property
    def samples_per_step(self) -> int:
        """The global batch."""
        return self.per_device_batch_size * self.world_size * self.accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left."""
        return math.ceil(self.num_samples / self.samples_per_step)

    @property
    def total_steps(self) -> int:
        """All optimizer steps; max_steps overrides num_epochs."""
        return self.max_steps or max(1, math.ceil(self.num_epochs * self.steps_per_epoch - 1e-9))

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step / self.steps_per_epoch

    def global_batch(self, step: int) -> np.ndarray:
        """Indices of the samples of `step`, in order."""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        start = within * self.samples_per_step
        return epoch_order(self.num_samples, self.seed, epoch)[start : start + self.samples_per_step]

    def num_micro_batches(self, world_size: int) -> int:
        """Micro-batches of a full step on each of `world_size` workers."""
        return math.ceil(self.samples_per_step / (world_size * self.per_device_batch_size))

    def micro_batches(self, step: int, rank: int, world_size: int, sizes: np.ndarray) -> list[np.ndarray]:
        """The share of `rank` of `world_size` workers of the global batch, in arrays of at most per_device_batch_size.

        No worker waits long for the others: each has about as much of `sizes`, one for each sample, and so has each micro-batch.
        As many arrays in every step, on every rank; some may be empty in an epoch's last step.
        """
        batch = self.global_batch(step)
        mine = batch[deal(sizes[batch], world_size)[rank]]
        return [mine[part] for part in deal(sizes[mine], self.num_micro_batches(world_size))]


def deal(sizes: np.ndarray, num_shares: int) -> list[np.ndarray]:
    """Share out range(len(sizes)): about as much of `sizes` to each share, and to none more than its part of their number.

    The largest first, each to the share that has least so far and isn't full. Ascending in each share. O(n log n).
    Source: longest processing time first, Graham 1969, here with a bound on how many.
    """
    if num_shares == 1:
        return [np.arange(len(sizes))]
    most = math.ceil(len(sizes) / num_shares)
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    open_shares = [(0, number) for number in range(num_shares)]
    for index in np.argsort(-sizes, kind="stable"):
        had, number = heapq.heappop(open_shares)
        shares[number].append(index)
        if len(shares[number]) < most:
            heapq.heappush(open_shares, (had + int(sizes[index]), number))
    return [np.sort(np.array(share, dtype=np.int64)) for share in shares]
