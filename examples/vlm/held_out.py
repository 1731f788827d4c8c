"""How often a model answers a zip of examples/vlm/draw.py as it should: by transformers alone, as anyone would load it."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

BATCH_SIZE = 50


def load(model: Path, processor: Path) -> tuple[Any, Any]:
    """The model, and the processor of a folder."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    made = AutoProcessor.from_pretrained(processor)
    made.tokenizer.padding_side = "left"
    return AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval(), made


def rows_of(path: Path) -> list[tuple[Any, str, str]]:
    """Picture, question and answer of each row."""
    from PIL import Image

    rows = []
    with zipfile.ZipFile(path) as archive:
        for line in archive.read("train.jsonl").splitlines():
            row = json.loads(line)
            asked, answered = (turn["value"] for turn in row["conversations"])
            with archive.open(row["image"]) as file:
                rows.append((Image.open(file).convert("RGB"), asked.removeprefix("<image>"), answered))
    return rows


def asked(processor: Any, rows: list[tuple[Any, str, str]]) -> Any:
    """The questions as the model gets them, answers left out."""
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
        for picture, question, _ in rows
    ]
    return processor.apply_chat_template(
        talks,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def answers(model: Any, processor: Any, rows: list[tuple[Any, str, str]]) -> list[str]:
    """What the model says to each row, greedily."""
    import torch

    said: list[str] = []
    for first in range(0, len(rows), BATCH_SIZE):
        inputs = asked(processor, rows[first : first + BATCH_SIZE])
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in said]


def share_right(said: list[str], rows: list[tuple[Any, str, str]]) -> float:
    """The share of the rows that are answered in the very word."""
    return sum(answer == right for answer, (_, _, right) in zip(said, rows, strict=True)) / len(rows)


def share_guessed(rows: list[tuple[Any, str, str]]) -> float:
    """What who doesn't look at the pictures can reach: to each question its most common answer."""
    of_question: dict[str, Counter[str]] = {}
    for _, question, answer in rows:
        of_question.setdefault(question, Counter())[answer] += 1
    return sum(max(counts.values()) for counts in of_question.values()) / len(rows)
