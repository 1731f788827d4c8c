"""Where an adapter starts, when not at zero: at the base's principal part, at what quantisation lost, at another adapter.

None of these changes the base: what is saved is an adapter of the base as anyone loads it, and a resumed run, whose adapter comes
from its checkpoint, needs nothing undone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from train_loop.errors import ModelError
from train_loop.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

EXACT_SVD = 1024  # the smaller side, up to which a whole SVD takes well under a second
POWER_ITERATIONS = 16
INIT = "train_config.adapter_config.init"
INIT_FROM = "train_config.adapter_config.init_from"
# Of an adapter: what gives its numbers their meaning.
MEANING = ("r", "lora_alpha", "use_rslora", "use_dora")


def from_principal_part(model: Any, r: int) -> None:
    """PiSSA: let the first `r` of an adapter's 2r ranks be the principal part of the layer's weight, and train them alone.

    The other r ranks hold minus the same and stay so. Together they start at zero, and their sum with the base is what PiSSA
    trains: base - B0 A0 + B A. PEFT's PiSSA takes B0 A0 off the base instead, which a quantised base can't bear, and turns it
    into this same adapter of rank 2r when it saves.
    Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", 2024.
    """
    for _, layer, a, b, scale in _adapted(model):
        first, second = _largest_part(_weight(layer), r, scale)
        a.data.copy_(torch.cat([second, second]))
        b.data.copy_(torch.cat([first, -first], dim=1))
        a.register_hook(lambda g, r=r: torch.cat([g[:r], torch.zeros_like(g[r:])]))
        b.register_hook(lambda g, r=r: torch.cat([g[:, :r], torch.zeros_like(g[:, r:])], dim=1))


def from_quantisation_error(model: Any, r: int) -> None:
    """LoftQ: start at the best approximation of rank `r` of what quantisation took from each weight, as the base's files have it.

    One iteration, so that the base stays what anyone gets who quantises it. Layers that aren't quantised, as those of a vision
    tower, start as ever. Raises ModelError where a weight isn't in the files.
    Source: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023.
    """
    from peft.tuners.lora.dora import DoraLinearLayer

    from train_loop.model.bits import Linear4bit, Linear8bitLt

    quantised = [adapted for adapted in _adapted(model) if isinstance(adapted[1].get_base_layer(), Linear4bit | Linear8bitLt)]
    files = _files_by_weight(model.get_base_model(), {f"{name}.weight" for name, *_ in quantised})
    for name, layer, a, b, scale in quantised:
        original = _read(files, f"{name}.weight", _weight(layer).device)
        b_data, a_data = _largest_part(original - _weight(layer), r, scale)
        a.data.copy_(a_data)
        b.data.copy_(b_data)
        magnitude = layer.lora_magnitude_vector
        if "default" in magnitude:
            assert isinstance(magnitude["default"], DoraLinearLayer)
            norm = magnitude["default"].get_weight_norm(_weight(layer), b_data @ a_data, scale)
            magnitude["default"].weight.data.copy_(norm)


def continue_from(model: Any, folder: Path) -> None:
    """Give the fresh adapter the values of the one in `folder` (PEFT layout). Raises ModelError unless it is of the same make and
    for the same base."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    ours = model.peft_config["default"]
    try:
        theirs = json.loads((folder / ADAPTER_CONFIG).read_text())
        values = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError) as error:
        raise ModelError(f"init_from isn't an adapter that can be read: {type(error).__name__}.", field=INIT_FROM) from error
    if theirs.get("base_model_name_or_path") != ours.base_model_name_or_path:
        raise ModelError(
            f"init_from is an adapter of {theirs.get('base_model_name_or_path')}, and this job's base_model is "
            f"{ours.base_model_name_or_path}.",
            field=INIT_FROM,
        )
    if other := [name for name in MEANING if theirs.get(name, False) != getattr(ours, name)]:
        wanted = ", ".join(f"{name.removeprefix('lora_')} {theirs.get(name, False)}" for name in other)
        raise ModelError(f"init_from is an adapter with {wanted}: give this job's adapter_config the same.", field=INIT_FROM)
    mine = get_peft_model_state_dict(model, save_embedding_layers=False)
    differing = sorted(
        {n for n in values.keys() | mine.keys() if n not in values or n not in mine or values[n].shape != mine[n].shape}
    )
    if differing:
        raise ModelError(
            f"init_from adapts other layers than this job's targets and modules_to_save name: {differing[0]} and "
            f"{len(differing) - 1} more differ.",
            field=INIT_FROM,
        )
    set_peft_model_state_dict(model, values)


def _adapted(model: Any) -> Iterator[tuple[str, Any, torch.nn.Parameter, torch.nn.Parameter, float]]:
    """Each adapted layer: its name in the base, itself, A [r, in], B [out, r] and their product's scale."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if "default" not in layer.lora_A or not hasattr(layer.get_base_layer(), "weight"):
            raise ModelError(f"this init is for linear layers, and targets names {name}: use init default.", field=INIT)
        yield name, layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]


def _weight(layer: Any) -> torch.Tensor:
    """The weight [out, in] that an adapted layer computes with, in float32."""
    from peft.utils.integrations import dequantize_module_weight

    weight: torch.Tensor = dequantize_module_weight(layer.get_base_layer()).detach().float()
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight  # GPT-2's Conv1D has it the other way round


def _largest_part(weight: torch.Tensor, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """B [out, r] and A [r, in], of equal size, whose scaled product is the best approximation of `weight` of rank `r`.

    Exact for small layers; for others by power iteration on twice as many vectors, which takes seconds where the whole
    decomposition takes minutes.
    """
    if min(weight.shape) <= EXACT_SVD:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=min(2 * r, *weight.shape), niter=POWER_ITERATIONS)
        vh = v.T
    b, a = torch.zeros(weight.shape[0], r, device=weight.device), torch.zeros(r, weight.shape[1], device=weight.device)
    k = min(r, len(s))  # a rank above the layer's own leaves zeros
    root = (s[:k] / scale).sqrt()
    b[:, :k], a[:k] = u[:, :k] * root, root[:, None] * vh[:k]
    return b, a


def _files_by_weight(base: Any, names: set[str]) -> dict[str, tuple[Path, str]]:
    """Of each of these weights of a loaded base the file that it came from, and its name there: older files have other names."""
    from safetensors import safe_open
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    # Kept by transformers with what it has read, for when it writes it again.
    steps = getattr(base, "_weight_conversions", None) or []
    renamings, converters = ([s for s in steps if isinstance(s, kind)] for kind in (WeightRenaming, WeightConverter))
    known = dict.fromkeys(names, True)
    found: dict[str, tuple[Path, str]] = {}
    for path in sorted(Path(base.name_or_path).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dict
                name, made_of = rename_source_key(key, renamings, converters, base.base_model_prefix, known)
                if made_of is None:  # else it is a part of the weight, or turned
                    found[name] = path, key
    return found


def _read(files: dict[str, tuple[Path, str]], name: str, device: torch.device) -> torch.Tensor:
    from safetensors import safe_open

    if name not in files:
        raise ModelError(f"init loftq needs the original weight of {name}, which the base's files don't have.", field=INIT)
    path, key = files[name]
    with safe_open(path, "pt") as file:
        weight: torch.Tensor = file.get_tensor(key)
    return weight.to(device).float()
