"""LoRA adapters, through PEFT, so that any tool can load what we save."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from train_loop.errors import ModelError
from train_loop.model.initial import continue_from, from_principal_part, from_quantisation_error
from train_loop.model.load import learning_part
from train_loop.model.vision import Family
from train_loop.spec import AdapterConfig, Freeze, JobSpec, TrainConfig

ALL_LINEAR = ["all-linear"]
TARGETS = "train_config.adapter_config.targets"
MODULES_TO_SAVE = "train_config.adapter_config.modules_to_save"
ROUTERS = ("router", "gate", "shared_expert_gate")  # which expert a token goes to; trained, they collapse onto a few experts
MAX_NAMES_TOLD = 12
FROZEN = Freeze()


def rank(adapter: AdapterConfig) -> int:
    """The rank of the adapter as it is trained and saved. PiSSA's is twice the one asked for: see from_principal_part."""
    return 2 * adapter.r if adapter.init == "pissa" else adapter.r


def linear_layers(base: Any, freeze: Freeze = FROZEN) -> dict[str, Any]:
    """What "all-linear" adapts, by name: every linear layer of the language model but the head and the routers of experts, and
    those of the vision tower and the aligner that aren't frozen.

    Experts that are slices of one 3-D parameter (transformers 5 keeps those of a mixture so) aren't layers, so all-linear leaves
    them as they are: an adapter on each would often be larger than the rest of the adapter together, takes no dropout, and few
    servers load it. Who wants it names the parameters in `targets`, such as experts.gate_up_proj and experts.down_proj.
    """
    from transformers.pytorch_utils import Conv1D

    head = base.get_output_embeddings()
    return {
        name: module
        for name, module in learning_part(base, freeze).items()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and not isinstance(module, NonDynamicallyQuantizableLinear)  # torch's own attention reads its weight and never calls it
        and module is not head
        and name.rpartition(".")[2] not in ROUTERS
    }


def expert_parameters(base: Any) -> dict[str, torch.nn.Parameter]:
    """Linear layers of many experts, stacked into one parameter [experts, in, out] (or out, in), by name."""
    return {name: p for name, p in base.named_parameters() if p.ndim == 3 and "experts" in name.split(".")}


def is_named(name: str, targets: list[str]) -> bool:
    """Whether one of the `targets` is `name` or a suffix of it, in whole parts."""
    return any(name == t or name.endswith(f".{t}") for t in targets)


def named(base: Any, targets: list[str], freeze: Freeze = FROZEN) -> dict[str, Any]:
    """The modules that `targets` names, by their whole names, of the language model and of what else isn't frozen.

    PEFT is given these: by a suffix it would find those of a frozen vision tower too, and as modules_to_save whatever ends in
    the same letters.
    """
    return {name: module for name, module in learning_part(base, freeze).items() if is_named(name, targets)}


def lora_config(adapter: AdapterConfig, base: Any, base_model: str, freeze: Freeze = FROZEN) -> Any:
    """PEFT's configuration for ours. Raises ModelError when a name in it isn't of this model."""
    from peft import LoraConfig

    layers, parameters = _targets(adapter.targets, base, base_model, freeze)
    saved = _saved(adapter.modules_to_save or [], base, freeze)
    _check_learns(base, freeze, [*layers, *saved])
    # One pair of parameters where the base has one, so that the merged model is tied as its base is.
    tied = bool(base.config.get_text_config().tie_word_embeddings) and any(name in saved for name in _embedding_names(base))
    r = rank(adapter)
    # The scale is the one of the rank asked for: alpha / r, or alpha / sqrt(r).
    alpha = adapter.alpha * (r / adapter.r) ** (0.5 if adapter.use_rslora else 1.0)
    return LoraConfig(
        r=r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=layers,
        target_parameters=parameters or None,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        init_lora_weights="gaussian" if adapter.init == "gaussian" else True,
        modules_to_save=saved or None,
        ensure_weight_tying=tied,
        bias="none",
        task_type="CAUSAL_LM",
    )


def add_adapter(base: Any, spec: JobSpec, start: Path | None = None) -> Any:
    """Wrap `base` with a fresh adapter in float32, initialised from the job's seed: the same on every rank.

    `start` is the folder of the adapter that init_from names. Raises ModelError when the adapter doesn't fit this model, or
    `start` this job.
    """
    adapter = spec.train_config.adapter_config
    config = lora_config(adapter, base, spec.model_details.base_model, spec.train_config.freeze)
    torch.manual_seed(spec.train_config.hyperparameters.seed)
    try:
        model = _wrapped(base, config)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"the adapter doesn't fit {spec.model_details.base_model}: {str(error).splitlines()[0][:300]}",
            field=TARGETS,
        ) from error
    for parameter in trainable(model):
        parameter.data = parameter.data.float()
    # The name users asked for, not the folder it happened to be loaded from.
    model.peft_config["default"].base_model_name_or_path = spec.model_details.base_model
    model.peft_config["default"].revision = spec.model_details.revision
    if adapter.init == "pissa":
        from_principal_part(model, adapter.r)
    elif adapter.init == "loftq":
        from_quantisation_error(model, adapter.r)
    if start is not None:
        continue_from(model, start)
    return model


def with_trained(base: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Wrap `base` with an adapter that has been trained before: PEFT's configuration of it, and its tensors by name."""
    model = _wrapped(base, config)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            parameter.data = tensors[name].to(parameter.device)
    return model


def _wrapped(base: Any, config: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        # Said of all parameters of a wrapped module, and of a tied pair that stays tied.
        warnings.filterwarnings("ignore", message=".*tie.*", category=UserWarning)
        return get_peft_model(base, config, autocast_adapter_dtype=True)


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """The parameters that learn, in an order that is the same on every rank."""
    return [p for p in model.parameters() if p.requires_grad]


def parameter_groups(model: Any, config: TrainConfig) -> list[dict[str, Any]]:
    """The trainable parameters as the optimizer takes them: `lr_factor` times the schedule's rate is a group's own.

    LoRA+ trains B faster than A. Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024.
    """
    hp, ratio = config.hyperparameters, config.adapter_config.lora_plus_ratio or 1.0
    rates = hp.vision_learning_rate, hp.aligner_learning_rate
    family = Family.of(model.config) if any(rates) else None

    def factor(name: str) -> float:
        of_layer = ratio if "lora_B" in name or "lora_embedding_B" in name else 1.0
        if family is None:
            return of_layer
        rate = rates[0] if family.is_of_tower(name) else rates[1] if family.is_of_aligner(name) else None
        return of_layer * (rate or hp.learning_rate) / hp.learning_rate

    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(factor(name), []).append(parameter)
    return [{"params": parameters, "lr_factor": by} for by, parameters in groups.items()]


def _check_learns(base: Any, freeze: Freeze, layers: list[str]) -> None:
    """Raise ModelError where a part isn't frozen and has none of the `layers`: it would learn nothing."""
    family = None if freeze.vision and freeze.aligner else Family.of(base.config)
    if family is None:
        return
    for part, learns, is_of in (
        ("vision", not freeze.vision, family.is_of_tower),
        ("aligner", not freeze.aligner, family.is_of_aligner),
    ):
        if learns and not any(is_of(name) for name in layers):
            where = " or ".join(name.rpartition(".")[2] for name in (family.aligner if part == "aligner" else (family.tower,)))
            raise ModelError(
                f"{part} isn't frozen, and the adapter has no layer in it: freeze it, name layers of it in targets, or name "
                f"{where} in modules_to_save to train it whole.",
                field=f"train_config.freeze.{part}",
            )


def _targets(targets: list[str], base: Any, base_model: str, freeze: Freeze) -> tuple[list[str], list[str]]:
    """The names of layers and of experts' parameters to adapt, as PEFT takes them."""
    if targets == ALL_LINEAR:
        return list(linear_layers(base, freeze)), []
    head, experts = base.get_output_embeddings(), expert_parameters(base)
    for target in targets:
        found = named(base, [target], freeze)
        if any(module is head for module in found.values()):
            raise ModelError(
                f"targets names the head ({target}), which has no adapter: train it whole by modules_to_save.", field=TARGETS
            )
        if not found and not any(is_named(name, [target]) for name in experts):
            there = sorted({name.rpartition(".")[2] for name in linear_layers(base, freeze)} | {_tail(n) for n in experts})
            raise ModelError(
                f"the adapter doesn't fit {base_model}: no layer is named {target}; "
                f"there are {', '.join(there[:MAX_NAMES_TOLD])}.",
                field=TARGETS,
            )
    parameters = [t for t in targets if any(is_named(name, [t]) for name in experts)]
    return list(named(base, [t for t in targets if t not in parameters], freeze)), parameters


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _saved(names: list[str], base: Any, freeze: Freeze) -> list[str]:
    """The whole names of what modules_to_save names."""
    for name in names:
        found = named(base, [name], freeze).values()
        if not found:
            message = f"modules_to_save names no module of {base.config.model_type}: {name}."
            raise ModelError(message, field=MODULES_TO_SAVE)
        if any(not p.is_floating_point() for module in found for p in module.parameters()):
            raise ModelError(
                f"modules_to_save names a quantised module ({name}), which can't be trained: leave it out, or quantization.",
                field=MODULES_TO_SAVE,
            )
    return list(named(base, names, freeze))


def _embedding_names(base: Any) -> list[str]:
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    return [name for name, module in base.named_modules() if any(module is end for end in ends)]
