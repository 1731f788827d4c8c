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
LEAK = 1e-2  # rounding is less, in bf16 too


class _HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies of `head(hidden) [n, vocab]` against `targets [n]`; `weights` are the head's that are trained."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Any, targets: torch.Tensor, softcap: float | None, *weights: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if any(ctx.needs_input_grad) else None
        of_weights = [torch.zeros_like(w) for w in weights] if gradient is not None else []
        for start in range(0, len(targets), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            with torch.set_grad_enabled(gradient is not None):
                chunk = hidden[part].detach().requires_grad_(gradient is not None)
                logits = head(chunk).float()
                if softcap:
                    logits = torch.tanh(logits / softcap) * softcap
                loss = F.cross_entropy(logits, targets[part], reduction="sum")
                if gradient is not None:
                    gradient[part], *parts = torch.autograd.grad(loss, (chunk, *weights))
                    for sum_, part_ in zip(of_weights, parts, strict=True):
                        sum_ += part_
            total += loss.detach()
        if gradient is not None:
            ctx.save_for_backward(gradient, *of_weights)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, *of_weights = ctx.saved_tensors
        times = [g * grads[0].to(g.dtype) for g in (gradient, *of_weights)]
        return times[0], None, None, None, *times[1:]


def supervised_loss(model: Any, micro: MicroBatch) -> torch.Tensor:
    """Sum (not mean) of cross-entropy over the micro-batch's supervised tokens, a float32 scalar.

    `model` is a PEFT causal LM or a plain one; `micro.labels` are already shifted.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = _hidden(causal_lm, micro.input_ids, micro.position_ids, micro.attention_mask)
    supervised = micro.labels != IGNORE_INDEX
    softcap = getattr(causal_lm.config.get_text_config(), "final_logit_softcapping", None)
    head = causal_lm.get_output_embeddings()
    trained = [p for p in head.parameters() if p.requires_grad]
    loss: torch.Tensor = _HeadLoss.apply(hidden[supervised], head, micro.labels[supervised], softcap, *trained)
    return loss


@torch.no_grad()
def keeps_documents_apart(causal_lm: Any) -> bool:
    """Whether positions that start again at 0 keep this model's attention inside a document: not every architecture of
    transformers builds its mask from them (Falcon doesn't)."""
    device = causal_lm.get_input_embeddings().weight.device
    ids = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]], device=device)  # two rows that differ in their first document
    one, other = _hidden(causal_lm, ids, torch.tensor([[0, 1, 0, 1]] * 2, device=device), None).float()
    apart = (one - other).abs().amax(dim=-1)
    return bool(apart[2:].max() <= LEAK * apart[:2].max())


def _hidden(causal_lm: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[rows, seq, hidden], what the head multiplies."""
    # `base_model` is what the architecture calls its model, or its transformer.
    hidden: torch.Tensor = causal_lm.base_model(
        input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    return hidden
