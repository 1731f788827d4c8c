"""What the loop reports: one point per logging step, throughput, time left."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def memory_held(device: torch.device) -> dict[str, float]:
    """`memory_bytes`, the most that this process held on its GPU since the call before; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    import torch

    held = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"memory_bytes": held}


@dataclass
class MetricLog:
    """The points so far, `eval_loss` before, after and best, and the clock behind tokens/s and ETA."""

    total_steps: int
    points: list[dict[str, Any]] = field(default_factory=list)  # none is ever changed: the last may be replaced
    eval_before: float | None = None
    eval_after: float | None = None
    best: dict[str, Any] | None = None
    worlds: list[dict[str, int]] = field(default_factory=list)
    # Since the last line; a checkpoint may fall between two.
    logged_at: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    evaluated_at: int | None = None  # an evaluation that a stop cut short is made up for
    no_better: int = 0  # evaluations since the best one, also those whose loss is no number
    _timed_steps: int = 0  # in the interval that the clock runs for
    _timed_tokens: int = 0
    _since: float = field(default_factory=time.monotonic)
    _step_s: float | None = None
    _unsent: dict[int, dict[str, Any]] = field(default_factory=dict)

    def runs_on(self, step: int, world_size: int) -> None:
        """Note that the steps from `step` run on so many workers."""
        self.worlds = [w for w in self.worlds if w["from_step"] < step]
        if not self.worlds or self.worlds[-1]["world_size"] != world_size:
            self.worlds.append({"from_step": step, "world_size": world_size})

    def count(self, tokens: int, loss: float) -> None:
        """Add one step: its tokens and its mean loss, both of the global batch."""
        self.tokens += tokens
        self.loss_sum += loss
        self._timed_tokens += tokens
        self._timed_steps += 1

    def restart_clock(self) -> None:
        """Start a new throughput interval: what comes before (an evaluation, a checkpoint) isn't training."""
        self._since, self._timed_tokens, self._timed_steps = time.monotonic(), 0, 0

    def point(self, step: int, **values: float) -> dict[str, Any]:
        """Close the interval at `step` and return its line, with the mean loss of its steps and tokens/s."""
        elapsed = max(1e-9, time.monotonic() - self._since)
        self._step_s = elapsed / max(1, self._timed_steps)
        line = {
            "step": step,
            "loss": self.loss_sum / (step - self.logged_at),
            **values,
            "tokens": self.tokens,
            "tokens_per_second": round(self._timed_tokens / elapsed, 2),
            "time": round(time.time(), 3),
        }
        self.points.append(line)
        self._unsent[step] = line
        self.logged_at, self.tokens, self.loss_sum = step, 0, 0.0
        self.restart_clock()
        return line

    def evaluated(self, step: int, loss: float) -> None:
        """Record an evaluation after `step` steps (0 is before training). One that gave no number has no point."""
        is_better = math.isfinite(loss) and (self.best is None or loss < self.best["eval_loss"])
        if step > 0:
            self.no_better = 0 if is_better else self.no_better + 1
        if not math.isfinite(loss):
            return
        if step == 0:
            self.eval_before = loss
        self.eval_after = loss
        if step > 0 and is_better:
            self.best = {"step": step, "eval_loss": loss}
        if self.points and self.points[-1]["step"] == step:
            self.points[-1] = self.points[-1] | {"eval_loss": loss}
        else:
            self.points.append({"step": step, "eval_loss": loss, "time": round(time.time(), 3)})
        self._unsent[step] = self.points[-1]

    @property
    def best_step(self) -> int | None:
        """The step after which `eval_loss` was lowest, once there is one."""
        return self.best["step"] if self.best else None

    def stalled(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations were no better than the best before them."""
        return patience is not None and self.no_better >= patience

    def eta_s(self, step: int) -> float | None:
        """Seconds left, from the last interval's pace."""
        return None if self._step_s is None else round(self._step_s * (self.total_steps - step), 1)

    def summary(self) -> dict[str, Any]:
        """The job's `metrics`: last and best point, eval loss before and after."""
        last = next((p for p in reversed(self.points) if "loss" in p), None)
        return {
            "last": last,
            "best": self.best,
            "eval_loss_before": self.eval_before,
            "eval_loss_after": self.eval_after,
        }

    def fresh(self) -> list[dict[str, Any]]:
        """Points that are new, or have changed, since the last call."""
        fresh, self._unsent = list(self._unsent.values()), {}
        return fresh

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as it is now."""
        now = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return now | {"points": list(self.points), "worlds": list(self.worlds)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> MetricLog:
        """Continue where a checkpoint stopped. Every point is sent once more: the last ones may have died on their way."""
        log = cls(**state)
        log._unsent = {point["step"]: point for point in log.points}
        return log
