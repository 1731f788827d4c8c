"""The chunked head-and-loss is the plain one, in value and gradient."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from train_loop import loss
from train_loop.loss import head_loss

TOKENS, WIDTH, VOCAB = 7, 4, 11


@pytest.fixture(autouse=True)
def chunks_of_three(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 3)


def made(bias, trained):
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCAB, bias=bias).double().requires_grad_(trained)
    return torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True), head, torch.randint(VOCAB, (TOKENS,))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_value_and_gradients(trained, bias, softcap):
    hidden, head, targets = made(bias, trained)

    def chunked(hidden, *_):
        return head_loss(hidden, head, targets, softcap)

    learns = [hidden, *(head.parameters() if trained else ())]
    assert torch.autograd.gradcheck(chunked, learns)

    logits = head(hidden)
    plain = F.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, targets, reduction="sum")
    torch.testing.assert_close(chunked(hidden), plain)
    for mine, its in zip(torch.autograd.grad(3 * chunked(hidden), learns), torch.autograd.grad(3 * plain, learns), strict=True):
        torch.testing.assert_close(mine, its)


def test_a_frozen_hidden_state_still_trains_the_head():
    hidden, head, targets = made(False, True)
    head_loss(hidden.detach(), head, targets).backward()
    torch.testing.assert_close(
        head.weight.grad, torch.autograd.grad(F.cross_entropy(head(hidden), targets, reduction="sum"), head.weight)[0]
    )


def test_no_token_has_no_loss_and_no_gradient():
    hidden, head, _ = made(False, True)
    empty = torch.empty(0, dtype=torch.int64)
    head_loss(hidden[:0], head, empty).backward()
    assert head.weight.grad.abs().sum() == 0
