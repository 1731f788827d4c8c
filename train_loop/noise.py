"""NEFTune: uniform noise on the input embeddings while training.

Its size is alpha / sqrt(tokens * width) with the tokens of the document, so that packing doesn't change it.
Source: Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", 2023.
"""

from __future__ import annotations

from typing import Any

import torch


def add_noise(causal_lm: Any, alpha: float) -> None:
    """Have the model add noise to its embeddings in training mode, drawn from torch's own generator.

    It is added where tokens are looked up: a model that sees tells its images' places by the tokens themselves.
    """
    tokens = torch.empty(0)  # of each position's document

    def measure(backbone: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal tokens
        positions = named["position_ids"]
        tokens = document_lengths(positions[0] if positions.ndim == 3 else positions)  # the first of several is in the text

    def noisy(layer: Any, arguments: tuple[Any, ...], embeddings: torch.Tensor) -> torch.Tensor:
        if not causal_lm.training:
            return embeddings
        size = alpha / (tokens * embeddings.shape[-1]).sqrt().unsqueeze(-1)
        return embeddings + torch.empty_like(embeddings).uniform_(-1, 1) * size.to(embeddings.dtype)

    # As in loss.py: `base_model` is what the architecture calls its model, or its transformer.
    causal_lm.base_model.register_forward_pre_hook(measure, with_kwargs=True)
    causal_lm.get_input_embeddings().register_forward_hook(noisy)


def document_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """For each position[rows, seq] the tokens of its document; a document starts where positions start again at 0."""
    document = (position_ids == 0).flatten().cumsum(0) - 1
    return torch.bincount(document)[document].view_as(position_ids)
