"""What the ranks settle around a step: what is in it, whether to go on, and which rows broke it."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch

from train_loop.context import RunContext
from train_loop.data.packing import MicroBatch
from train_loop.data.shards import ShardSet
from train_loop.errors import TrainingError

MAX_ROWS_TOLD = 5


@dataclass(frozen=True)
class Agreed:
    """The same on every rank: tokens of the global batch, and what any rank was told."""

    supervised: int
    tokens: int
    stop: bool
    notice: int  # which notice of preemption stands, 0 for none


def agree(micro_batches: list[MicroBatch], ctx: RunContext) -> Agreed:
    """Supervised tokens and tokens of the global batch, whether any rank was asked to stop, and the notice that a machine will
    be taken back, as rank 0 has it (all are told the same, if not at the same step): one all-reduce."""
    mine = [
        sum(m.num_supervised for m in micro_batches),
        sum(m.num_tokens for m in micro_batches),
        int(ctx.stop_requested()),
        crc32((ctx.preemption() or "").encode()) if ctx.rank == 0 else 0,
    ]
    agreed = ctx.all_reduce_sum(torch.tensor(mine, dtype=torch.int64, device=ctx.device)).tolist()
    supervised, tokens, stop, notice = agreed
    return Agreed(supervised, tokens, bool(stop), notice)


def not_finite(
    step: int, bad: list[MicroBatch], rows: np.ndarray, shards: ShardSet, rate: float, ctx: RunContext
) -> TrainingError:
    """What to say of a loss that isn't a number: which of the step's `rows` gave it. Collective.

    When every loss was a number and only the gradient isn't, any row of the step may be at fault.
    """
    mine = torch.tensor(np.isin(rows, [row for micro in bad for row in micro.rows]).astype(np.int64), device=ctx.device)
    is_bad = ctx.all_reduce_sum(mine).cpu().numpy() > 0
    suspects = sorted(shards.source(int(row)) for row in (rows[is_bad] if is_bad.any() else rows))
    shown = "; ".join(f"{uri} line {line}" for uri, line in suspects[:MAX_ROWS_TOLD])
    more = f" and {len(suspects) - MAX_ROWS_TOLD} more" if len(suspects) > MAX_ROWS_TOLD else ""
    return TrainingError(
        f"the loss or its gradient stopped being a number at step {step}: lower learning_rate (now {rate:g}) or look at these "
        f"rows of that step: {shown}{more}",
        field="train_config.hyperparameters.learning_rate",
        code="loss_not_finite",
    )
