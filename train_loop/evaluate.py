"""Evaluation: mean token cross-entropy over the eval rows of all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from train_loop.context import RunContext
from train_loop.data.packing import MicroBatch
from train_loop.errors import Stopped
from train_loop.loss import supervised_loss
from train_loop.model.load import compute_in


@contextlib.contextmanager
def full_precision(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Compute in float32 inside, in `dtype` afterwards: its frozen weights are widened and narrowed again, which loses nothing.

    In bf16 the loss of a few hundred tokens moves by 1e-2 with batch shape and CPU; this way anyone who loads base and adapter in
    float32 gets the reported figure.
    """
    if dtype is torch.float32:
        yield
        return
    compute_in(model, torch.float32)
    try:
        yield
    finally:
        compute_in(model, dtype)


@torch.no_grad()
def evaluate(model: Any, batches: Iterable[MicroBatch | None], ctx: RunContext, idle: MicroBatch | None = None) -> float | None:
    """Sum of losses over all ranks ÷ their supervised tokens; None when there are none. Collective.

    `idle` is what a rank runs that has no rows left, where every rank must run the model.

    Raises Stopped between two batches when the run is asked to stop: an evaluation may take longer than many steps.
    """
    total = torch.zeros(2, dtype=torch.float64)
    model.eval()
    try:
        for micro in batches:
            ctx.beat()
            if ctx.all_reduce_sum(torch.tensor([int(ctx.stop_requested())], device=ctx.device)).item():
                raise Stopped
            micro = micro or idle
            if micro is not None:
                total[0] += supervised_loss(model, micro.to(ctx.device)).double().cpu()
                total[1] += micro.num_supervised
    finally:
        model.train()
    total = ctx.all_reduce_sum(total.to(ctx.device)).cpu()
    return float(total[0] / total[1]) if total[1] > 0 else None
