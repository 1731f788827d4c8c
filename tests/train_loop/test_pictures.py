"""A job on pictures as its user meets it: the drawn dataset, the plan, the run, and asking what was trained."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from examples.vlm import held_out
from train_loop.__main__ import main
from train_loop.chat import Comparison
from train_loop.data.image_tokens import ImageTokens
from train_loop.data.images import admit
from train_loop.data.tokenize import ChatTokenizer
from train_loop.model.adapters import trainable
from train_loop.model.load import load_base
from train_loop.model.processor import load_processor
from train_loop.model.source import ModelPlaces
from train_loop.model.tokenizer import load_tokenizer
from train_loop.plan import Hardware, make_plan
from train_loop.spec import JobSpec, ModelDetails, Prompt

REPO = Path(__file__).parents[2]
VLM = "tuneyard/tiny-random-vlm"
HP = "train_config.hyperparameters"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The example's zips, small."""
    folder = tmp_path_factory.mktemp("pictures")
    drawing = [sys.executable, REPO / "examples/vlm/draw.py", folder, "--rows", "40", "--held-out", "12"]
    subprocess.run(drawing, check=True)
    return folder


@pytest.fixture
def job(pictures):
    """The example's job on them; keyword arguments by dotted name go on top."""
    from tests.conftest import with_fields

    def make(changes=None):
        paths = {
            "dataset_details.dataset_path": str(pictures / "train.zip"),
            "dataset_config.split.eval_path": str(pictures / "held-out.zip"),
        }
        given = json.loads((REPO / "examples/vlm/job.json").read_text())
        return with_fields(given, paths | {f"{HP}.dataloader_num_workers": 0} | (changes or {}))

    return make


def planned(job, mirror, hardware=Hardware("cpu", 1 << 34, 1e10)):
    return make_plan(JobSpec.model_validate(job), ModelPlaces(str(mirror)), hardware)


def test_the_same_seed_draws_the_same_pictures_and_none_of_them_is_held_out(pictures, tmp_path):
    again = [sys.executable, REPO / "examples/vlm/draw.py", tmp_path, "--rows", "40", "--held-out", "12"]
    subprocess.run(again, check=True)
    for name in ("train.zip", "held-out.zip"):
        assert (tmp_path / name).read_bytes() == (pictures / name).read_bytes()
    shown = [{picture.tobytes() for picture, _, _ in held_out.rows_of(tmp_path / name)} for name in ("train.zip", "held-out.zip")]
    assert (len(shown[0]), len(shown[1]), len(shown[0] & shown[1])) == (40, 12, 0)


def test_the_plan_shows_pictures_with_their_size_and_counts_their_tokens(job, mirror):
    plan = planned(job(), mirror)
    assert (plan["rows"]["train"], plan["rows"]["eval"], plan["rows"]["exact"]) == (40, 12, True)
    shown = plan["samples"][0]
    text = "".join(segment["text"] for segment in shown["segments"])
    assert text.count("[image 64x64, 7 tokens]") == 1  # 4, and the marks around them
    assert "<image>" not in text
    assert [segment["trained"] for segment in shown["segments"]][:2] == [False, True]
    assert shown["tokens"] > 7
    assert plan["tokens"]["per_row_mean"] > 7


def test_the_plan_says_what_learns(job, mirror):
    spec = {"train_config.train_type": "lora", f"{HP}.learning_rate": 0.001}
    for changes in ({}, {"train_config.freeze": {}}, spec, spec | {"train_config.freeze": {}}):
        of_plan = planned(job(changes), mirror)["trainable_params"]
        model = trained_by(job(changes), mirror)
        assert of_plan == sum(p.numel() for p in trainable(model)), changes


def trained_by(job, mirror):
    from train_loop.model.adapters import add_adapter

    spec = JobSpec.model_validate(job)
    base = load_base(spec, mirror / VLM, torch.device("cpu")).model
    return base if spec.train_config.train_type == "full" else add_adapter(base, spec)


def test_a_tower_that_learns_takes_more_memory_and_time_than_one_that_only_looks(job, mirror):
    frozen, learning = (planned(job({"train_config.freeze": {"vision": v, "aligner": v}}), mirror) for v in (True, False))
    for part in ("optimizer_bytes", "gradients_bytes", "activations_bytes"):
        assert frozen["memory"][part] < learning["memory"][part]
    slow = Hardware("cpu", 1 << 34, 1e6)
    frozen, learning = (
        planned(job({"train_config.freeze": {"vision": v, "aligner": v}}), mirror, slow)["time_s"] for v in (True, False)
    )
    assert frozen < learning


def test_a_row_whose_picture_is_missing_is_in_the_plan_as_it_will_be_in_the_run(job, mirror, pictures, tmp_path):
    with zipfile.ZipFile(pictures / "train.zip") as source, zipfile.ZipFile(tmp_path / "rows.zip", "w") as target:
        for name in source.namelist()[1:]:
            target.writestr(name, source.read(name))
    plan = planned(job({"dataset_details.dataset_path": str(tmp_path / "rows.zip")}), mirror)
    assert plan["rows"]["total"] == 39
    assert any("can't be used" in warning for warning in plan["warnings"])


def test_a_job_on_pictures_runs_from_a_file_and_what_it_trained_answers_about_them(job, mirror, pictures, tmp_path):
    path = tmp_path / "job.json"
    twice_half = {f"{HP}.max_steps": 2, f"{HP}.per_device_train_batch_size": 20}
    its = job(twice_half | {f"{HP}.eval_steps": 2, f"{HP}.logging_steps": 1})
    path.write_text(json.dumps(its))
    assert main([str(path), "--local", "--storage", str(tmp_path / "runs"), "--mirror", str(mirror)]) == 0
    run = next((tmp_path / "runs").glob("*/*/manifest.json")).parent
    metrics = json.loads((run / "manifest.json").read_text())["metrics"]
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert planned(its, mirror)["tokens"]["trained_on"] == sum(point.get("tokens", 0) for point in points)

    details = ModelDetails(base_model=VLM, model_type="vlm")
    both = Comparison.load(mirror / VLM, run / "merged", details, Prompt())
    one, other = (admit(zipfile.ZipFile(pictures / "train.zip").read(f"pictures/0000{i}.png")) for i in range(2))
    assert both.answer("What shape is it?", 2, [one])[1] != ""
    logits = [both.tuned(**both.asked("What shape is it?", [picture])).logits[0, -1] for picture in (one, other)]
    assert not torch.allclose(*logits)
    # And by transformers alone.
    model, processor = held_out.load(run / "merged", run / "merged")
    row = (one.open(), "What shape is it?", "")
    asked = held_out.asked(processor, [row])
    assert asked["input_ids"].tolist() == both.asked("What shape is it?", [one])["input_ids"].tolist()
    # The first may have been computed in bfloat16.
    torch.testing.assert_close(model(**asked).logits[0, -1], logits[0].float(), atol=0.15, rtol=0.05)


@pytest.mark.parametrize("prompt", [Prompt(), Prompt(system="Answer in one word.")])
def test_a_question_about_pictures_is_put_as_in_training(prompt, mirror, pictures):
    picture = admit(zipfile.ZipFile(pictures / "train.zip").read("pictures/00000.png"))
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is larger?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "neither"}]
    tokenizer = load_tokenizer(mirror / VLM)
    chat = ChatTokenizer(tokenizer, prompt, "right", "assistant", ImageTokens(load_processor(mirror / VLM, tokenizer)))
    trained_on = chat.encode({"messages": turns}, [(picture.width, picture.height)] * 2)
    details = ModelDetails(base_model=VLM, model_type="vlm")
    asked = Comparison.load(mirror / VLM, mirror / VLM, details, prompt).asked("Which is larger?", [picture, picture])
    ids = asked["input_ids"][0].tolist()
    # Its last space may go with the answer's first word.
    assert trained_on.input_ids[: len(ids)].tolist() == ids
    assert (trained_on.labels[: len(ids)] < 0).all()
    assert asked["pixel_values"].shape[1] == 2
