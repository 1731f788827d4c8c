"""Fully sharded data parallelism (FSDP2): each worker keeps a slice of every weight and gathers a block while it computes.

What isn't sharded are the scales of a 4-bit base, some 3 % of it. Gradients are summed over the workers block by block during
backward, so every rank must run as many forward and backward passes as the others: one without samples runs `IDLE`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch

from train_loop.context import RunContext
from train_loop.data.packing import MicroBatch
from train_loop.data.tokenize import IGNORE_INDEX
from train_loop.model.load import language_part, quantised_layers
from train_loop.model.vision import Family

# A token that nothing is learned from.
IDLE = MicroBatch(
    input_ids=torch.zeros((1, 1), dtype=torch.int64),
    labels=torch.full((1, 1), IGNORE_INDEX),
    position_ids=torch.zeros((1, 1), dtype=torch.int64),
    attention_mask=None,
    num_tokens=0,
)


def shard(causal_lm: Any, ctx: RunContext, family: Family | None = None) -> None:
    """Shard the weights over all ranks, in place: its parameters are DTensors afterwards. Collective.

    What sees (of a `family`) is gathered with the outermost weights, not by itself: a rank whose samples have no images doesn't
    run it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for layer in quantised_layers(causal_lm):
        _store_as_floats(layer)
    mesh = init_device_mesh(ctx.device.type, (ctx.world_size,))
    within = causal_lm.named_modules() if family is None else language_part(causal_lm).items()
    blocks = [m for _, m in within if type(m).__name__ in (causal_lm._no_split_modules or ())]
    for module in (*blocks, causal_lm):
        # Also the outermost, so that outside of a call every parameter is this rank's slice.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # The loss is already divided by the tokens of all ranks. Without the second, gloo is asked for an operation it lacks.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # Backbone and head are called one by one, and a head may share its weight with the embeddings: gather around both.
    causal_lm.gathered = types.MethodType(lambda self, f, *arguments: f(self, *arguments) + _nothing(self, family), causal_lm)
    register_fsdp_forward_method(causal_lm, "gathered")


def _nothing(causal_lm: Any, family: Family | None) -> torch.Tensor | float:
    """Zero, with a gradient of zero for all that learns of what sees: those of the other ranks are summed with it."""
    if family is None or not torch.is_grad_enabled():
        return 0.0
    seeing = [p for n, p in causal_lm.named_parameters() if p.requires_grad and family.is_of_sight(n)]
    return sum((p.sum() * 0.0 for p in seeing), 0.0)


@torch.no_grad()
def deal_out(source: torch.nn.Module | None, empty: torch.nn.Module, ctx: RunContext) -> None:
    """Fill a sharded model without weights with those of `source`, which rank 0 has, tensor by tensor. Collective."""
    theirs = {} if source is None else dict(_tensors(source))
    dtypes = [{name: t.dtype for name, t in theirs.items()}]  # some architectures keep a few buffers in float32
    torch.distributed.broadcast_object_list(dtypes, src=0, device=ctx.device)
    filled = dict[torch.Tensor, torch.Tensor]()
    for name, tensor in _tensors(empty):
        if tensor in filled:  # a tied one
            continue
        whole = torch.empty(tensor.shape, dtype=dtypes[0][name], device=ctx.device)
        if name in theirs:
            whole.copy_(theirs[name])
        # As bytes, for not every backend sends every dtype.
        torch.distributed.broadcast(whole.view(-1).view(torch.uint8), src=0)
        mine = torch.empty_like(tensor, dtype=whole.dtype, device=ctx.device)
        mine.copy_(placed_like(whole, mine))
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        filled[tensor] = torch.nn.Parameter(mine, tensor.requires_grad) if is_parameter else mine
    for module in empty.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for kept in tables:
            kept.update({name: filled[t] for name, t in kept.items() if t is not None})


def release(model: torch.nn.Module) -> None:
    """Free this rank's slices of a sharded model, which is of no use afterwards. FSDP holds on to the parameters themselves."""
    for parameter in model.parameters():
        local: torch.Tensor = parameter.to_local()  # type: ignore[attr-defined]
        local.untyped_storage().resize_(0)


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _store_as_floats(layer: Any) -> None:
    """Have a 4-bit layer's packed bytes pass as float32, the only kind FSDP shards; nothing ever computes with them as such.

    bitsandbytes finds the scales at the layer when the weight has lost them on its way.
    """
    layer.quant_state = layer.weight.quant_state
    packed = layer.weight.data.reshape(-1).view(torch.float32).view(-1, 1)
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is spread over the ranks."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor, *, keep: bool = True) -> torch.Tensor:
    """The tensor itself, or gathered from all ranks into CPU memory. Collective where it is sharded.

    A rank that doesn't `keep` it takes part and has an empty one.
    """
    if not is_sharded(tensor):
        return tensor
    full: torch.Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full.cpu() if keep else full.new_empty(0)


def placed_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole `tensor`, sharded as `like` is; the tensor itself where that isn't sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    # None: every rank has the whole tensor, nothing has to be sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
