"""One prompt, two answers: the base model's and the adapted model's, from one copy of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train_loop.model.load import compute_dtype, load_tokenizer, quantization_config
from train_loop.spec import Quantization


def compare(
    base_folder: Path, adapter_folder: Path, prompt: str, max_new_tokens: int, quantization: dict[str, Any] | None
) -> tuple[str, str]:
    """Greedy answers to `prompt` of the base and of base + adapter, quantised as in training."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, _ = compute_dtype("bfloat16", device)
    tokenizer = load_tokenizer(adapter_folder)
    config = quantization_config(Quantization.model_validate(quantization), dtype) if quantization else None
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=dtype, device_map={"": device}, use_safetensors=True, quantization_config=config
    )
    model = PeftModel.from_pretrained(base, adapter_folder).eval()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)

    @torch.no_grad()
    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        text: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.strip()

    with model.disable_adapter():
        before = answer()
    return before, answer()
