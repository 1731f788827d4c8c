"""Token cross-entropy at supervised positions only, without ever holding `[batch, seq, vocab]` logits.

The head multiplies only the hidden states that carry a target, a chunk at a time, and each chunk's gradient is computed
in the forward pass, so one chunk of logits is alive at any moment.
Idea: Liger's fused linear cross-entropy (2024), Apple's cut cross-entropy (Wijmans et al., 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from train_loop.data.packing import MicroBatch
from train_loop.data.tokenize import IGNORE_INDEX

CHUNK_TOKENS = 256  # at least, and on a CPU
CHUNK_LOGITS = 2**28  # on a GPU, which is idle between small chunks: a GiB of them
EMPTY: Mapping[str, torch.Tensor] = {}
ROUNDING = 1e-2  # is less, in bf16 too


class _HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies of the head's logits of `hidden [n, width]` against `targets [n]`; `trained`: those of the head."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: Head, targets: torch.Tensor, *trained: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=_at_least_float32(hidden.dtype), device=hidden.device)
        learns = any(ctx.needs_input_grad)
        gradient = torch.empty_like(hidden) if learns else None
        of_trained = [torch.zeros_like(p) for p in trained] if learns else []
        size = chunk_tokens(head.vocab, hidden.device.type)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            with torch.set_grad_enabled(learns):
                chunk = hidden[part].detach().requires_grad_(learns)
                raw = head.layer(chunk)
            logits = head.bent(raw.detach())
            chosen = torch.arange(len(logits), device=logits.device), targets[part]
            log_shares = F.log_softmax(logits, dim=-1)
            total -= log_shares[chosen].sum()
            if gradient is not None:
                of_logits = log_shares.exp_()
                of_logits[chosen] -= 1
                of_raw = head.unbent(of_logits, logits).to(raw.dtype)
                gradient[part], *more = torch.autograd.grad(raw, [chunk, *trained], of_raw)
                for so_far, new in zip(of_trained, more, strict=True):
                    so_far += new
        if gradient is not None:
            ctx.save_for_backward(gradient, *of_trained)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, *of_trained = (saved * grads[0].to(saved.dtype) for saved in ctx.saved_tensors)
        return gradient, None, None, *of_trained


def chunk_tokens(vocab: int, device: str) -> int:
    """How many positions' logits are held at a time on a device of this type."""
    return CHUNK_TOKENS if device == "cpu" else max(CHUNK_TOKENS, CHUNK_LOGITS // vocab)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def supervised_loss(model: Any, micro: MicroBatch) -> torch.Tensor:
    """Sum (not mean) of cross-entropy over the micro-batch's supervised tokens, a float32 scalar.

    `model` is a PEFT causal LM or a plain one; `micro.labels` are already shifted.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    # A sharded model gathers its weights around a call of its own, see sharding.py.
    loss: torch.Tensor = causal_lm.gathered(_loss, micro) if hasattr(causal_lm, "gathered") else _loss(causal_lm, micro)
    return loss


def _loss(causal_lm: Any, micro: MicroBatch) -> torch.Tensor:
    labels = micro.labels.flatten()
    # Before the forward pass: how many there are is asked of a GPU, which would finish it first.
    supervised = (labels != IGNORE_INDEX).nonzero()[:, 0]
    hidden = _hidden(causal_lm, micro.input_ids, micro.position_ids, micro.attention_mask, micro.vision)
    return head_loss(hidden.flatten(0, 1).index_select(0, supervised), Head.of(causal_lm), labels[supervised])


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: a layer, what the architecture multiplies its output by, and where it bends it."""

    layer: torch.nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, causal_lm: Any) -> Head:
        """The model's. Each architecture has its own name for the scale: Cohere, Falcon-H1, Granite."""
        config = causal_lm.config.get_text_config()
        scale = getattr(config, "logit_scale", 1.0) * getattr(config, "lm_head_multiplier", 1.0)
        return cls(
            causal_lm.get_output_embeddings(),
            scale / getattr(config, "logits_scaling", 1.0),
            getattr(config, "final_logit_softcapping", None),
        )

    @property
    def vocab(self) -> int:
        """How many logits a token has."""
        return len(self.layer.weight)  # type: ignore[arg-type]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, vocab] of hidden[n, width], at least in float32."""
        return self.bent(self.layer(hidden))

    def bent(self, raw: torch.Tensor) -> torch.Tensor:
        """The logits, at least in float32, of what the layer says."""
        logits = raw.to(_at_least_float32(raw.dtype))
        if self.scale != 1:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def unbent(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gradient of what the layer says, of that of the logits."""
        if self.softcap:
            gradient = gradient * (1 - (logits / self.softcap).square())
        return gradient * self.scale if self.scale != 1 else gradient


def head_loss(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """Sum of cross-entropies of the head's logits against `targets`; hidden[n, width], targets[n]."""
    trained = [p for p in head.layer.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    loss: torch.Tensor = _HeadLoss.apply(hidden, head, targets, *trained)
    return loss


@torch.no_grad()
def computes_its_logits(causal_lm: Any) -> bool:
    """Whether `Head.of` is how this model gets its logits: an architecture may do something else to them."""
    ids = torch.tensor([[1, 2, 3, 4]], device=causal_lm.get_input_embeddings().weight.device)
    theirs = causal_lm(input_ids=ids, use_cache=False).logits.float()
    ours = Head.of(causal_lm).logits(_hidden(causal_lm, ids, torch.arange(4, device=ids.device)[None], None))
    return bool((ours - theirs).abs().max() <= ROUNDING * theirs.abs().max())


@torch.no_grad()
def keeps_documents_apart(causal_lm: Any) -> bool:
    """Whether positions that start again at 0 keep what this model sees inside a document: not every architecture of transformers
    builds its mask from them (Falcon doesn't), and a recurrent state (Jamba's) goes on over them."""
    if causal_lm._is_stateful:
        return False
    device = causal_lm.get_input_embeddings().weight.device
    ids = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]], device=device)  # two rows that differ in their first document
    one, other = _hidden(causal_lm, ids, torch.tensor([[0, 1, 0, 1]] * 2, device=device), None).float()
    apart = (one - other).abs().amax(dim=-1)
    # Attention gives nothing at all to what it doesn't see; experts and int8 layers round by what else is in the batch.
    rounding = ROUNDING if getattr(causal_lm, "is_quantized", False) else min(ROUNDING, 100 * torch.finfo(causal_lm.dtype).eps)
    return bool(apart[2:].max() <= rounding * apart[:2].max())


def _hidden(
    causal_lm: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    mask: torch.Tensor | None,
    vision: Mapping[str, torch.Tensor] = EMPTY,
) -> torch.Tensor:
    """[rows, seq, hidden], what the head multiplies. `vision` may have other positions."""
    inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids, **vision}
    # `base_model` is what the architecture calls its model, or its transformer.
    hidden: torch.Tensor = causal_lm.base_model(**inputs, use_cache=False).last_hidden_state
    return hidden
