"""Schedules against their formulas, optimizers against the textbook."""

import math

import bitsandbytes
import pytest
import torch
from transformers import get_scheduler

from train_loop.errors import TrainingError
from train_loop.optim import build_optimizer, learning_rate, page_again, set_learning_rate
from train_loop.spec import Hyperparameters

TOTAL = 20


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr"])
def test_a_schedule_is_its_formula(name, warmup):
    hp = Hyperparameters(learning_rate=0.5, lr_scheduler_type=name, warmup_steps=warmup)
    low = {"cosine_with_min_lr": 0.05}.get(name, 0.0)
    for step in range(1, TOTAL + 1):
        done = (step - 1 - warmup) / (TOTAL - warmup)
        after = {
            "constant": 0.5,
            "constant_with_warmup": 0.5,
            "linear": 0.5 * (1 - done),
        }.get(name, low + (0.5 - low) * (1 + math.cos(math.pi * done)) / 2)
        expected = 0.5 * step / warmup if step <= warmup and name != "constant" else after
        assert learning_rate(hp, step, TOTAL) == pytest.approx(expected), step


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_without_warm_up_a_schedule_is_that_of_transformers(name):
    hp = Hyperparameters(learning_rate=0.5, lr_scheduler_type=name, warmup_steps=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=TOTAL)
    for step in range(1, TOTAL + 1):
        assert learning_rate(hp, step, TOTAL) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def group(*parameters):
    return [{"params": list(parameters), "lr_factor": 1.0}]


def test_warm_up_is_a_share_of_all_steps_unless_it_is_given_in_steps():
    assert learning_rate(Hyperparameters(learning_rate=1, warmup_ratio=0.5), 5, TOTAL) == 0.5
    assert learning_rate(Hyperparameters(learning_rate=1, warmup_ratio=0.5, warmup_steps=5), 5, TOTAL) == 1
    # A part of a step is a step, as with transformers: the one after it still is at the peak.
    assert learning_rate(Hyperparameters(learning_rate=1, warmup_ratio=0.03), 2, TOTAL) == 1


HP = {"learning_rate": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 0.01, "weight_decay": 0.5}


def test_adamw_follows_its_formula_and_decays_matrices_only():
    matrix, vector = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((2, 2), (2,)))
    optimizer = build_optimizer(group(matrix, vector), Hyperparameters(**HP))
    set_learning_rate(optimizer, 0.2)
    value, first, second = {"m": 1.0, "v": 1.0}, 0.0, 0.0
    for step, gradient in enumerate([0.5, -1.0, 2.0], 1):
        matrix.grad, vector.grad = torch.full((2, 2), gradient), torch.full((2,), gradient)
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        update = first / (1 - 0.8**step) / (math.sqrt(second / (1 - 0.9**step)) + 0.01)
        value = {"m": value["m"] * (1 - 0.2 * 0.5) - 0.2 * update, "v": value["v"] - 0.2 * update}
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), value["m"]))
    torch.testing.assert_close(vector.detach(), torch.full((2,), value["v"]))


def test_the_8_bit_optimizer_follows_adamw_with_a_state_of_bytes_and_goes_on_from_it():
    def steps(optimizer, parameter, count, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            parameter.grad = torch.randn(64, 128, generator=generator)
            optimizer.step()

    mine, plain, resumed = (torch.nn.Parameter(torch.zeros(64, 128)) for _ in range(3))
    hp = Hyperparameters(optim="adamw_8bit", learning_rate=0.01)
    optimizer = build_optimizer(group(mine), hp)
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    steps(optimizer, mine, 5, 0)
    steps(build_optimizer(group(plain), Hyperparameters(learning_rate=0.01)), plain, 5, 0)
    assert optimizer.state[mine]["state1"].dtype == torch.uint8
    assert torch.nn.functional.cosine_similarity(mine.flatten(), plain.flatten(), dim=0) > 0.99

    resumed.data.copy_(mine.data)
    again = build_optimizer(group(resumed), hp)
    again.load_state_dict(optimizer.state_dict())
    steps(optimizer, mine, 3, 1)
    steps(again, resumed, 3, 1)
    assert torch.equal(mine, resumed)


def test_an_optimizer_that_pages_does_so_after_it_was_loaded_too(monkeypatch):
    def place(self, parameter, dtype=torch.float32):
        buffer = torch.zeros_like(parameter, dtype=dtype)
        buffer.is_paged = True  # as what bitsandbytes takes from the GPU's driver
        return buffer

    monkeypatch.setattr(bitsandbytes.optim.PagedAdamW8bit, "get_state_buffer", place)
    kinds = bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.PagedAdamW8bit
    saved, loaded = (kind([torch.nn.Parameter(torch.ones(64, 128))]) for kind in kinds)
    (before,), (after,) = (optimizer.param_groups[0]["params"] for optimizer in (saved, loaded))
    before.grad = torch.randn(64, 128)
    saved.step()
    loaded.load_state_dict(saved.state_dict())
    page_again(loaded)
    for name in ("state1", "state2"):
        assert torch.equal(loaded.state[after][name], saved.state[before][name])
        assert loaded.state[after][name].is_paged


def test_paging_needs_a_gpu():
    with pytest.raises(TrainingError, match="choose adamw_8bit") as caught:
        build_optimizer(group(torch.nn.Parameter(torch.zeros(2, 2))), Hyperparameters(optim="paged_adamw_8bit"))
    assert caught.value.field == "train_config.hyperparameters.optim"
