"""What holds of text, however the workers share batch and model, holds of rows with images."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.train_loop import group, test_parallel
from tests.train_loop.models import run
from tests.train_loop.runs import Watcher, curve
from tests.train_loop.test_parallel import (
    BEST,
    FLAT,
    FSDP,
    FULL,
    NF4,
    THREE,
    close,
    same_gradients,
    weights,
    weights_file,
)
from tests.train_loop.vision_models import make
from tests.train_loop.zips import FIELDS, picture, row, zipped
from train_loop.errors import Stopped

LEARNS = {"train_config.freeze": {"vision": False, "aligner": False}}
TOWER = {"train_config.freeze": {"vision": False, "aligner": True}}
# Whose image takes positions of its own, one that cuts it into tiles, one whose image's tokens see each other, and one that looks
# at images in layers of their own; what a job has, and how two workers share it.
CASES = {
    ("qwen3_vl", "ddp"): (LEARNS, {}),
    ("qwen3_vl", "fsdp nf4"): (LEARNS | NF4, FSDP),
    ("qwen3_vl", "fsdp full"): (LEARNS | FULL, FSDP),
    ("idefics3", "fsdp frozen"): ({}, FSDP),
    ("gemma3", "ddp"): (TOWER, {}),
    ("mllama", "ddp"): (LEARNS, {}),
    ("mllama", "fsdp full"): (LEARNS | FULL, FSDP),
}
ALL_WAYS = ("qwen3_vl", "mllama")
DDP = [(family, changes) for (family, how), (changes, _) in CASES.items() if how == "ddp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A folder with rows of none, one and two images, prepared for each family, and their models."""
    folder = tmp_path_factory.mktemp("vision_parallel")
    shown = {f"{i}.png": picture(i, (28 + 3 * i % 40, 28 + 7 * i % 50)) for i in range(24)}
    rows = [row(*[f"{i}.png", f"{i - 1}.png"][: i % 3], answer=f"The number {i} " * (1 + i % 4)) for i in range(24)]
    (folder / "it.zip").write_bytes(zipped(rows, shown))
    for family in {family for family, _ in CASES}:
        make(family, folder / "tuneyard" / family, tokenizer)
        with pytest.raises(Stopped):
            alone_in(folder, f"{family} prepared", job(folder, family), Watcher(stop_at=0))
    return folder


def job(folder, family, changes=None, **shared):
    of_images = FIELDS | {
        "dataset_details.dataset_path": str(folder / "it.zip"),
        "dataset_config.preprocessing.prompt.max_length": 256,
        "dataset_config.split.ratios": [0.84, 0.16],
        "model_details.base_model": f"tuneyard/{family}",
    }
    return test_parallel.job(folder, of_images | THREE | (changes or {}), **shared)


def alone_in(folder, name, its, monitor=None):
    return run(its, folder, folder, name, monitor or Watcher())


@pytest.fixture(scope="module")
def alone(folder):
    """Runs in this process."""
    made = {f"{family} {how} of one": job(folder, family, changes) for (family, how), (changes, _) in CASES.items()}
    made |= {f"{family} flat": job(folder, family, changes | FLAT, accumulation=2) for family, changes in DDP}
    made["best"] = job(folder, "qwen3_vl", LEARNS | BEST["lora"])
    for name, its in made.items():
        alone_in(folder, name, its)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """Runs on two workers."""
    runs = [
        (family, f"{family} {how} of two", job(folder, family, c | s, workers=2), None) for (family, how), (c, s) in CASES.items()
    ]
    for family in ALL_WAYS:
        full, its = (job(folder, family, LEARNS | changes, workers=2) for changes in (FULL | FSDP, {}))
        with pytest.raises(Stopped):
            alone_in(folder, f"{family} more", its, Watcher(stop_at=1))
        runs += [(family, f"{family} cut", full, 2), (family, f"{family} cut", full, None)]
        runs += [(family, f"{family} fewer", its, 1), (family, f"{family} more", its, None)]
    for family, name, _, _ in runs:
        if not (folder / name / "data").exists():
            shutil.copytree(folder / f"{family} prepared/data", folder / name / "data")
    group.on_workers("tests.train_loop.test_vision_parallel:run_all", folder, 2, folder / "tuneyard", runs)
    return folder


def run_all(ctx, runs):
    for family, *what in runs:
        group.run_all(dataclasses.replace(ctx, model_folder=ctx.model_folder / family), [what])


@pytest.mark.parametrize("family", [family for family, _ in DDP])
def test_neither_accumulation_nor_packing_changes_a_step(alone, family):
    close(alone / f"{family} flat", alone / f"{family} ddp of one")
    same_gradients(alone / f"{family} flat", alone / f"{family} ddp of one")


@pytest.mark.parametrize(("family", "how"), CASES)
def test_two_workers_take_the_steps_of_one(alone, two, family, how):
    shared, whole = (folder / f"{family} {how} of {n}" for folder, n in ((two, "two"), (alone, "one")))
    close(shared, whole)
    handed_out = weights(shared)
    assert any("visual" in name or "vision" in name for name in handed_out) is ("frozen" not in how)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(handed_out[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", ALL_WAYS)
def test_workers_that_were_stopped_end_with_the_same_bytes(two, family):
    whole, cut = two / f"{family} fsdp full of two", two / f"{family} cut"
    assert curve(cut) == curve(whole)
    assert weights_file(cut).read_bytes() == weights_file(whole).read_bytes()


@pytest.mark.parametrize("family", ALL_WAYS)
def test_a_run_goes_on_with_fewer_workers_or_more(alone, two, family):
    alone_in(two, f"{family} fewer", job(two, family, LEARNS, workers=2))
    close(two / f"{family} fewer", alone / f"{family} ddp of one")
    close(two / f"{family} more", alone / f"{family} ddp of one")


def test_a_run_that_stops_early_hands_out_the_weights_of_its_best_evaluation(alone):
    evals = {p["step"]: p["eval_loss"] for p in curve(alone / "best") if "eval_loss" in p and p["step"]}
    best = min(evals, key=evals.get)
    assert max(evals) == best + 1 < 20, evals
    kept, handed_out = load_file(alone / f"best/checkpoints/step-{best:08d}/adapter_model.safetensors"), weights(alone / "best")
    assert handed_out.keys() == kept.keys()
    assert all(torch.equal(handed_out[name], tensor) for name, tensor in kept.items())
