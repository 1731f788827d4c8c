"""What a run learns, whatever it trains: an adapter, or every weight."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from train_loop.layout import ADAPTER_WEIGHTS
from train_loop.sharding import placed_like, whole

MODEL = "model.safetensors"
T = TypeVar("T")


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


def handed_out(model: Any, *, keep: bool) -> dict[str, torch.Tensor]:
    """What a user gets by name, each whole on the ranks that `keep` it: of an adapter what is trained, else every weight.
    Collective."""
    parameters = trained(model) if is_adapter(model) else dict(model.named_parameters())
    return {name: whole(p.detach(), keep=keep) for name, p in parameters.items()}


@dataclass(frozen=True)
class FileFormat:
    """How what a model learns lies in a folder: in PEFT's format for an adapter, else in one file, in float32."""

    names: dict[str, str]  # of the parameters, by those in the file
    config: Any  # PEFT's, of an adapter

    @classmethod
    def of(cls, model: Any) -> FileFormat:
        """The model's."""
        names = {name: name for name in trained(model)}
        if not is_adapter(model):
            return cls(names, None)
        config = copy.copy(model.peft_config["default"])
        config.inference_mode = True  # as PEFT saves it
        return cls(_named_by_peft(model, names), config)

    def write(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write whole tensors, by the parameters' names, into the local folder."""
        from safetensors.torch import save_file

        if self.config is not None:
            self.config.save_pretrained(folder)
        written: dict[str, torch.Tensor] = {}
        places = set[int]()
        for name, ours in self.names.items():
            tensor = tensors[ours].contiguous()
            written[name] = tensor.clone() if tensor.data_ptr() in places else tensor  # a tied weight has two names
            places.add(tensor.data_ptr())
        save_file(written, folder / (MODEL if self.config is None else ADAPTER_WEIGHTS), {"format": "pt"})


def _named_by_peft(model: Any, values: Mapping[str, T]) -> dict[str, T]:
    """What there is of each trained parameter of an adapter, by the parameter's name in its file."""
    from peft import get_peft_model_state_dict

    named: dict[str, T] = get_peft_model_state_dict(model, state_dict=dict(values), save_embedding_layers=False)
    return named


@torch.no_grad()
def read(folder: Path, model: Any) -> None:
    """Put what a `FileFormat` wrote into the model's parameters. Raises KeyError where they are others."""
    from safetensors import safe_open

    into: Mapping[str, torch.Tensor] = trained(model)
    if is_adapter(model):
        into = _named_by_peft(model, into)
    with safe_open(folder / (ADAPTER_WEIGHTS if is_adapter(model) else MODEL), "pt") as file:
        if missing := into.keys() - file.keys():
            raise KeyError(min(missing))
        for name, tensor in into.items():
            tensor.copy_(placed_like(file.get_tensor(name), tensor))
