"""Runs on a GPU that isn't there compute what those on the CPU do: tensors are where they are needed, and kernels take them."""

import json

import pytest
from safetensors.torch import load_file

from tests.train_loop.pretend_gpu import GpuThatIsnt, gpu
from tests.train_loop.runs import HP, short

PRE = "dataset_config.preprocessing"
ADAPTER = "train_config.adapter_config"
EXACT = {f"{ADAPTER}.dropout": 0.0, "model_details.quantization": None, "train_config.torch_dtype": "bfloat16"}
SAVED = "checkpoints/step-00000002/adapter_model.safetensors"


def losses(folder):
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [point[name] for point in points for name in ("loss", "eval_loss") if name in point]


@pytest.mark.parametrize(
    ("changes", "by_flash"),
    [
        ({}, True),
        ({f"{PRE}.packing": False, f"{ADAPTER}.use_dora": True}, True),
        ({"train_config.torch_dtype": "float32"}, False),
    ],
    ids=["joined rows", "padded rows", "float32"],
)
def test_a_run_has_on_the_gpu_all_that_it_computes_with(changes, by_flash, local_job, launch, tmp_path, monkeypatch):
    job = short(local_job, EXACT | {f"{HP}.max_steps": 3, f"{HP}.logging_steps": 1} | changes)
    launch(job, "cpu")
    with gpu(monkeypatch):
        launch(job, "gpu")
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-2 if by_flash else 1e-4)
    assert bool(GpuThatIsnt.calls) is by_flash
    mine, theirs = (load_file(tmp_path / name / SAVED) for name in ("gpu", "cpu"))
    assert max((mine[name] - theirs[name]).abs().max() for name in theirs) < 0.05  # two steps of 0.01, either way
    assert all(mine[name].any() for name in mine), "written before it was copied"
