"""A linear layer with its adapter as one function: PEFT's values and gradients."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from tests.train_loop.models import run
from train_loop.model import layers
from train_loop.model.layers import fuse

ROWS, IN, OUT, RANK = 5, 8, 6, 2


class Model(torch.nn.Module):
    """Two linear layers, the second without a bias; `linear` makes them."""

    def __init__(self, linear=torch.nn.Linear):
        super().__init__()
        self.first = linear(64, 128)
        self.second = linear(128, 64, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(base, **changes):
    """`base` with an adapter whose B isn't zero, and a copy of it with fused layers."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(target_modules=["first", "second"], r=4, lora_alpha=6, **changes))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    fused = copy.deepcopy(model)
    fuse(fused)
    return model, fused


def values_and_gradients(model, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def four_bit(*sizes, **kwargs):
    from bitsandbytes.nn import Linear4bit

    return Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4", **kwargs)


def eight_bit(*sizes, **kwargs):
    """Its state is laid out as load_base leaves it."""
    from bitsandbytes.nn import Linear8bitLt

    layer = Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, **kwargs).to("cpu")
    layer.init_8bit_state()
    layer.init_8bit_state = lambda: None
    return layer


def calls(monkeypatch):
    """What layers were computed as one function of."""
    seen = []
    for function in (layers._LoraLinear, layers._DoraLinear):
        monkeypatch.setattr(function, "apply", lambda *a, real=function.apply: seen.append(a) or real(*a))
    return seen


def drops_as_torch(x, dropout):
    """A mask that leaves what torch's own dropout would leave."""
    return (F.dropout(torch.ones_like(x), dropout) != 0).to(torch.uint8), 1 - dropout


@pytest.mark.parametrize("linear", [torch.nn.Linear, four_bit, eight_bit], ids=["float", "nf4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_values_and_gradients_are_those_of_peft(linear, dora, dropout, monkeypatch):
    monkeypatch.setattr(layers, "_kept", drops_as_torch)
    seen = calls(monkeypatch)
    torch.manual_seed(0)  # weights too: now and then a sum of large terms differs by more than is allowed
    base = Model(linear).to("cpu")
    base.is_loaded_in_8bit = linear is eight_bit
    model, fused = adapted(base, use_dora=dora, lora_dropout=dropout)
    x = torch.randn(2, ROWS, 64)
    theirs = values_and_gradients(model, x)
    assert not seen
    for mine, its in zip(values_and_gradients(fused, x), theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-3)
    assert len(seen) == 2


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_gradients_are_those_of_the_value(dora, dropout):
    torch.manual_seed(0)
    sizes = (ROWS, IN), (OUT, IN), (OUT,), (RANK, IN), (OUT, RANK), (OUT,)
    x, weight, bias, a, b, magnitude = (torch.randn(*size, dtype=torch.float64) for size in sizes)
    length = torch.linspace(0.5, 2, OUT, dtype=torch.float64)

    def value(x, a, b, *magnitude):
        torch.manual_seed(7)  # drops the same values each time
        inputs = x, weight, None, bias, a, b, 1.5, dropout
        return layers._DoraLinear.apply(*inputs, *magnitude, length) if dora else layers._LoraLinear.apply(*inputs)

    assert torch.autograd.gradcheck(value, [t.requires_grad_() for t in (x, a, b, *([magnitude] if dora else []))])


def test_dropout_drops_its_share_and_keeps_the_mean():
    x, weight, eye = torch.ones(2000, 50), torch.zeros(50, 50), torch.eye(50)
    y = layers._LoraLinear.apply(x, weight, None, None, eye, eye, 1.0, 0.3)
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.7, rel=1e-4)]
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    # No value's fate is another's: neighbours share a draw of the generator.
    kept = (y != 0).float() - 0.7
    assert all(abs((kept[:, i] * kept[:, i + 1]).mean()) < 0.02 for i in range(8))


def test_an_evaluation_drops_nothing():
    model, fused = adapted(Model(), lora_dropout=0.5)
    x = torch.randn(ROWS, 64)
    torch.testing.assert_close(fused.eval()(x), model.eval()(x))


def test_what_is_more_than_one_adapter_is_left_to_peft(monkeypatch):
    seen = calls(monkeypatch)
    x = torch.randn(ROWS, 64)
    model, fused = adapted(Model())
    with model.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(fused(x), model(x))
    plain = fused(x)
    assert len(seen) == 2
    fused.merge_adapter()
    torch.testing.assert_close(fused(x), plain, rtol=1e-4, atol=1e-4)
    assert len(seen) == 2


def test_a_job_trains_through_them(local_job, tmp_path, mirror, monkeypatch):
    seen = calls(monkeypatch)
    run(local_job({"train_config.hyperparameters.max_steps": 1}, 20), tmp_path, mirror)
    assert any(arguments[2] is not None for arguments in seen)  # NF4
    assert {arguments[-1] for arguments in seen} == {0.0, 0.1}  # of evaluation, and the default of training
