"""Data parallelism: equal adapters on every rank, gradients summed once per step.

Only the adapter is trained, so its gradients fit one flat buffer and one all-reduce. A rank without samples in a step joins
with zeros, which torch's DDP wrapper can't do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from train_loop.context import RunContext


def sync_gradients(parameters: Sequence[torch.nn.Parameter], loss: float, ctx: RunContext) -> float:
    """Replace each parameter's gradient by the sum over ranks, and return that of `loss`. Missing gradients count as zero.

    The loss rides along in float32, so that every rank knows at once when it isn't a number on any of them.
    """
    if ctx.world_size == 1:
        return loss
    grads = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
    flat = torch.cat([*grads, torch.tensor([loss], dtype=grads[0].dtype, device=grads[0].device)])
    ctx.all_reduce_sum(flat)
    at = 0
    for p in parameters:
        p.grad = flat[at : at + p.numel()].view_as(p)
        at += p.numel()
    return float(flat[at])


def sync_parameters(parameters: Sequence[torch.nn.Parameter], ctx: RunContext) -> None:
    """Give every rank the values of rank 0."""
    if ctx.world_size == 1:
        return
    for p in parameters:
        if ctx.rank != 0:
            p.data.zero_()
        ctx.all_reduce_sum(p.data)


def set_threads(ctx: RunContext) -> None:
    """Share the node's cores between its workers instead of letting each take them all."""
    import os

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // ctx.local_world_size))
