"""The useful work of LoRA training, and how fast this machine multiplies: together they say how near a loop is to the limit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRIES = 5


@dataclass(frozen=True)
class Shape:
    """What a Llama-like decoder multiplies: linear layers (in, out) of one block, those that read its input, and the widths."""

    block: list[tuple[int, int]]
    first: list[tuple[int, int]]  # q, k and v: in the first block they read embeddings, which need no gradient
    num_blocks: int
    attention: int  # heads x their width
    hidden: int
    vocab: int

    @classmethod
    def of(cls, folder: Path) -> Shape:
        """By the model in `folder`."""
        from transformers import AutoConfig

        return cls.of_config(AutoConfig.from_pretrained(folder))

    @classmethod
    def of_config(cls, c: Any) -> Shape:
        """By the model's configuration."""
        width = c.head_dim or c.hidden_size // c.num_attention_heads
        heads, kv = c.num_attention_heads * width, c.num_key_value_heads * width
        first = [(c.hidden_size, heads), (c.hidden_size, kv), (c.hidden_size, kv)]
        mlp = [(c.hidden_size, c.intermediate_size)] * 2 + [(c.intermediate_size, c.hidden_size)]
        block = [*first, (heads, c.hidden_size), *mlp]
        return cls(block, first, c.num_hidden_layers, heads, c.hidden_size, c.vocab_size)


def useful_flops(shape: Shape, documents: Sequence[tuple[int, int]], r: int) -> dict[str, int]:
    """FLOPs, by part, that one step of LoRA of rank `r` on every linear can't do without; documents are (tokens, supervised).

    Forward and gradients of inputs and adapters: frozen weights get none. The head only where there is a target, attention only
    inside a document and to what comes before. Padding, masked halves and recomputation aren't useful.
    """
    tokens = sum(length for length, _ in documents)
    pairs = sum(length * (length + 1) // 2 for length, _ in documents)
    weights = shape.num_blocks * sum(i * o for i, o in shape.block)
    ends = shape.num_blocks * sum(i + o for i, o in shape.block)
    return {
        "linear": 2 * tokens * (2 * weights - sum(i * o for i, o in shape.first)),
        "adapter": 2 * tokens * r * (3 * ends - sum(i for i, _ in shape.first)),
        "head": 4 * sum(supervised for _, supervised in documents) * shape.hidden * shape.vocab,
        # Two products forward and four backward, of 2 FLOPs a pair and unit of width.
        "attention": 12 * pairs * shape.attention * shape.num_blocks,
    }


def gemm_limit(shape: Shape, tokens: int, device: torch.device) -> dict[str, float]:
    """FLOP/s by dtype of torch's own products of the model's shapes with `tokens` rows, forward and input gradients, each at its
    best."""
    return {name: _rate(shape, tokens, dtype, device) for name, dtype in DTYPES.items()}


def _rate(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    flops, seconds = 0, 0.0
    for (i, o), count in Counter(shape.block).items():
        weight, x, y = (torch.randn(*size, dtype=dtype, device=device) for size in ((o, i), (tokens, i), (tokens, o)))
        flops += count * 4 * tokens * i * o
        seconds += count * (_best(F.linear, x, weight) + _best(torch.mm, y, weight))
    return flops / seconds


def _best(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> float:
    times = []
    for _ in range(TRIES):
        _finish(a.device)
        started = time.perf_counter()
        multiply(a, b)
        _finish(a.device)
        times.append(time.perf_counter() - started)
    return min(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
