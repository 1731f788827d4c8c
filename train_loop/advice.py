"""What is worth a second look in a job, by its fields and its base's sizes alone: said before anything of it is read or run."""

from __future__ import annotations

from collections.abc import Iterator

from train_loop.spec import JobSpec

PREFERENCES = "sft trains on the preferred answers of preference rows and leaves the others out"
USUAL_LEARNING_RATE = {"lora": (1e-5, 1e-3), "full": (1e-6, 1e-4)}


def advice(spec: JobSpec, *, hidden: int | None, context: int | None) -> Iterator[str]:
    """A sentence for each such thing. `hidden` and `context` are the base's width and longest sample, where known."""
    hp, adapter, kind = spec.train_config.hyperparameters, spec.train_config.adapter_config, spec.train_config.train_type
    length = spec.dataset_config.preprocessing.prompt.max_length
    if context is not None and length > context:
        yield f"max_length {length} is more than the model's context, {context} tokens"
    if spec.dataset_details.dataset_format == "preference":
        yield PREFERENCES
    if kind == "lora" and hidden is not None and adapter.r > hidden:
        yield (f"adapter_config.r {adapter.r} is more than the model's hidden size {hidden}: full fine-tuning would be smaller")
    low, high = USUAL_LEARNING_RATE[kind]
    if not low <= hp.learning_rate <= high:
        what = "LoRA" if kind == "lora" else "full fine-tuning"
        yield f"learning_rate {hp.learning_rate:g} is outside what {what} usually wants, {low:g} to {high:g}"
