"""Evaluation: mean token cross-entropy over the eval rows of all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from train_loop.context import RunContext
from train_loop.data.packing import MicroBatch
from train_loop.loss import supervised_loss


@torch.no_grad()
def evaluate(model: Any, batches: Iterable[MicroBatch], ctx: RunContext) -> float | None:
    """Sum of losses over all ranks ÷ their supervised tokens; None when there are none. Collective."""
    total = torch.zeros(2, dtype=torch.float64)
    model.eval()
    for micro in batches:
        total[0] += supervised_loss(model, micro.to(ctx.device)).double().cpu()
        total[1] += micro.num_supervised
    model.train()
    total = ctx.all_reduce_sum(total.to(ctx.device)).cpu()
    return float(total[0] / total[1]) if total[1] > 0 else None
