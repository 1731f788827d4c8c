"""The model of a run, ready to be trained: loaded, with an adapter or every weight learning, equal on all ranks or sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train_loop.context import RunContext
from train_loop.data.packing import NO_LIMIT
from train_loop.errors import ModelError
from train_loop.evaluate import full_precision
from train_loop.loss import computes_its_logits, keeps_documents_apart
from train_loop.model.adapters import add_adapter, trainable, with_trained
from train_loop.model.attention import heard
from train_loop.model.layers import fuse
from train_loop.model.load import META, BaseModel, is_quantised, load_base
from train_loop.model.vision import Family
from train_loop.noise import add_noise
from train_loop.parallel import sync_parameters
from train_loop.sharding import deal_out, release, shard
from train_loop.spec import JobSpec


@dataclass(frozen=True)
class Trainee:
    """A model on its device. `note` says where compute differs from what was asked, or is empty."""

    model: Any
    compute_dtype: torch.dtype
    note: str
    device: torch.device
    sharded: bool
    capacity: int | None  # tokens of samples that share a row; None: each has its own
    family: Family | None  # of a model that is to see

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained, in an order that is the same on every rank."""
        return trainable(self.model)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in `compute_dtype` inside; weights that are trained stay float32."""
        if self.compute_dtype is torch.float32:
            return contextlib.nullcontext()
        # A cached copy of a weight would outlive the block that it was gathered for.
        return torch.autocast(self.device.type, self.compute_dtype, cache_enabled=not self.sharded)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Compute as evaluation does: in float32 on a CPU. On a GPU, and sharded, low precision is what can be afforded."""
        precise = self.device.type == "cpu" and not self.sharded
        with full_precision(self.model, self.compute_dtype) if precise else self.autocast():
            yield


def load_trainee(spec: JobSpec, ctx: RunContext) -> Trainee:
    """Load the base and make it trainable. Collective. Raises ModelError."""
    sharded = spec.train_config.distributed.type == "fsdp" and ctx.world_size > 1
    if sharded and not is_quantised(spec, ctx.model_folder):
        return _load_sharded(spec, ctx)
    base = load_base(spec, ctx.model_folder, ctx.device)
    capacity = row_capacity(spec, base)
    model = make_trainable(base, spec, ctx.start)
    sync_parameters(trainable(model), ctx)
    if sharded:
        shard(base.model, ctx, base.family)
    return Trainee(model, base.compute_dtype, base.note, ctx.device, sharded, capacity, base.family)


def _load_sharded(spec: JobSpec, ctx: RunContext) -> Trainee:
    """Rank 0 alone loads the whole base, into CPU memory, and deals it out: no device ever holds more than its slice and one
    tensor. bitsandbytes quantises while it loads, so a quantised base can't be had this way."""
    empty = load_base(spec, ctx.model_folder, ctx.device, at=META)
    with META:
        model = make_trainable(empty, spec)
    source, capacity = None, None
    if ctx.rank == 0:
        base = load_base(spec, ctx.model_folder, ctx.device, at=torch.device("cpu"))
        capacity = row_capacity(spec, base)
        source = make_trainable(base, spec, ctx.start)
        # transformers keeps with what it reads how it renamed it, and undoes that where the whole model is saved.
        empty.model._weight_conversions = getattr(base.model, "_weight_conversions", None)
    told = int(ctx.all_reduce_sum(torch.tensor([capacity or 0], device=ctx.device)))
    shard(empty.model, ctx, empty.family)
    deal_out(source, model, ctx)
    return Trainee(model, empty.compute_dtype, empty.note, ctx.device, True, told or None, empty.family)


def load_whole(spec: JobSpec, ctx: RunContext, trainee: Trainee, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The adapted model that `trainee` holds slices of, whole, on this rank alone; `tensors` is what was trained, by name.

    Frees the slices, so that the base isn't held twice. It comes from its files again, and to where `load_trainee` has it whole
    for a while: so there is room, and a quantised one has the codes that were trained on.
    """
    release(trainee.model)
    at = None if is_quantised(spec, ctx.model_folder) else torch.device("cpu")
    base = load_base(spec, ctx.model_folder, ctx.device, at=at)
    return with_trained(base.model, trainee.model.peft_config["default"], tensors)


def row_capacity(spec: JobSpec, base: BaseModel) -> int | None:
    """How many tokens a row takes: as many as there are where attention goes by document, else those of a sample at most; None
    where samples aren't packed. Raises ModelError where the model couldn't be trained right at all."""
    if not computes_its_logits(base.model):
        raise ModelError(
            f"base model {spec.model_details.base_model} ({base.model.config.model_type}) makes its logits in a way that isn't "
            "known here: it would be trained on a wrong loss.",
            field="model_details.base_model",
        )
    if not spec.dataset_config.preprocessing.packing:
        return None
    with heard() as by_edges:
        if not keeps_documents_apart(base.model):
            return None
    joins = by_edges == {True} and (base.family is None or base.family.joins)
    return NO_LIMIT if joins else spec.dataset_config.preprocessing.prompt.max_length


def make_trainable(base: BaseModel, spec: JobSpec, start: Path | None = None) -> Any:
    """The base, or an adapter around it, with all that is done to it in training."""
    hp = spec.train_config.hyperparameters
    if spec.train_config.train_type == "lora":
        model = add_adapter(base.model, spec, start)
        fuse(model)
    else:
        model = base.model
    if hp.gradient_checkpointing:
        base.model.activation_checkpointing_enable({"use_reentrant": False})
    if hp.neftune_noise_alpha:
        add_noise(base.model, hp.neftune_noise_alpha)
    return model
