"""How long a collective takes: the alpha-beta model of a message, alpha + bytes / bandwidth, added up over an algorithm's steps.

Ring: Patarasuk & Yuan, 2009. Two pipelined trees: Sanders, Speck & Träff, 2009. How latencies add up over machines of several
GPUs is as NCCL's own tuner has it (src/graph/tuning.cc); like it, what is fastest is taken. Nothing here knows of congestion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Link:
    """What one rank sends over: the latency of a message, and bytes per second in one direction."""

    alpha_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of `per_node` GPUs: one link inside, another, a GPU's share of its node's, between nodes."""

    inside: Link
    between: Link
    per_node: int = 8

    def nodes(self, ranks: int) -> tuple[int, int]:
        """So many nodes, of so many ranks. Raises ValueError where they aren't all full."""
        if ranks > self.per_node and ranks % self.per_node:
            raise ValueError(f"{ranks} ranks don't fill nodes of {self.per_node}")
        return max(1, ranks // self.per_node), min(ranks, self.per_node)


def ring_gather(size: float, ranks: int, link: Link) -> float:
    """Seconds until each of the ranks has all `size` bytes, of which it had its share; a reduce-scatter is the same backwards."""
    return (ranks - 1) * (link.alpha_s + size / ranks / link.bytes_per_s)


def ring_all_reduce(size: float, ranks: int, link: Link) -> float:
    """Seconds of a reduce-scatter and an all-gather: least bytes, a latency that grows with the ranks."""
    return 2 * ring_gather(size, ranks, link)


def tree_all_reduce(size: float, ranks: int, link: Link) -> float:
    """Seconds up and down two trees, each with half of the bytes, pipelined: latency grows with the logarithm."""
    return 2 * (math.ceil(math.log2(ranks)) * link.alpha_s + (ranks > 1) * size / link.bytes_per_s)


def gathers(size: float, ranks: int, cluster: Cluster) -> dict[str, float]:
    """Seconds of an all-gather of `size` bytes in the end, or of a reduce-scatter, by algorithm."""
    nodes, local = cluster.nodes(ranks)
    inside, between = cluster.inside, cluster.between
    if nodes == 1:
        return {"ring": ring_gather(size, local, inside)}
    # A ring for each GPU of a node: together they use every link between nodes, and inside each has its part of the one there.
    slowest = min(inside.bytes_per_s, local * between.bytes_per_s)
    latency = (ranks - nodes) * inside.alpha_s + (nodes - 1) * between.alpha_s
    return {
        "ring": latency + (ranks - 1) / ranks * size / slowest,
        # First each GPU with those of its place in the other nodes, then inside.
        "hierarchical": ring_gather(size / local, nodes, between) + ring_gather(size, local, inside),
    }


def all_reduces(size: float, ranks: int, cluster: Cluster) -> dict[str, float]:
    """Seconds of an all-reduce of `size` bytes, by algorithm."""
    nodes, local = cluster.nodes(ranks)
    inside, between = cluster.inside, cluster.between
    if nodes == 1:
        return {"ring": ring_all_reduce(size, local, inside), "tree": tree_all_reduce(size, local, inside)}
    slowest = min(inside.bytes_per_s, local * between.bytes_per_s)
    latency = (local - 1) * inside.alpha_s + math.ceil(math.log2(nodes)) * between.alpha_s
    around = 2 * ring_gather(size, local, inside)
    return {
        "ring": 2 * gathers(size, ranks, cluster)["ring"],
        "tree": 2 * (latency + size / slowest),  # chains inside the nodes
        "hierarchical ring": around + ring_all_reduce(size / local, nodes, between),
        "hierarchical tree": around + tree_all_reduce(size / local, nodes, between),
    }


def gather(size: float, ranks: int, cluster: Cluster) -> float:
    """Seconds of the fastest all-gather or reduce-scatter."""
    return min(gathers(size, ranks, cluster).values())


def all_reduce(size: float, ranks: int, cluster: Cluster) -> float:
    """Seconds of the fastest all-reduce."""
    return min(all_reduces(size, ranks, cluster).values())


def fit(timed: Sequence[tuple[int, float]], ranks: int) -> Link:
    """The link on which a ring all-reduce of (bytes, seconds) would take about that long.

    Least squares of relative errors, so that small messages count as much as large ones.
    """
    sizes, seconds = np.array(timed, dtype=float).T
    constant, per_byte = np.linalg.lstsq(np.stack([1 / seconds, sizes / seconds], 1), np.ones(len(timed)), rcond=None)[0]
    steps = 2 * (ranks - 1)
    return Link(float(constant) / steps, steps / ranks / float(per_byte))
