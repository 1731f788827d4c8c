"""Linear layers with a LoRA adapter as one function of autograd.

PEFT's own forward casts its input to float32, drops out of the copy, and leaves autograd to keep each of these: five copies of an
input that the base layer, being frozen, doesn't need at all; an 8-bit layer of bitsandbytes even keeps it where checkpointing
doesn't find it. Here the input itself is kept, which the layers that read it share, and a byte of dropout mask a value. Idea:
Unsloth's LoRA kernels.
"""

from __future__ import annotations

import types
from typing import Any, TypeAlias

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from train_loop.model.bits import Linear4bit, Linear8bitLt, MatmulLtState, QuantState, dequantize_4bit, matmul

Quantised: TypeAlias = QuantState | MatmulLtState | None  # how a weight is packed: in 4 bits, in 8, not at all
DRAWS = 2**16  # how many different numbers decide what dropout drops


class _LoraLinear(torch.autograd.Function):
    """`x @ W.T + bias + scale * dropout(x) @ A.T @ B.T` of x[n, in], W[out, in], A[r, in], B[out, r]; W and bias are frozen.

    W is packed where `quantised` says how, and is unpacked again for the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        quantised: Quantised,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        y = _base_of(x, weight, quantised, bias)
        a, b = a.to(x.dtype), b.to(x.dtype)
        masked, mask, gain, share = _dropped(x, dropout) if dropout else (x, None, 1.0, 1.0)
        scale /= share
        low = masked @ a.t()  # [n, r]
        y.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low, mask)
        ctx.quantised, ctx.scale, ctx.gain = quantised, scale, gain
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, low, mask = ctx.saved_tensors
        of_y = grads[0]
        # With beta 0 the first is looked at for its shape only.
        of_low = torch.addmm(low, of_y, b, beta=0, alpha=ctx.scale)
        of_b = torch.addmm(b, of_y.t(), low, beta=0, alpha=ctx.scale)
        of_a = of_low.t() @ _masked(x, mask, ctx.gain)
        of_x = None
        if ctx.needs_input_grad[0]:
            unpacked = _unpacked(weight, ctx.quantised, x.dtype)
            if mask is None:
                of_x = (of_y @ unpacked).addmm_(of_low, a)
            elif x.is_cuda:  # the product adds to it at no cost
                of_x = _masked(of_low @ a, mask, ctx.gain).addmm_(of_y, unpacked)
            else:
                of_x = (of_y @ unpacked).add_(_masked(of_low @ a, mask))
        return of_x, None, None, None, of_a, of_b, None, None


class _DoraLinear(torch.autograd.Function):
    """`(x - d) @ W.T + bias + d @ (W + scale * B @ A).T * magnitude / length` with d = dropout(x), as PEFT has it.

    magnitude[out] is learned; length[out] is that of the rows of W + scale * B @ A, and has no gradient.
    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, with section 4.3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        quantised: Quantised,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        dropout: float,
        magnitude: torch.Tensor,
        length: torch.Tensor,
    ) -> torch.Tensor:
        mask, share = _kept(x, dropout) if dropout else (None, 1.0)
        unit = length * share
        masked = _masked(x, mask)
        low = masked @ a.t()  # [n, r]
        long = _base_of(masked, weight, quantised, None).addmm_(low, b.t(), alpha=scale)  # [n, out]
        y = (long * (magnitude / unit)).to(x.dtype)  # not rounded first: a magnitude moves by less than bfloat16 can tell
        if mask is not None:
            y += _base_of(torch.sub(x, masked, alpha=1 / share), weight, quantised, None)
        if bias is not None:
            y += bias
        ctx.save_for_backward(x, weight, a, b, low, mask, long, magnitude, unit)
        ctx.quantised, ctx.scale, ctx.share = quantised, scale, share
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, low, mask, long, magnitude, unit = ctx.saved_tensors
        of_y = grads[0]
        of_magnitude = (of_y.to(unit.dtype) * long).sum(0) / unit
        of_long = (of_y * (magnitude / unit)).to(of_y.dtype)
        of_low = (of_long @ b) * ctx.scale
        of_b = (of_long.t() @ low) * ctx.scale
        of_a = of_low.t() @ _masked(x, mask)
        of_x = None
        if ctx.needs_input_grad[0]:
            unpacked = _unpacked(weight, ctx.quantised, x.dtype)
            of_x = (of_long @ unpacked).addmm_(of_low, a)
            if mask is not None:
                of_rest = of_y @ unpacked
                of_x = of_rest + _masked(of_x.sub_(of_rest, alpha=1 / ctx.share), mask)
        return of_x, None, None, None, of_a, of_b, None, None, of_magnitude, None


def _kept(x: torch.Tensor, dropout: float) -> tuple[torch.Tensor, float]:
    """A byte for each value of x, 0 with about the probability `dropout` and else 1, and the share that is kept."""
    if x.is_cuda:
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout), 1 - dropout
    cut = min(round(dropout * DRAWS), DRAWS - 1)
    # Four values share a draw of 64 bits. torch's bernoulli_ draws for each, and took a fifth of a step on a CPU.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return (draws.view(torch.int16)[: x.numel()] >= cut - DRAWS // 2).view(torch.uint8).view(x.shape), 1 - cut / DRAWS


def _dropped(x: torch.Tensor, dropout: float) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """x times mask times gain, mask, gain, and the share of dropout(x) that this is."""
    if x.is_cuda:  # drawn and applied in one pass over memory
        return *torch.native_dropout(x, dropout, True), 1 / (1 - dropout), 1.0
    mask, share = _kept(x, dropout)
    return _masked(x, mask), mask, 1.0, share


def _masked(x: torch.Tensor, mask: torch.Tensor | None, gain: float = 1.0) -> torch.Tensor:
    if mask is None:
        return x
    if x.is_cuda:  # one pass over memory
        return torch.ops.aten.native_dropout_backward(x, mask, gain)  # type: ignore[no-any-return]
    return x * mask.to(x.dtype)  # cast first: five times as fast as mixing the types


def _base_of(x: torch.Tensor, weight: torch.Tensor, quantised: Quantised, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(quantised, MatmulLtState) and x.is_cuda:
        return matmul(x, weight, bias=bias, state=quantised)  # type: ignore[no-any-return] # in 8 bits, as LLM.int8() does
    return F.linear(x, _unpacked(weight, quantised, x.dtype), bias)


def _unpacked(weight: torch.Tensor, quantised: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """[out, in], in `dtype`."""
    if isinstance(quantised, MatmulLtState):
        return weight.to(dtype).mul_(quantised.SCB.unsqueeze(1) / 127)
    return (weight if quantised is None else dequantize_4bit(weight.view(-1, 1), quantised)).to(dtype)


def fuse(model: Any) -> None:
    """Have the adapted linear layers of a PEFT model, in place, compute as one function where they can."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_known(layer.get_base_layer()):
            layer.forward = types.MethodType(_forward, layer)


def _is_known(base: torch.nn.Module) -> bool:
    return type(base) is torch.nn.Linear or isinstance(base, (Linear4bit, Linear8bitLt))


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Of a PEFT layer. What is more than one adapter, plain or DoRA's, is left to PEFT: several, none, a merged one."""
    name, *more = layer.active_adapters
    is_dora = layer.use_dora.get(name, False)
    is_other = name not in layer.lora_A or (name in layer.lora_variant and not is_dora)
    if more or args or kwargs or layer.disable_adapters or layer.merged or is_other:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    base, device = layer.get_base_layer(), x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    bias = None if base.bias is None else base.bias.to(dtype)
    a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    dropout = layer.lora_dropout[name]
    drops = dropout.p if layer.training and isinstance(dropout, torch.nn.Dropout) else 0.0
    flat, state = x.to(dtype).reshape(-1, x.shape[-1]), _state(base)
    y: torch.Tensor
    if is_dora:
        inputs = flat, base.weight, state, bias, a.to(dtype), b.to(dtype), scale, drops
        y = _DoraLinear.apply(*inputs, layer.lora_magnitude_vector[name].weight, _lengths(base.weight, state, a, b, scale))
    else:
        y = _LoraLinear.apply(flat, base.weight, state, bias, a, b, scale, drops)
    return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def _lengths(weight: torch.Tensor, quantised: Quantised, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """How long each row of W + scale * B @ A is, in float32."""
    with torch.autocast(weight.device.type, enabled=False):
        adapted = torch.addmm(_unpacked(weight, quantised, torch.float32), b, a, alpha=scale)
        length: torch.Tensor = torch.linalg.norm(adapted, dim=1)
    return length


def _state(base: Any) -> Quantised:
    """How a layer's weight is packed. Of a sharded 4-bit one the weight has lost it, and the layer keeps it."""
    if isinstance(base, Linear8bitLt):
        return base.state
    return getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)
