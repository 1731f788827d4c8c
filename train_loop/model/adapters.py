"""LoRA adapters, through PEFT, so that any tool can load what we save."""

from __future__ import annotations

from typing import Any

import torch

from train_loop.errors import ModelError
from train_loop.spec import AdapterConfig, JobSpec


def lora_config(adapter: AdapterConfig) -> Any:
    """PEFT's configuration for ours. "all-linear" is every linear layer but the head."""
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules="all-linear" if adapter.targets == ["all-linear"] else list(adapter.targets),
        use_rslora=adapter.use_rslora,
        init_lora_weights="gaussian" if adapter.init == "gaussian" else True,
        bias="none",
        task_type="CAUSAL_LM",
    )


def add_adapter(base: Any, spec: JobSpec) -> Any:
    """Wrap `base` with a fresh adapter in float32, initialised from the job's seed: the same on every rank.

    Raises ModelError when a target names no module of this model.
    """
    from peft import get_peft_model

    torch.manual_seed(spec.train_config.hyperparameters.seed)
    try:
        model = get_peft_model(base, lora_config(spec.train_config.adapter_config), autocast_adapter_dtype=True)
    except ValueError as error:
        raise ModelError(
            f"the adapter doesn't fit {spec.model_details.base_model}: {str(error).splitlines()[0][:300]}",
            field="train_config.adapter_config.targets",
        ) from error
    # The name users asked for, not the folder it happened to be loaded from.
    model.peft_config["default"].base_model_name_or_path = spec.model_details.base_model
    return model


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """The parameters that learn, in an order that is the same on every rank."""
    return [p for p in model.parameters() if p.requires_grad]
