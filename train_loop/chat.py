"""One prompt, two answers: the base model's and the trained one's, with an adapter from one copy of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train_loop.data.image_tokens import ImageTokens
from train_loop.data.images import Picture
from train_loop.data.tokenize import ChatTokenizer
from train_loop.layout import ADAPTER_CONFIG
from train_loop.model.load import auto_class, compute_dtype, quantised_by, quieten
from train_loop.model.processor import load_processor
from train_loop.model.tokenizer import load_tokenizer
from train_loop.model.vision import Family
from train_loop.spec import ModelDetails, Prompt


@dataclass(frozen=True)
class Comparison:
    """A base model and a trained one, which are the same one where an adapter can be switched off."""

    base: Any
    tuned: Any
    chat: ChatTokenizer

    @classmethod
    def load(cls, base_folder: Path, trained_folder: Path, details: ModelDetails, prompt: Prompt) -> Comparison:
        """Load both, quantised as in training; `trained_folder` holds an adapter or a whole model, `details` and `prompt` are the
        job's."""
        quieten()
        from peft import PeftModel
        from transformers import AutoConfig

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype, _ = compute_dtype("bfloat16", device)
        sees = details.model_type == "vlm"

        def load(folder: Path) -> Any:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return (
                auto_class(config, images=sees)
                .from_pretrained(
                    folder,
                    dtype=dtype,
                    device_map={"": device},
                    use_safetensors=True,
                    **quantised_by(details.quantization, dtype, Family.of(config) if sees else None),
                )
                .eval()
            )

        base, is_adapter = load(base_folder), (trained_folder / ADAPTER_CONFIG).is_file()
        if is_adapter:
            base = PeftModel.from_pretrained(base, trained_folder).eval()
        tokenizer = load_tokenizer(trained_folder)
        images = ImageTokens(load_processor(trained_folder, tokenizer)) if sees else None
        chat = ChatTokenizer(tokenizer, prompt, "right", "assistant", images)
        return cls(base, base if is_adapter else load(trained_folder), chat)

    def asked(self, prompt: str, pictures: Sequence[Picture] = ()) -> Any:
        """What a question is to the model, as in training: behind the job's system message, if it has one, and the pictures."""
        options = {"add_generation_prompt": True, "tokenize": True, "return_tensors": "pt", "return_dict": True}
        if self.chat.images is None:
            messages = self.chat.with_system([{"role": "user", "content": prompt}])
            return self.chat.tokenizer.apply_chat_template(messages, **options).to(self.base.device)
        shown = [{"type": "image", "image": picture.open()} for picture in pictures]
        messages = self.chat.with_system([{"role": "user", "content": [*shown, {"type": "text", "text": prompt}]}])
        for message in messages:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        inputs = self.chat.images.processor.apply_chat_template(messages, chat_template=self.chat.prompt.template, **options)
        return inputs.to(self.base.device, self.base.dtype)

    @torch.no_grad()
    def answer(self, prompt: str, max_new_tokens: int, pictures: Sequence[Picture] = ()) -> tuple[str, str]:
        """Greedy answers of the base and of the trained model."""
        inputs, tokenizer = self.asked(prompt, pictures), self.chat.tokenizer

        def generate(model: Any) -> str:
            pad = tokenizer.pad_token_id
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
            text: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            return text.strip()

        with self.base.disable_adapter() if self.base is self.tuned else contextlib.nullcontext():
            base = generate(self.base)
        return base, generate(self.tuned)
