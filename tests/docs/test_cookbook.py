"""Every job of the cookbook is run as the page says, on a tiny model in place of the small one and for two steps."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY, with_fields
from tests.train_loop.servers import Mlflow
from train_loop.__main__ import main

ROOT = Path(__file__).parent.parent.parent
RECIPES = ROOT / "examples" / "cookbook"
PAGE = (ROOT / "docs" / "cookbook.md").read_text()
SMALL, STEPS = "HuggingFaceTB/SmolLM2-135M-Instruct", 2


@pytest.fixture
def cook(tmp_path, mirror, monkeypatch, capsys):
    """Run a recipe's file in this process, as `python -m train_loop` with these further words; its folder and its job."""
    monkeypatch.chdir(ROOT)

    def run(name, *words, **changes):
        given = json.loads((RECIPES / f"{name}.json").read_text())
        assert given["model_details"]["base_model"] in (SMALL, "tuneyard/tiny-random-vlm")
        tiny = {"model_details.base_model": TINY} if given["model_details"]["base_model"] == SMALL else {}
        job = with_fields(given, tiny | {"train_config.hyperparameters.max_steps": STEPS} | changes)
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(job))
        code = main([str(file), "--local", "--storage", str(tmp_path / "runs"), "--mirror", str(mirror), *words])
        out, err = capsys.readouterr()
        assert code == 0, err
        return tmp_path / "runs" / job["org"] / json.loads(out)["request_id"], job

    return run


def manifest(run):
    return json.loads((run / "manifest.json").read_text())


def learned(run, job):
    """That the run took its steps on all of its rows, and left an adapter as asked for."""
    made = manifest(run)
    assert (made["steps"], made["dataset"]["rejected"]) == (STEPS, 0)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    asked = job["train_config"]["adapter_config"]
    assert (config["r"], config["lora_alpha"]) == (asked["r"], asked["alpha"])
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_the_page_shows_every_recipe_and_how_it_is_run():
    files = sorted(p.stem for p in RECIPES.glob("*.json"))
    assert len(files) >= 10
    assert sorted(re.findall(r'^--8<-- "examples/cookbook/([\w-]+)\.json"$', PAGE, re.MULTILINE)) == files
    assert {n for n in files if f"python -m train_loop examples/cookbook/{n}.json --local" not in PAGE} == set()


@pytest.mark.parametrize("name", ["qlora", "alpaca", "text"])
def test_an_adapter_is_trained_on_every_row(cook, name):
    learned(*cook(name))


def test_tools_are_learned_under_a_template_that_goes_out_with_the_adapter(cook):
    run, job = cook("tools")
    learned(run, job)
    template = job["dataset_config"]["preprocessing"]["prompt"]["template"]
    assert (run / "adapter" / "chat_template.jinja").read_text() == template


def test_a_second_job_goes_on_from_the_adapter_of_the_first(cook):
    first = json.loads((RECIPES / "continue.json").read_text())["train_config"]["adapter_config"]["init_from"]
    assert f"examples/cookbook/lora.json --local --request-id {first}" in PAGE
    learned(*cook("lora", "--request-id", first))
    learned(*cook("continue"))


def test_the_whole_model_is_written_where_every_weight_was_trained(cook):
    run, _ = cook("full")
    assert (run / "merged" / "model.safetensors").is_file()
    assert not (run / "adapter").exists()


def test_a_job_that_stops_early_evaluates_on_the_rows_of_its_file(cook):
    run, job = cook("early-stopping")
    learned(run, job)
    made, rows = manifest(run), (RECIPES / "eval.jsonl").read_text().count("\n")
    assert made["dataset"]["split"]["eval"] == rows
    assert made["metrics"]["best"]["eval_loss"] <= made["metrics"]["eval_loss_after"]


def test_the_merged_weights_have_the_bases_own_names(cook, mirror):
    from safetensors import safe_open

    run, _ = cook("merge")
    with (
        safe_open(run / "merged" / "model.safetensors", "pt") as merged,
        safe_open(mirror / TINY / "model.safetensors", "pt") as base,
    ):
        assert set(merged.keys()) == set(base.keys())


def test_a_model_that_sees_learns_from_drawn_pictures(cook, tmp_path):
    drawn = [sys.executable, "examples/vlm/draw.py", str(tmp_path / "pictures"), "--rows", "16", "--held-out", "4"]
    subprocess.run(drawn, cwd=ROOT, check=True)
    where = {
        "dataset_details.dataset_path": str(tmp_path / "pictures" / "train.zip"),
        "dataset_config.split.eval_path": str(tmp_path / "pictures" / "held-out.zip"),
    }
    learned(*cook("images", **where))


def test_curves_go_to_mlflow(cook, serve, monkeypatch):
    server = Mlflow.new()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", serve(server))
    learned(*cook("mlflow"))
    (told,) = server.runs
    assert told["info"]["status"] == "FINISHED"
    assert {m["step"] for m in told["metrics"] if "loss" in m["key"]} >= {1, STEPS}
