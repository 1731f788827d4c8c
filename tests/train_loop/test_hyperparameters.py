"""Every hyperparameter changes what it says: the same few steps with and without it end elsewhere."""

import math

import pytest

from tests.train_loop.runs import HP, curve
from tests.train_loop.test_parallel import bases, folder, launch
from tests.train_loop.test_parallel import job as plain_job

__all__ = ["bases", "folder"]
LORA = "train_config.adapter_config"
CHANGES = {
    "learning_rate": {f"{HP}.learning_rate": 0.02},
    "lr_scheduler_type": {f"{HP}.lr_scheduler_type": "constant"},
    "warmup_steps": {f"{HP}.warmup_steps": 2},
    "warmup_ratio": {f"{HP}.warmup_ratio": 1.0},
    "adam_beta1": {f"{HP}.adam_beta1": 0.5},
    "adam_beta2": {f"{HP}.adam_beta2": 0.5},
    "adam_epsilon": {f"{HP}.adam_epsilon": 0.1},
    "weight_decay": {f"{HP}.weight_decay": 1.0},
    "max_grad_norm": {f"{HP}.max_grad_norm": 1e-9, f"{HP}.adam_epsilon": 1e-8},
    "neftune_noise_alpha": {f"{HP}.neftune_noise_alpha": 50.0},
    "seed": {f"{HP}.seed": 7},
    "per_device_train_batch_size": {f"{HP}.per_device_train_batch_size": 4},
    "gradient_accumulation_steps": {f"{HP}.gradient_accumulation_steps": 2},
    "dropout": {f"{LORA}.dropout": 0.5},
    "max_steps": {f"{HP}.max_steps": 2},
    "r": {f"{LORA}.r": 8},
    "alpha": {f"{LORA}.alpha": 64},
    "targets": {f"{LORA}.targets": ["q_proj"]},
    "use_rslora": {f"{LORA}.use_rslora": True},
    "use_dora": {f"{LORA}.use_dora": True},
    "init": {f"{LORA}.init": "gaussian"},
    "lora_plus_ratio": {f"{LORA}.lora_plus_ratio": 4.0},
    "modules_to_save": {f"{LORA}.modules_to_save": ["norm"]},
}


def short(folder, changes):
    base = {f"{HP}.max_steps": 3, f"{HP}.save_steps": 100, "dataset_config.split": {"type": "none"}}
    return plain_job(folder, base | changes)


def adapter(folder):
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(folder, bases):
    launch(folder, bases, "plain", short(folder, {}))
    return folder / "plain"


@pytest.mark.parametrize("name", CHANGES)
def test_it_changes_the_run(folder, bases, plain, name):
    launch(folder, bases, name, short(folder, CHANGES[name]))
    assert adapter(folder / name) != adapter(plain)


def test_the_same_again_changes_nothing(folder, bases, plain):
    launch(folder, bases, "again", short(folder, {}))
    assert adapter(folder / "again") == adapter(plain)
    assert curve(folder / "again") == curve(plain)


def test_epochs_may_be_fractions_and_lines_evaluations_and_checkpoints_come_when_they_are_due(folder, bases):
    due = {f"{HP}.logging_steps": 3, f"{HP}.eval_steps": 5, f"{HP}.save_steps": 2, f"{HP}.save_total_limit": 3}
    job = plain_job(folder, due | {f"{HP}.max_steps": None, f"{HP}.num_epochs": 1.4})
    manifest = launch(folder, bases, "due", job)
    points = curve(folder / "due")
    an_epoch = -(-manifest["dataset"]["split"]["train"] // 8)
    last = math.ceil(1.4 * an_epoch)
    assert manifest["steps"] == last
    assert [p["step"] for p in points if "loss" in p] == [s for s in range(1, last + 1) if s in (1, last) or s % 3 == 0]
    assert [p["epoch"] for p in points if "loss" in p] == [round(p["step"] / an_epoch, 4) for p in points if "loss" in p]
    assert [p["step"] for p in points if "eval_loss" in p] == [s for s in range(last + 1) if s == last or s % 5 == 0]
    losses = {p["step"]: p["eval_loss"] for p in points if p["step"] > 0 and "eval_loss" in p}
    bests = [step for step in losses if losses[step] == min(loss for s, loss in losses.items() if s <= step)]
    assert manifest["metrics"]["best"]["step"] == bests[-1]
    kept = {int(p.name.removeprefix("step-")) for p in (folder / "due/checkpoints").iterdir()}
    assert kept == set(sorted({*range(2, last + 1, 2), *bests, last})[-3:]) | {bests[-1]}
