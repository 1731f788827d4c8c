"""The chunked head-and-loss is the plain one, in value and gradient."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import HyperCLOVAXConfig

from tests.train_loop.models import SIZES, run, save_base
from tests.train_loop.runs import curve
from train_loop import loss
from train_loop.errors import ModelError
from train_loop.loss import Head, head_loss

TOKENS, WIDTH, VOCAB = 7, 4, 11


@pytest.fixture(autouse=True)
def chunks_of_three(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 3)


def made(bias, trained):
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCAB, bias=bias).double().requires_grad_(trained)
    return torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True), head, torch.randint(VOCAB, (TOKENS,))


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (1.0, 2.0), (0.3, 2.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_value_and_gradients(trained, bias, scale, softcap):
    hidden, head, targets = made(bias, trained)

    def chunked(hidden, *_):
        return head_loss(hidden, Head(head, scale, softcap), targets)

    learns = [hidden, *(head.parameters() if trained else ())]
    assert torch.autograd.gradcheck(chunked, learns)

    logits = head(hidden) * scale
    plain = F.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, targets, reduction="sum")
    torch.testing.assert_close(chunked(hidden), plain)
    for mine, its in zip(torch.autograd.grad(3 * chunked(hidden), learns), torch.autograd.grad(3 * plain, learns), strict=True):
        torch.testing.assert_close(mine, its)


def test_a_frozen_hidden_state_still_trains_the_head():
    hidden, head, targets = made(False, True)
    head_loss(hidden.detach(), Head(head), targets).backward()
    torch.testing.assert_close(
        head.weight.grad, torch.autograd.grad(F.cross_entropy(head(hidden), targets, reduction="sum"), head.weight)[0]
    )


def test_no_token_has_no_loss_and_no_gradient():
    hidden, head, _ = made(False, True)
    empty = torch.empty(0, dtype=torch.int64)
    head_loss(hidden[:0], Head(head), empty).backward()
    assert head.weight.grad.abs().sum() == 0


def test_an_evaluation_computes_no_gradient_of_a_head_that_is_trained(local_job, tmp_path, mirror, monkeypatch):
    differentiated, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: differentiated.append(a) or grad(*a, **k))
    hp = "train_config.hyperparameters"
    changes = {"train_config.adapter_config.modules_to_save": ["lm_head"], "model_details.quantization": None}
    run(local_job(changes | {f"{hp}.max_steps": 1, f"{hp}.per_device_train_batch_size": 1}, 20), tmp_path, mirror)
    (step,) = (line for line in curve(tmp_path / "run") if "loss" in line)
    # In chunks of the one step's row, not of the evaluations' before and after it.
    assert 1 <= len(differentiated) <= step["tokens"] / loss.CHUNK_TOKENS


def test_a_model_whose_logits_are_not_known_is_refused_before_it_is_trained(local_job, tmp_path, tokenizer):
    # It multiplies by what Granite, under the same name, divides by.
    config = HyperCLOVAXConfig(**SIZES, vocab_size=len(tokenizer), logits_scaling=4.0)
    base_model = save_base(config, "hyperclovax", tmp_path / "mirror", tokenizer)
    with pytest.raises(ModelError, match="makes its logits in a way that isn't known here"):
        run(local_job({"model_details": {"base_model": base_model}}), tmp_path, tmp_path / "mirror")
