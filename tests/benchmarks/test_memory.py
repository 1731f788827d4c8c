"""The memory that a plan promises is what a worker on CPUs takes, with the real weights of a small model."""

import pytest

from benchmarks.memory import job, measure, write_rows
from tests.conftest import with_fields
from tests.train_loop import vision_models
from tests.train_loop.zips import FIELDS, picture, row, zipped
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


@pytest.mark.parametrize("trains", ["lora", "full"])
@pytest.mark.parametrize(("learns", "checkpointing"), [(False, True), (True, True), (True, False)])
def test_so_is_that_of_a_model_that_sees(trains, learns, checkpointing, tmp_path, tokenizer, monkeypatch):
    """16 images a step, of 5 tiles and 80 patches each; a tower that is larger than the language model."""
    for sizes, changes in (
        (vision_models.TEXT, {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}),
        (vision_models.TOWER, {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}),
    ):
        for name, value in changes.items():
            monkeypatch.setitem(sizes, name, value)
    vision_models.make("idefics3", tmp_path / "tuneyard/vlm", tokenizer)
    shown = {f"{i}.png": picture(i, (64, 64)) for i in range(16)}
    rows = [row(*[f"{(i + k) % 16}.png" for k in range(4)], answer="Some words are said here of it. " * 10) for i in range(16)]
    (tmp_path / "it.zip").write_bytes(zipped(rows, shown))
    of_images = FIELDS | {
        "model_details.base_model": "tuneyard/vlm",
        "train_config.torch_dtype": "float32",
        "train_config.freeze": {"vision": not learns, "aligner": not learns},
    }
    spec = with_fields(job(tmp_path / "it.zip", None, checkpointing, 1024, 4, False, trains), of_images)
    planned = make_plan(JobSpec.model_validate(spec), ModelPlaces(str(tmp_path)), this_machine())["memory"]["total_bytes"]
    assert planned == pytest.approx(measure(spec, str(tmp_path)), rel=0.15)
