"""Base and adapter as one model: plain weights under the base's own names, for transformers, vLLM and GGUF conversion alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from train_loop.model.load import DTYPES, dequantise_to
from train_loop.model.processor import save_processor
from train_loop.spec import JobSpec

SHARD_SIZE = "4GB"


def write_merged(folder: Path, spec: JobSpec, model: Any, tokenizer: Any, base_folder: Path) -> None:
    """Write the merged model, in torch_dtype, into the local `folder`. The model given is used up: it is merged in place.

    A quantised base is merged as it was trained on: each weight is dequantised, not replaced by the original one. The adapter
    has learned to make up for what quantisation took, so these weights give the logits of training, and on the original ones it
    would correct errors that aren't there.

    Takes one copy of the model in torch_dtype in the host's memory, made layer by layer: only one is in float32 at a time.
    """
    base = merged(model, DTYPES[spec.train_config.torch_dtype])
    # transformers undoes here what it renames and stacks when it loads, so that the files are like the base's.
    base.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    if spec.model_details.model_type == "vlm":
        save_processor(base_folder, folder)


@torch.no_grad()
def merged(model: Any, dtype: torch.dtype) -> Any:
    """The plain transformers model that the adapted one amounts to, on the CPU in `dtype`. Uses `model` up."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    dequantise_to(base, torch.float32)
    replaced = (ModulesToSaveWrapper, LoraLayer, *_quantised_types())
    names = [n for n, m in base.named_modules() if isinstance(m, replaced) and not n.endswith(".base_layer")]
    for name in names:
        module = base.get_submodule(name)
        if isinstance(module, ModulesToSaveWrapper):
            plain = module.modules_to_save["default"]
        elif isinstance(module, ParamWrapper):
            plain = module
            while isinstance(plain, ParamWrapper):  # one inside the other, each for one parameter
                parameter = getattr(plain.get_base_layer(), plain.parameter_name)
                parameter.data = parameter.data.float()
                plain.merge()
                parameter.data = parameter.data.to(device="cpu", dtype=dtype)
                plain = plain.base_layer
        elif isinstance(module, LoraLayer):
            plain = _plain_linear(module.get_base_layer(), _merged_weight(module), dtype)
        else:
            plain = _plain_linear(module, _dequantised(module), dtype)
        base.set_submodule(name, plain)
    # Configuration of what is no longer so.
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(base.config, attribute):
            delattr(base.config, attribute)
    base.hf_quantizer, base.is_quantized = None, False
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "_hf_peft_config_loaded", "quantization_method"):
        if hasattr(base, flag):
            setattr(base, flag, False)
    base.config.dtype = dtype
    # An adapter of the embeddings alone leaves the head as it was: what reads the configuration would tie them again.
    config, ends = base.config.get_text_config(), (base.get_input_embeddings().weight, base.get_output_embeddings().weight)
    if config.tie_word_embeddings and not (ends[0].shape == ends[1].shape and torch.equal(ends[0].cpu(), ends[1].cpu())):
        base.config.tie_word_embeddings = config.tie_word_embeddings = False
    return base.to(device="cpu", dtype=dtype)


def _merged_weight(layer: Any) -> torch.Tensor:
    """A layer's weight with its LoRA or DoRA, in float32 and in the base's own layout."""
    weight = _dequantised(layer.get_base_layer())
    changed: torch.Tensor = weight + layer.get_delta_weight("default").float().to(weight.device)
    magnitude = layer.lora_magnitude_vector
    if "default" not in magnitude:
        return changed
    out, rows = (1, (1, -1)) if getattr(layer, "fan_in_fan_out", False) else (0, (-1, 1))
    factor: torch.Tensor = magnitude["default"].weight.float() / torch.linalg.norm(changed, dim=1 - out)
    return changed * factor.view(rows)


def _dequantised(module: Any) -> torch.Tensor:
    from peft.utils.integrations import dequantize_module_weight

    weight: torch.Tensor = dequantize_module_weight(module).detach().float()
    return weight


def _quantised_types() -> tuple[Any, ...]:
    from train_loop.model.bits import Linear4bit, Linear8bitLt

    return Linear4bit, Linear8bitLt


def _plain_linear(module: Any, weight: torch.Tensor, dtype: torch.dtype) -> Any:
    """A module like `module` with this weight, in the host's memory."""
    plain = module
    if isinstance(module, _quantised_types()):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
        plain.bias = module.bias
    plain.weight = nn.Parameter(weight.to(device="cpu", dtype=dtype), requires_grad=False)
    return plain
