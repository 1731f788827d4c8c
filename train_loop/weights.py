"""What a run learns, whatever it trains: an adapter, or every weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from train_loop.layout import ADAPTER_WEIGHTS
from train_loop.sharding import placed_like, whole

MODEL = "model.safetensors"


def is_adapter(model: Any) -> bool:
    """Whether an adapter is trained; else every weight is."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by name, in an order that is the same on every rank.

    A tied weight comes once in a model, and under each of its names in an adapter, where PEFT looks for them.
    """
    named = model.named_parameters(remove_duplicate=not is_adapter(model))
    return {name: p for name, p in named if p.requires_grad}


def gathered(model: Any, *, keep: bool) -> dict[str, torch.Tensor]:
    """The trained tensors by name, each whole on the ranks that `keep` them. Collective."""
    return {name: whole(p.detach(), keep=keep) for name, p in trained(model).items()}


def handed_out(model: Any, *, keep: bool) -> dict[str, torch.Tensor]:
    """What a user gets, likewise: the trained tensors of an adapter, else every weight. Collective."""
    if is_adapter(model):
        return gathered(model, keep=keep)
    return {name: whole(p.detach(), keep=keep) for name, p in model.named_parameters()}


def write(folder: Path, model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write what `gathered` returned into the local folder: PEFT's layout for an adapter, else one file in float32."""
    from safetensors.torch import save_file

    if is_adapter(model):
        model.save_pretrained(folder, state_dict=dict(tensors), save_embedding_layers=False)
    else:
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / MODEL, {"format": "pt"})


@torch.no_grad()
def read(folder: Path, model: Any) -> None:
    """Put what `write` wrote into the model's parameters. Raises KeyError where they are others."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    into: Mapping[str, torch.Tensor] = trained(model)
    if is_adapter(model):
        # The same tensors by the names they have in the file.
        into = get_peft_model_state_dict(model, state_dict=dict(into), save_embedding_layers=False)
    with safe_open(folder / (ADAPTER_WEIGHTS if is_adapter(model) else MODEL), "pt") as file:
        if missing := into.keys() - file.keys():
            raise KeyError(min(missing))
        for name, tensor in into.items():
            tensor.copy_(placed_like(file.get_tensor(name), tensor))
