"""Token cross-entropy at supervised positions only, without ever holding `[batch, seq, vocab]` logits.

The head multiplies only the hidden states that carry a target, a chunk at a time, and each chunk's gradient is computed
in the forward pass, so one chunk of logits is alive at any moment.
Idea: Liger's fused linear cross-entropy (2024), Apple's cut cross-entropy (Wijmans et al., 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from train_loop.data.packing import MicroBatch
from train_loop.data.tokenize import IGNORE_INDEX

CHUNK_TOKENS = 256


class _HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies of `head(hidden) [n, vocab]` against `targets [n]`; the head is frozen."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: Any, targets: torch.Tensor, softcap: float | None) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            with torch.set_grad_enabled(gradient is not None):
                chunk = hidden[part].detach().requires_grad_(gradient is not None)
                logits = head(chunk).float()
                if softcap:
                    logits = torch.tanh(logits / softcap) * softcap
                loss = F.cross_entropy(logits, targets[part], reduction="sum")
                if gradient is not None:
                    (gradient[part],) = torch.autograd.grad(loss, chunk)
            total += loss.detach()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None


def supervised_loss(model: Any, micro: MicroBatch) -> torch.Tensor:
    """Sum (not mean) of cross-entropy over the micro-batch's supervised tokens, a float32 scalar.

    `model` is a PEFT causal LM or a plain one; `micro.labels` are already shifted.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal_lm.model(
        input_ids=micro.input_ids,
        attention_mask=micro.attention_mask,
        position_ids=micro.position_ids,
        use_cache=False,
    ).last_hidden_state
    supervised = micro.labels != IGNORE_INDEX
    softcap = getattr(causal_lm.config, "final_logit_softcapping", None)
    loss: torch.Tensor = _HeadLoss.apply(hidden[supervised], causal_lm.get_output_embeddings(), micro.labels[supervised], softcap)
    return loss
