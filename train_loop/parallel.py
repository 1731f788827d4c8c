"""Gradients of all workers: summed over equal copies once per step (ddp), or by the sharded model itself during backward (fsdp).

A rank without samples in a step joins with zeros, which torch's DDP wrapper can't do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from train_loop.context import RunContext
from train_loop.sharding import is_sharded, whole

BUCKET_BYTES = 64 << 20  # what is copied to be sent in one go


def sync_gradients(parameters: Sequence[torch.nn.Parameter], loss: float, ctx: RunContext) -> float:
    """Replace each parameter's gradient by the sum over ranks, and return that of `loss`. Missing gradients count as zero, on one
    worker too: an optimizer goes on with zero, and leaves out what has none.

    The loss rides along in float32, so that every rank knows at once when it isn't a number on any of them.
    """
    if ctx.world_size == 1:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return loss
    total = torch.tensor([loss], dtype=torch.float32, device=ctx.device)
    if is_sharded(parameters[0]):
        return float(ctx.all_reduce_sum(total))
    for bucket in _buckets(parameters):
        grads = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket]
        flat = torch.cat([*grads, total] if bucket[-1] is parameters[-1] else grads)
        ctx.all_reduce_sum(flat)
        at = 0
        for p in bucket:
            p.grad = flat[at : at + p.numel()].view_as(p)
            at += p.numel()
    return float(flat[-1])


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    bucket, size = list[torch.nn.Parameter](), 0
    for p in parameters:
        if bucket and size + p.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.nbytes
    yield bucket


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
    """Scale the gradients to a global norm of at most `max_norm`; return the norm before. Collective where they are sharded."""
    return float(whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm)))


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
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // ctx.local_world_size))
