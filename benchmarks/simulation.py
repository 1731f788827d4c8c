"""One optimizer step on many GPUs: whose work takes longest, what is sent meanwhile, and what is lost to which of them.

Work of a document is its FLOPs over what a GPU sustains. ddp sends the adapter's gradients when all have done their part; fsdp
gathers each block's weights for forward and again for backward, while the block before computes, and every rank keeps its
neighbours' pace from micro-batch to micro-batch. On one GPU a step is exactly its work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.flops import Shape, useful_flops
from benchmarks.network import Cluster, Link, all_reduce, gather
from train_loop.data.sampler import deal
from train_loop.parallel import BUCKET_BYTES
from train_loop.plan import GPU_MFU, bytes_per_weight
from train_loop.spec import AdapterConfig, Quantization

ADAPTER_RANK = AdapterConfig().r
SYNCED_BYTES = 32  # what the ranks agree on before a step, and their gradient's norm after it
FREE = Link(0.0, math.inf)
CAUSES = ("imbalance", "bandwidth", "latency", "data loading")
Documents = Sequence[tuple[int, int]]  # (tokens, supervised)


@dataclass(frozen=True)
class Gpu:
    """A rank's device. Defaults: dense bf16 of an H100 SXM by NVIDIA's data sheet, and the share of it that plans reckon with."""

    flops: float = 989e12 * GPU_MFU  # sustained, recomputation included
    memory_bytes: float = 80e9


@dataclass(frozen=True)
class Base:
    """A base model: what it multiplies, and its parameters outside of the blocks, embeddings and head."""

    shape: Shape
    outer_params: int

    @classmethod
    def of(cls, config: Any) -> Base:
        """By its configuration."""
        shape = Shape.of_config(config)
        return cls(shape, shape.hidden * shape.vocab * (1 if config.tie_word_embeddings else 2))

    @property
    def block_params(self) -> int:
        """Weights of one block."""
        return sum(i * o for i, o in self.shape.block)

    @property
    def block_adapter_params(self) -> int:
        """An adapter's on all of a block's linear layers."""
        return ADAPTER_RANK * sum(i + o for i, o in self.shape.block)


@dataclass(frozen=True)
class Way:
    """How a job trains: which weights learn, how wide the base's are, and whether ranks hold slices of them."""

    name: str
    sharded: bool
    full: bool
    weight_bytes: float

    def learned_bytes(self, base: Base) -> tuple[float, float]:
        """Float32 gradients of one block, and of what is outside of the blocks."""
        return (4.0 * base.block_params, 4.0 * base.outer_params) if self.full else (4.0 * base.block_adapter_params, 0.0)

    def gathered_bytes(self, base: Base) -> tuple[float, float]:
        """What a rank needs to compute one block, and what is outside of them."""
        adapter = 0 if self.full else 4 * base.block_adapter_params
        return self.weight_bytes * base.block_params + adapter, self.weight_bytes * base.outer_params

    def resident_bytes(self, base: Base, ranks: int, tokens: float) -> float:
        """What a GPU holds: weights, Adam's state, gradients, a micro-batch's checkpoints, and two gathered blocks."""
        outer_width = 4 if self.full else 2  # not quantised
        (block, _), (learned, outer_learned), n = self.gathered_bytes(base), self.learned_bytes(base), base.shape.num_blocks
        state = n * (block + 3 * learned) + outer_width * base.outer_params + 3 * outer_learned
        checkpoints = 2 * tokens * base.shape.hidden * n
        return (state / ranks + 2 * block + outer_width * base.outer_params if self.sharded else state) + checkpoints


DDP = Way("ddp, LoRA", False, False, 2)
DDP_4BIT = Way("ddp, LoRA, 4-bit base", False, False, bytes_per_weight(Quantization(quant_bits=4)))
FSDP = Way("fsdp, LoRA", True, False, 2)
FSDP_FULL = Way("fsdp, full", True, True, 4)  # what learns is gathered as it is held, in float32


def work(base: Base, way: Way, documents: Documents) -> np.ndarray:
    """FLOPs [documents, 3] of the blocks' forward, of their backward with what is recomputed, and of the head."""
    shape, found = base.shape, []
    for document in documents:
        useful = useful_flops(shape, [document], 0 if way.full else ADAPTER_RANK)
        weights = 2 * document[0] * shape.num_blocks * base.block_params
        first = 2 * document[0] * sum(i * o for i, o in shape.first)  # whose input needs a gradient where embeddings learn
        forward = weights + (useful["attention"] + useful["adapter"]) / 3
        backward = sum(useful.values()) - useful["head"] + (weights + first if way.full else 0)
        found.append((forward, backward, useful["head"] * (1.5 if way.full else 1)))
    return np.array(found, dtype=float)


def striped(flops: np.ndarray, ranks: int, batch_size: int) -> np.ndarray:
    """A global batch's work [documents, 3] as [ranks, micro-batches, 3], in the order that it comes in.

    The ranks share the documents evenly, and a rank's micro-batches its.
    """
    each = len(flops) // ranks
    micros = math.ceil(each / batch_size)
    cuts = np.linspace(0, each, micros + 1).astype(int)[:-1]
    return np.add.reduceat(flops.reshape(ranks, each, 3), cuts, axis=1)


def dealt(flops: np.ndarray, ranks: int, batch_size: int) -> np.ndarray:
    """The same, with about as much for each rank and each of its micro-batches: as the sampler has it."""
    micros, sizes = math.ceil(len(flops) / ranks / batch_size), flops.sum(1)
    return np.array([[flops[mine[part]].sum(0) for part in deal(sizes[mine], micros)] for mine in deal(sizes, ranks)])


def step_s(base: Base, way: Way, gpu: Gpu, cluster: Cluster, flops: np.ndarray) -> float:
    """Seconds of an optimizer step of work [ranks, micro-batches, 3]."""
    ranks, seconds = len(flops), flops / gpu.flops
    settling = all_reduce(SYNCED_BYTES, ranks, cluster)  # counts, and a word to stop
    learned, outer_learned = way.learned_bytes(base)
    blocks = base.shape.num_blocks
    if not way.sharded:
        size = blocks * learned + outer_learned
        buckets = max(1, math.ceil(size / BUCKET_BYTES))
        return float(seconds.sum((1, 2)).max() + settling + buckets * all_reduce(size / buckets, ranks, cluster))
    weights, outer = (gather(size, ranks, cluster) for size in way.gathered_bytes(base))
    gradients, outer_gradients = (gather(size, ranks, cluster) for size in (learned, outer_learned))
    total = 2 * settling  # and the loss with the gradient's norm
    for micro in range(seconds.shape[1]):
        slowest = seconds[:, micro].sum(1).argmax()
        forward, backward, head = seconds[slowest, micro] / (blocks, blocks, 1)
        total += outer + weights + (blocks - 1) * max(forward, weights) + forward + head
        total += outer + weights + (blocks - 1) * max(backward, weights + gradients) + backward
        total += gradients + (outer_gradients if outer_learned else 0.0)
    return float(total)


def losses(
    base: Base, way: Way, gpu: Gpu, cluster: Cluster, batches: Sequence[np.ndarray], loading_s: float = 0.0
) -> dict[str, float]:
    """The mean step of some batches of work, in seconds; the share of it that all GPUs would need if nothing were lost; and what
    is lost, by cause.

    Rows are read ahead: they cost what reading them (`loading_s` a step) takes longer than all else.
    """
    even = float(np.mean([flops.sum() / len(flops) for flops in batches])) / gpu.flops
    inside, between = cluster.inside, cluster.between
    at_once = replace(cluster, inside=replace(inside, alpha_s=0), between=replace(between, alpha_s=0))
    networks = (replace(cluster, inside=FREE, between=FREE), at_once, cluster)
    apart, sent, whole = (float(np.mean([step_s(base, way, gpu, c, flops) for flops in batches])) for c in networks)
    step = max(whole, loading_s)
    lost = dict(zip(CAUSES, (apart - even, sent - apart, whole - sent, step - whole), strict=True))
    return {"step_s": step, "efficiency": even / step} | {cause: seconds / step for cause, seconds in lost.items()}


def cpu_step_s(base: Base, documents: Documents, workers: int, cores: int, flops: float, link: Link) -> float:
    """Seconds of a step of ddp LoRA by the workers of one machine, each of whose cores does `flops` of useful work a second."""
    shares = [[documents[i] for i in share] for share in deal(np.array([length for length, _ in documents]), workers)]
    seconds = [sum(useful_flops(base.shape, share, ADAPTER_RANK).values()) / flops for share in shares]
    gradients = 4 * base.shape.num_blocks * base.block_adapter_params
    return makespan(seconds, cores) + all_reduce(gradients, workers, Cluster(link, link, per_node=workers))


def makespan(seconds: Sequence[float], cores: int) -> float:
    """Seconds until all are done that take so long on a core of their own and share `cores` fairly."""
    total, done = 0.0, 0.0
    for i, part in enumerate(sorted(seconds)):
        total += (part - done) * max(1.0, (len(seconds) - i) / cores)
        done = part
    return total
