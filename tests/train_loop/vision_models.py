"""Tiny random models of every family that sees, each with its processor and the published chat template."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from train_loop.model.mirror import VLM_TEMPLATE, VLM_TOKENS

PUBLISHED = Path(find_spec("trl").origin).parent / "chat_templates"  # type: ignore[union-attr,arg-type]
INTERNVL = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}\
{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}\
{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}\
{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"""
LLAVA = """\
{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
MLLAMA = """\
{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\
{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' %}{{ '<|image|>' }}{% elif content['type'] == 'text' %}{{ content['text'] | trim }}{% endif %}\
{% endfor %}{% endif %}{{ '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
TEXT = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
TOWER = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
CHATML = "<|im_end|>"
FAMILIES = ("idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "llava", "mllama")


def make(family: str, folder: Path, tokenizer: Any) -> None:
    """Put a random model of the family, with SmolLM2's tokens and the family's own, into `folder`."""
    globals()[f"_{family}"](folder, tokenizer)


def _tokenizer(source: Any, folder: Path, template: str, tokens: dict[str, str], more: tuple[str, ...] = (), **ends: str) -> Any:
    """A copy of `source` that knows more special tokens, some by a name of their own."""
    from transformers import AutoTokenizer

    source.save_pretrained(folder)
    made = AutoTokenizer.from_pretrained(folder, extra_special_tokens=tokens)
    made.add_special_tokens({**ends, "additional_special_tokens": [*more, *ends.values()]})  # type: ignore[dict-item]
    made.chat_template = template
    return made


def _save(config: Any, folder: Path) -> None:
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for name, p in model.named_parameters():
        if p.ndim > 1:  # large enough to matter, as in models.py
            torch.nn.init.normal_(p, std=0.2 if "embed" not in name else 0.5)
        elif "gate" in name:  # of cross-attention, which starts closed
            torch.nn.init.constant_(p, 0.7)
    model.save_pretrained(folder)


def _ids(tokenizer: Any, **named: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}


def _text(tokenizer: Any, kind: str, **changes: Any) -> dict[str, Any]:
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    return {"model_type": kind, "vocab_size": len(tokenizer)} | TEXT | ends | changes


def _describe(kind: str, folder: Path, images: Any, tokenizer: Any, **described: Any) -> None:
    """Write a processor's files; most processors themselves can't be made without torchvision."""
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": kind} | described))


def _idefics3(folder: Path, source: Any) -> None:
    _tiled("Idefics3", folder, source)


def _smolvlm(folder: Path, source: Any) -> None:
    _tiled("SmolVLM", folder, source)


def _tiled(kind: str, folder: Path, source: Any) -> None:
    """Images become tiles of 32 pixels, and the whole image as one more: 5 of a square one, of 4 tokens each."""
    import transformers

    tokenizer = _tokenizer(source, folder, VLM_TEMPLATE, {}, VLM_TOKENS, eos_token="<end_of_utterance>")
    images = getattr(transformers, f"{kind}ImageProcessorPil")(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    _describe(f"{kind}Processor", folder, images, tokenizer, image_seq_len=4)
    config = getattr(transformers, f"{kind}Config")(
        text_config=_text(tokenizer, "llama"),
        vision_config=TOWER | {"image_size": 32, "patch_size": 8},
        scale_factor=2,
        **_ids(tokenizer, image_token_id="<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    _save(config, folder)


def _qwen2_vl(folder: Path, source: Any) -> None:
    tower = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": 7}
    _qwen("Qwen2VL", folder, source, "qwen2_5_vl", tower, mrope_section=[1, 1, 2], type="mrope")


def _qwen2_5_vl(folder: Path, source: Any) -> None:
    tower = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 7, "window_size": 28}
    tower |= {"out_hidden_size": 32, "fullatt_block_indexes": [1]}
    _qwen("Qwen2_5_VL", folder, source, "qwen2_5_vl", tower, mrope_section=[1, 1, 2], type="mrope")


def _qwen3_vl(folder: Path, source: Any) -> None:
    tower = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 8}
    tower |= {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    _qwen("Qwen3VL", folder, source, "qwen3_vl", tower, mrope_section=[2, 1, 1], mrope_interleaved=True)


def _qwen(kind: str, folder: Path, source: Any, template: str, tower: dict[str, Any], **rope: Any) -> None:
    """Images keep their size, in tokens of 2 x 2 patches."""
    import transformers

    tokenizer = _tokenizer(source, folder, (PUBLISHED / f"{template}.jinja").read_text(), QWEN_TOKENS)
    side = 2 * tower["patch_size"]
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=tower["patch_size"], size={"shortest_edge": 4 * side**2, "longest_edge": 64 * side**2}
    )
    _describe(f"{kind}Processor", folder, images, tokenizer)
    text = _text(tokenizer, f"{template}_text" if kind != "Qwen2VL" else "qwen2_vl_text")
    config = getattr(transformers, f"{kind}Config")(
        text_config=text | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"} | rope},
        vision_config=tower,
        **_ids(tokenizer, **{f"{name}_id": token for name, token in QWEN_TOKENS.items()}),
    )
    _save(config, folder)


def _internvl(folder: Path, source: Any) -> None:
    """Images become tiles of 32 pixels, of 4 tokens each."""
    import transformers

    tokens = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = _tokenizer(source, folder, INTERNVL, tokens | {"video_token": "<video>"})
    images = transformers.GotOcr2ImageProcessorPil(
        crop_to_patches=True, min_patches=1, max_patches=4, size={"height": 32, "width": 32}
    )
    _describe("InternVLProcessor", folder, images, tokenizer, image_seq_length=4)
    config = transformers.InternVLConfig(
        text_config=_text(tokenizer, "qwen2"),
        vision_config=TOWER | {"image_size": [32, 32], "patch_size": [8, 8]},
        image_seq_length=4,
        tie_word_embeddings=False,
        **_ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    _save(config, folder)


def _gemma3(folder: Path, source: Any) -> None:
    """An image of any size is 4 tokens, which see each other."""
    import transformers

    tokens = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    template = (PUBLISHED / "gemma3.jinja").read_text()
    turns = ("<start_of_turn>", "<end_of_turn>")
    tokenizer = _tokenizer(source, folder, template, tokens, turns, bos_token="<bos>", eos_token="<end_of_turn>")
    images = transformers.Gemma3ImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )
    _describe("Gemma3Processor", folder, images, tokenizer, image_seq_length=4)
    layers = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma3Config(
        text_config=_text(tokenizer, "gemma3_text", **layers, query_pre_attn_scalar=8, tie_word_embeddings=True),
        vision_config=TOWER | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        **_ids(tokenizer, image_token_id="<image_soft_token>", boi_token_id="<start_of_image>", eoi_token_id="<end_of_image>"),
    )
    _save(config, folder)


def _llava(folder: Path, source: Any) -> None:
    """An image of any size is 16 tokens."""
    import transformers

    tokenizer = _tokenizer(source, folder, LLAVA, {"image_token": "<image>"})
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    _describe(
        "LlavaProcessor",
        folder,
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaConfig(
        text_config=_text(tokenizer, "llama"),
        vision_config=TOWER | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "projection_dim": 16},
        image_seq_length=16,
        **_ids(tokenizer, image_token_id="<image>"),
    )
    _save(config, folder)


def _mllama(folder: Path, source: Any) -> None:
    """An image is one token in the text, and up to four tiles that layers of their own look at."""
    import transformers

    tokens = {"image_token": "<|image|>"}
    more = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
    tokenizer = _tokenizer(source, folder, MLLAMA, tokens, more, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    images = transformers.MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4)
    _describe("MllamaProcessor", folder, images, tokenizer)
    vision = {k: v for k, v in TOWER.items() if k != "num_attention_heads"} | {"attention_heads": 2, "num_global_layers": 1}
    config = transformers.MllamaConfig(
        # Its embeddings have eight rows more than its head.
        text_config=_text(tokenizer, "mllama_text_model", num_hidden_layers=3, cross_attention_layers=[1]),
        vision_config=vision
        | {"image_size": 32, "patch_size": 8, "vision_output_dim": 32, "intermediate_layers_indices": [0], "max_num_tiles": 4},
        **_ids(tokenizer, image_token_id="<|image|>"),
    )
    _save(config, folder)
