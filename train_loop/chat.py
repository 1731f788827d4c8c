"""One prompt, two answers: the base model's and the adapted model's, from one copy of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train_loop.model.load import compute_dtype, load_tokenizer, quantization_config, quieten
from train_loop.spec import Quantization


@dataclass(frozen=True)
class Comparison:
    """A base model with an adapter that can be switched off."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, base_folder: Path, adapter_folder: Path, quantization: Quantization | None) -> Comparison:
        """Load both, quantised as in training."""
        quieten()
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype, _ = compute_dtype("bfloat16", device)
        base = AutoModelForCausalLM.from_pretrained(
            base_folder,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            quantization_config=quantization_config(quantization, dtype) if quantization else None,
        )
        return cls(PeftModel.from_pretrained(base, adapter_folder).eval(), load_tokenizer(adapter_folder))

    @torch.no_grad()
    def answer(self, prompt: str, max_new_tokens: int) -> tuple[str, str]:
        """Greedy answers of the base and of base + adapter."""
        inputs = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)

        def generate() -> str:
            pad = self.tokenizer.pad_token_id
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
            text: str = self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            return text.strip()

        with self.model.disable_adapter():
            base = generate()
        return base, generate()
