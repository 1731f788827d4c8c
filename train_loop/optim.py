"""The optimizer and the learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from train_loop.errors import TrainingError
from train_loop.spec import Hyperparameters

MIN_LR_SHARE = 0.1  # where cosine_with_min_lr ends, as a share of the peak


def learning_rate(hp: Hyperparameters, step: int, total_steps: int) -> float:
    """The rate used by optimizer step `step` (from 1). Warm-up is linear and ends at the peak."""
    warmup = hp.warmup_steps if hp.warmup_steps is not None else math.ceil(hp.warmup_ratio * total_steps)
    if hp.lr_scheduler_type == "constant":
        return hp.learning_rate
    if step <= warmup:
        return hp.learning_rate * step / warmup
    done = (step - warmup - 1) / max(1, total_steps - warmup)
    if hp.lr_scheduler_type == "constant_with_warmup":
        share = 1.0
    elif hp.lr_scheduler_type == "linear":
        share = 1 - done
    else:
        low = MIN_LR_SHARE if hp.lr_scheduler_type == "cosine_with_min_lr" else 0.0
        share = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    return hp.learning_rate * share


def build_optimizer(groups: Sequence[Mapping[str, Any]], hp: Hyperparameters) -> torch.optim.Optimizer:
    """AdamW over groups of trainable parameters; the loop sets its rate before each step. Norms and biases aren't decayed.

    Raises TrainingError where this device can't page.
    """
    split = [
        {**group, "params": parameters, "weight_decay": decay}
        for group in groups
        for parameters, decay in (
            ([p for p in group["params"] if p.ndim >= 2], hp.weight_decay),
            ([p for p in group["params"] if p.ndim < 2], 0.0),
        )
        if parameters
    ]
    return _optimizer_class(hp.optim, split[0]["params"][0].device)(
        split,
        lr=hp.learning_rate,
        betas=(hp.adam_beta1, hp.adam_beta2),
        eps=hp.adam_epsilon,
    )


def _optimizer_class(name: str, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw":
        return partial(torch.optim.AdamW, fused=device.type == "cuda")  # one kernel for all of an adapter's small tensors
    if name == "paged_adamw_8bit" and device.type == "cpu":
        raise TrainingError(
            "paged_adamw_8bit pages between a GPU's memory and its host's, and this worker has no GPU: choose adamw_8bit, "
            "which takes the same steps",
            field="train_config.hyperparameters.optim",
            code="optim_needs_gpu",
        )
    import bitsandbytes.optim

    return bitsandbytes.optim.AdamW8bit if name == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit  # type: ignore[no-any-return]


def page_again(optimizer: torch.optim.Optimizer) -> None:
    """Put what an optimizer that pages has been loaded with where it pages: bitsandbytes leaves it in the GPU's own memory."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, values in optimizer.state.items():
        for name in values.keys() & {"state1", "state2"}:
            place = optimizer.get_state_buffer(parameter, dtype=values[name].dtype)  # type: ignore[attr-defined]
            values[name] = place.copy_(values[name])


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use `value` for the next step, times each group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_factor"]
