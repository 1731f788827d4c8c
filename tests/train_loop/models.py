"""Tiny random base models of every architecture that is promised, and runs of a job on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from train_loop.__main__ import Console
from train_loop.data.tokenize import ChatTokenizer
from train_loop.launch import launch_local
from train_loop.model.load import auto_class
from train_loop.run_files import Keys, RunFiles
from train_loop.spec import JobSpec

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# By what differs: the name of the configuration's class, and its fields on top of SIZES.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "smollm": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "gemma2": ("Gemma2Config", {"tie_word_embeddings": True, "sliding_window": 24, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"tie_word_embeddings": True, "sliding_window": 24, "query_pre_attn_scalar": 8}),
    "cohere": ("CohereConfig", {"tie_word_embeddings": True, "head_dim": None, "logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"head_dim": None, "logits_scaling": 8.0}),
    "phi3": ("Phi3Config", {"original_max_position_embeddings": 512}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None, "ffn_hidden_size": 64}),
}
# Models that see: the language model and the vision tower name their layers alike.
VISION: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": ("LlavaConfig", "llama", {"vision_feature_layer": -1}),
    "smolvlm": ("SmolVLMConfig", "llama", {"scale_factor": 2}),
    "gemma3_vision": ("Gemma3Config", "gemma3_text", {"mm_tokens_per_image": 1}),
}
TOWER = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def make_base(name: str, mirror: Path, tokenizer: Any) -> str:
    """Put a random model of the architecture into `mirror`; return its id."""
    return save_base(config_of(name, len(tokenizer)), name, mirror, tokenizer)


def config_of(name: str, vocab_size: int) -> Any:
    """The configuration of a tiny model of the architecture."""
    import transformers

    sizes = SIZES | {"vocab_size": vocab_size}
    if name in VISION:
        kind, text, changes = VISION[name]
        fields = {"text_config": sizes | {"model_type": text}, "vision_config": TOWER, "image_token_id": 0} | changes
    else:
        kind, changes = ARCHITECTURES[name]
        fields = {k: v for k, v in (sizes | changes).items() if v is not None}
    return getattr(transformers, kind)(**fields)


def save_base(config: Any, name: str, mirror: Path, tokenizer: Any) -> str:
    """Put a random model of this configuration into `mirror`; return its id."""
    folder = mirror / "tuneyard" / name
    random_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"tuneyard/{name}"


def random_model(config: Any) -> Any:
    """A model of this configuration, always the same."""
    torch.manual_seed(0)
    model = auto_class(config).from_config(config)
    for n, p in model.named_parameters():
        if p.ndim > 1:  # large enough to matter: transformers' own 0.02 makes attention all but uniform
            torch.nn.init.normal_(p, std=0.3 if "embed" not in n else 0.5)
    return model


def run(job: dict[str, Any], tmp_path: Path, mirror: Path, name: str = "run", monitor: Any = None) -> dict[str, Any]:
    """Run the job in this process, into `tmp_path / name`; its manifest."""
    return run_with(Keys(), job, tmp_path, mirror, name, monitor)


def run_with(keys: Keys, job: dict[str, Any], tmp_path: Path, mirror: Path, name: str, monitor: Any = None) -> dict[str, Any]:
    """The same, with keys of its sources."""
    files = RunFiles(str(tmp_path / name), str(mirror), lambda: keys)
    return launch_local(JobSpec.model_validate(job), name, files, monitor or Console())


def samples(tokenizer: Any, lengths: tuple[int, ...] = (3, 9, 5, 20)) -> list[Any]:
    """Tokenised conversations, their answers of so many words."""
    prompt = JobSpec.model_fields["dataset_config"].default_factory().preprocessing.prompt  # type: ignore[union-attr,misc]
    chat = ChatTokenizer(tokenizer, prompt, "right", "assistant")
    said = (" ".join(f"word{i * j % 7}" for j in range(i)) for i in lengths)
    return [chat.encode({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": s}]}) for s in said]
