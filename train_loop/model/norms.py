"""Root-mean-square norms in one kernel each way, on GPUs.

transformers' take six over float32 copies of the hidden states, one of which autograd keeps.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

ROUNDING = 1e-2  # is less, in bf16 too


def fuse_norms(model: Any) -> None:
    """Have the norms of a model on a GPU that compute what torch's does use it, in place."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "variance_epsilon") and weight is not None and weight.is_cuda and _is_plain(module):
            module.forward = types.MethodType(_forward, module)


@torch.no_grad()
def _is_plain(norm: Any) -> bool:
    """Whether it is torch's: an architecture may add one to the weight (Gemma's), or take the mean away."""
    x = torch.linspace(-1, 2, 2 * norm.weight.numel(), device=norm.weight.device).view(2, -1).to(norm.weight.dtype)
    mine, its = _norm(norm, x).float(), norm(x).float()
    return bool((mine - its).abs().max() <= ROUNDING * its.abs().max())


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):  # it would compute in float32
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _forward(norm: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Of transformers' module. One that is trained, in float32, is left to it."""
    if args or kwargs or x.dtype is not norm.weight.dtype or norm.weight.requires_grad:
        return type(norm).forward(norm, x, *args, **kwargs)  # type: ignore[no-any-return]
    return _norm(norm, x)
