"""Load a base model: safetensors only, no remote code, compute dtype by what the machine can do."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from train_loop.errors import ModelError, why_unloadable
from train_loop.model.attention import attend_by_document
from train_loop.model.norms import fuse_norms
from train_loop.model.tokenizer import BASE_MODEL
from train_loop.model.vision import FAMILIES, Family
from train_loop.spec import Freeze, JobSpec, Quantization

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
META = torch.device("meta")


@dataclass(frozen=True)
class BaseModel:
    """A base, frozen and ready for an adapter, or in float32 to be trained itself.

    `note` says where compute differs from what was asked, or is empty.
    """

    model: Any
    compute_dtype: torch.dtype
    note: str
    family: Family | None = None  # of a model that is to see


@cache
def cpu_has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 in hardware. Without, bf16 GEMMs run some 5-25 times slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def compute_dtype(requested: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in on `device` for the requested `torch_dtype`, and a note where the two differ.

    float16 is computed in bfloat16, or in float32 where that is slow: half precision needs its loss scaled and its overflows
    skipped to train, and holds no number that the other two don't. It stays the dtype of merged weights.
    """
    wanted = DTYPES[requested]
    if wanted is torch.float32:
        return wanted, ""
    machine = "CPU" if device.type == "cpu" else "GPU"
    has_units = cpu_has_bf16_units() if device.type == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
    if not has_units:
        return torch.float32, f"this {machine} has no bf16 units: computing in float32 (torch_dtype stays {requested})"
    if wanted is torch.float16:
        return torch.bfloat16, "float16 can't hold gradients unscaled: computing in bfloat16 (torch_dtype stays float16)"
    return wanted, ""


def quantised_by(quantization: Quantization | None, dtype: torch.dtype, family: Family | None = None) -> dict[str, Any]:
    """What from_pretrained is told. Nothing, not None, without: None has it forget that the files are quantised already."""
    return {"quantization_config": quantization_config(quantization, dtype, family)} if quantization else {}


def quantization_config(quantization: Quantization, dtype: torch.dtype, family: Family | None = None) -> Any:
    """bitsandbytes' settings; the same kernels run on CPU and GPU. What sees keeps its weights, which are few."""
    from transformers import BitsAndBytesConfig

    kept = {"llm_int8_skip_modules": ["lm_head", *family.parts]} if family is not None else {}
    if quantization.quant_bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, **kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        **kept,
    )


def quieten() -> None:
    """Keep the libraries from printing what a user can't act on: progress bars, a deprecated name that PEFT reads."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def quantised_layers(model: Any) -> list[Any]:
    """The model's 4-bit linear layers."""
    from train_loop.model.bits import Linear4bit

    return [m for m in model.modules() if isinstance(m, Linear4bit)]


def compute_in(base: Any, dtype: torch.dtype) -> None:
    """Have a frozen base compute in `dtype`: floating-point weights are cast, 4-bit ones dequantise to it."""
    for parameter in base.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    dequantise_to(base, dtype)


def dequantise_to(base: Any, dtype: torch.dtype) -> None:
    """Have 4-bit weights dequantise to `dtype` from now on."""
    for layer in quantised_layers(base):
        layer.compute_dtype = layer.weight.quant_state.dtype = dtype


def auto_class(config: Any, *, images: bool = False) -> Any:
    """What transformers builds and loads this architecture with: as a language model where it can be one without the part that
    sees, and no `images` are given; else as one that sees too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if images:
        return AutoModelForImageTextToText
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    return (
        AutoModelForImageTextToText if sees and type(config) not in AutoModelForCausalLM._model_mapping else AutoModelForCausalLM
    )


def language_part(model: Any) -> dict[str, Any]:
    """The modules that read and write text, by name: a model that sees has others too, such as its vision tower."""
    text = {*model.get_decoder().modules(), *model.get_output_embeddings().modules()}
    return {name: module for name, module in model.named_modules() if module in text}


def learning_part(model: Any, freeze: Freeze) -> dict[str, Any]:
    """The modules that a job may train, by name: those of the language model, and of what sees those that aren't frozen."""
    part = language_part(model)
    family = None if freeze.vision and freeze.aligner else Family.of(model.config)
    if family is not None:
        for name, module in model.named_modules():
            if (not freeze.vision and family.is_of_tower(name)) or (not freeze.aligner and family.is_of_aligner(name)):
                part[name] = module
    return part


def family_of(spec: JobSpec, config: Any) -> Family | None:
    """The family of a base that is to see; None for an llm's. Raises ModelError where it is none that is known."""
    if spec.model_details.model_type == "llm":
        return None
    family = Family.of(config)
    if family is None:
        known = ", ".join(f.name for f in FAMILIES.values())
        message = (
            f"base model {spec.model_details.base_model} ({config.model_type}) is of no family that trains on images: {known}."
        )
        raise ModelError(message, field=BASE_MODEL)
    return family


def is_quantised(spec: JobSpec, folder: Path) -> bool:
    """Whether the base will have quantised weights: asked for, or in its files. Raises ModelError."""
    return spec.model_details.quantization is not None or _in_quantised_files(_config(spec, folder))


def _in_quantised_files(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _config(spec: JobSpec, folder: Path) -> Any:
    """The base's configuration. Raises ModelError, also where it is quantised already and mustn't be."""
    from transformers import AutoConfig

    name = spec.model_details.base_model
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"base model {name} can't be loaded: {why_unloadable(error)}", field=BASE_MODEL) from error
    full = spec.train_config.train_type == "full"
    if _in_quantised_files(config) and (full or spec.model_details.quantization):
        remedy = "train an adapter" if full else "leave quantization out"
        raise ModelError(f"base model {name} is quantised already: {remedy}, or name the unquantised one.", field=BASE_MODEL)
    return config


def load_base(spec: JobSpec, folder: Path, device: torch.device, at: torch.device | None = None) -> BaseModel:
    """Load the base model, quantised when asked, to compute on `device`. Raises ModelError.

    Its weights are `at` another device, or nowhere (`META`: the model without them, which takes no memory).

    Every parameter is frozen; for full training those of the language model, and of what else isn't frozen, learn, in float32: in
    bf16 most updates would round to nothing.
    """
    from safetensors import SafetensorError

    from train_loop.model.bits import Linear4bit, Linear8bitLt

    quieten()
    dtype, note = compute_dtype(spec.train_config.torch_dtype, device)
    quantization = spec.model_details.quantization
    full = spec.train_config.train_type == "full"
    config = _config(spec, folder)
    family = family_of(spec, config)
    kind = auto_class(config, images=family is not None)
    # Quantised from float32, so that the 4-bit codes are the same whatever this machine computes in.
    kept_in = torch.float32 if quantization or full else dtype
    try:
        if at == META:
            with META:
                model = kind.from_config(config, dtype=kept_in, trust_remote_code=False)
        else:
            model = kind.from_pretrained(
                folder,
                dtype=kept_in,
                device_map={"": at or device},
                use_safetensors=True,
                trust_remote_code=False,
                **quantised_by(quantization, dtype, family),
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # the third: a kind of quantisation without its library
        name = spec.model_details.base_model
        raise ModelError(f"base model {name} can't be loaded: {why_unloadable(error)}", field=BASE_MODEL) from error
    if quantization and at != META and not any(isinstance(m, Linear4bit | Linear8bitLt) for m in model.modules()):
        name = f"{spec.model_details.base_model} ({config.model_type})"
        # Falcon's have a class of their own, which transformers passes over without an error.
        message = f"none of the layers of {name} can be quantised: leave quantization out."
        raise ModelError(message, field="model_details.quantization")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in learning_part(model, spec.train_config.freeze).values() if full else ():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)
    compute_in(model, dtype)
    attend_by_document(model)
    if device.type == "cuda":
        fuse_norms(model)
    if family is not None:
        family.prepare(model)
    if family is not None and not family.mixes:
        # Its images come in the dtype of its first weight, and trained embeddings in float32.
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.to(model.dtype))
    for module in quantised_layers(model):
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit layer the first time it runs in eval mode, and the repacked
        # kernel has no backward: training after an evaluation would silently use wrong gradients.
        module.support_avx512bf16_for_cpu = False
    for module in model.modules():
        if isinstance(module, Linear8bitLt) and module.weight.CB is not None:
            # As each forward does where the weight says so. Dequantised on a CPU (by DoRA), bitsandbytes 0.50 says so of a weight
            # that has lost its scales.
            module.init_8bit_state()
            module.init_8bit_state = lambda: None
    return BaseModel(model, dtype, note, family)
