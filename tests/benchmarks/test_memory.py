"""The memory that a plan promises is what a worker on CPUs takes, with the real weights of a small model."""

import pytest

from benchmarks.memory import job, measure, write_rows
from train_loop.model.source import ModelPlaces
from train_loop.plan import make_plan, this_machine
from train_loop.spec import JobSpec

pytestmark = pytest.mark.service


@pytest.mark.parametrize(
    ("bits", "checkpointing", "max_length", "batch", "trains"),
    [
        (4, True, 512, 4, "lora"),
        (8, True, 512, 2, "lora"),
        (8, False, 512, 2, "lora"),
        (None, True, 1024, 2, "lora"),
        (None, False, 512, 2, "lora"),
        (None, False, 512, 2, "dora"),
        (None, True, 512, 2, "full"),
        (None, False, 512, 2, "full"),
    ],
)
def test_the_planned_peak_is_within_15_percent_of_the_measured_one(
    bits, checkpointing, max_length, batch, trains, tmp_path, mirror
):
    write_rows(tmp_path / "rows.jsonl")
    spec = job(tmp_path / "rows.jsonl", bits, checkpointing, max_length, batch, False, trains)
    planned = make_plan(JobSpec.model_validate(spec), ModelPlaces(str(mirror)), this_machine())["memory"]["total_bytes"]
    assert planned == pytest.approx(measure(spec, str(mirror)), rel=0.15)
