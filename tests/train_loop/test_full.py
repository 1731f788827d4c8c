"""Full fine-tuning: every weight learns, resumes exactly, and is handed out as a model that transformers loads."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import TINY, write_jsonl
from tests.train_loop.models import make_base, run
from tests.train_loop.runs import HP, Watcher, curve
from tests.train_loop.test_architectures import eval_loss
from train_loop.chat import Comparison
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import Stopped
from train_loop.metrics import MetricLog
from train_loop.model.tokenizer import load_tokenizer
from train_loop.spec import ModelDetails, Prompt

FULL = {
    "train_config.train_type": "full",
    "model_details.quantization": None,
    "train_config.torch_dtype": "float32",
    f"{HP}.learning_rate": 0.003,
}


def model_file(folder):
    return (folder / "merged/model.safetensors").read_bytes()


def test_a_resumed_run_ends_with_the_same_bytes_and_every_weight_has_moved(local_job, tmp_path, mirror, launch):
    job = local_job(FULL | {f"{HP}.max_steps": 3, "train_config.torch_dtype": "bfloat16"})
    manifest = launch(job, "whole")
    for step in (1, 2):
        with pytest.raises(Stopped):
            launch(job, "cut", Watcher(stop_at=step))
    launch(job, "cut")
    assert model_file(tmp_path / "cut") == model_file(tmp_path / "whole")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")

    assert manifest["adapter_uri"] is None
    assert manifest["merged_uri"] == str(tmp_path / "whole/merged")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {f["name"] for f in manifest["merged_files"]}
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/merged")
    base = AutoModelForCausalLM.from_pretrained(mirror / TINY)
    assert trained.dtype is torch.bfloat16
    assert trained.config.tie_word_embeddings
    # As the base has them, what generation goes by included.
    theirs, ours = (json.loads((f / "config.json").read_text()) for f in (mirror / TINY, tmp_path / "whole/merged"))
    assert ours == theirs | {"dtype": "bfloat16", "transformers_version": ours["transformers_version"]}
    assert [n for (n, p), q in zip(trained.named_parameters(), base.parameters(), strict=True) if torch.equal(p, q)] == []


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma2", "phi3"])
def test_a_whole_model_of_any_kind_loads_as_it_was_evaluated(name, local_job, tmp_path, tokenizer):
    base_model = make_base(name, tmp_path / "mirror", tokenizer)
    job = local_job(FULL | {f"{HP}.max_steps": 1, "model_details": {"base_model": base_model}}, num_rows=20)
    manifest = run(job, tmp_path, tmp_path / "mirror")
    merged = tmp_path / "run/merged"
    files = [load_file(f / "model.safetensors") for f in (merged, tmp_path / "mirror" / base_model)]
    assert {n: t.shape for n, t in files[0].items()} == {n: t.shape for n, t in files[1].items()}
    model, info = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    loss = eval_loss(model.eval(), load_tokenizer(merged), job, manifest)
    assert loss == pytest.approx(manifest["metrics"]["eval_loss_after"], rel=1e-5)


COLOURS = {
    "one": "red",
    "two": "green",
    "six": "blue",
    "ten": "red",
    "cat": "black",
    "dog": "green",
    "sun": "black",
    "sea": "blue",
}


def test_it_learns_what_only_training_can_tell(local_job, tmp_path, mirror, launch):
    """The answer to each question was drawn once; chance is one in four."""
    changes = {
        f"{HP}.max_steps": 40,
        f"{HP}.learning_rate": 0.01,
        f"{HP}.gradient_checkpointing": False,
        f"{HP}.logging_steps": 40,
        "dataset_config.split": {"type": "none"},
    }
    job = local_job(FULL | changes)
    # Repeated, so that a small model finds in few steps where to look.
    questions = {" ".join([word] * 12): colour for word, colour in COLOURS.items()}
    write_jsonl(tmp_path / "rows.jsonl", [{"conversation": [{"human": q, "assistant": a}]} for q, a in questions.items()])
    launch(job)
    # Beside its base, as `tuneyard chat` shows it.
    both = Comparison.load(mirror / TINY, tmp_path / "run/merged", ModelDetails(base_model=TINY), Prompt())
    answers = {question: both.answer(question, 3) for question in questions}
    right = sum(answers[question][1] == colour for question, colour in questions.items())
    assert [base for base, _ in answers.values() if base in COLOURS.values()] == []
    assert right / len(questions) > 0.95


@pytest.mark.parametrize("template", ["qwen2.5", "gemma2"])  # one with a role for the system, one without
def test_a_question_is_put_to_the_models_as_in_training(template, tmp_path, mirror):
    tokenizer = load_tokenizer(mirror / TINY)
    tokenizer.chat_template = (Path(__file__).parent / f"templates/{template}.jinja").read_text()
    shutil.copytree(mirror / TINY, tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    prompt = Prompt(system="Answer like a pirate.")
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]
    trained_on = ChatTokenizer(tokenizer, prompt, "right", "assistant").encode({"messages": turns})
    before_the_answer = trained_on.input_ids[: (trained_on.labels >= 0).argmax()]
    asked = Comparison.load(mirror / TINY, tmp_path / "trained", ModelDetails(base_model=TINY), prompt).asked("Who?")
    assert asked["input_ids"][0].tolist() == before_the_answer.tolist()
    assert "pirate" in tokenizer.decode(before_the_answer)


def test_the_last_steps_of_a_run_that_stops_early_have_a_line(local_job, tmp_path, launch):
    # Too small a rate to change anything: the first evaluation stays the best.
    changes = {f"{HP}.learning_rate": 1e-30, f"{HP}.eval_steps": 2, f"{HP}.early_stopping_patience": 2, f"{HP}.logging_steps": 5}
    manifest = launch(local_job(changes | {f"{HP}.max_steps": 20}))
    points = curve(tmp_path / "run")
    assert manifest["steps"] == 2 + 2 * 2
    assert manifest["metrics"]["best"]["step"] == 2
    assert [p["step"] for p in points if "loss" in p] == [1, 2, 4, 5, 6]
    assert [p["step"] for p in points if "eval_loss" in p] == [0, 2, 4, 6]


def test_evaluations_that_give_no_number_use_up_patience_too():
    log = MetricLog(20)
    for step, loss in enumerate([3.0, 2.0, math.nan, math.inf]):
        assert not log.stalled(2)
        log.evaluated(step, loss)
    assert log.stalled(2)
    assert log.best == {"step": 1, "eval_loss": 2.0}
    assert MetricLog.from_state(json.loads(json.dumps(log.state()))).stalled(2)
    log.evaluated(4, 1.0)
    assert not log.stalled(2)
    assert all(math.isfinite(p["eval_loss"]) for p in log.points)


def test_early_stopping_hands_out_the_best_weights(local_job, tmp_path, launch):
    """At this rate and scale some evaluation soon is worse than the one before."""
    changes = {
        f"{HP}.max_steps": 20,
        f"{HP}.learning_rate": 0.5,
        f"{HP}.lr_scheduler_type": "constant",
        f"{HP}.eval_steps": 1,
        f"{HP}.early_stopping_patience": 1,
        f"{HP}.save_total_limit": 1,
        "model_details.quantization": None,
        "train_config.adapter_config.dropout": 0.0,
        "train_config.adapter_config.alpha": 1024,
    }
    job = local_job(changes)
    monitor = Watcher()
    manifest = launch(job, "run", monitor)
    evals = [(p["step"], p["eval_loss"]) for p in curve(tmp_path / "run") if p.get("eval_loss") and p["step"]]
    best = min(evals, key=lambda e: e[1])
    assert manifest["steps"] == evals[-1][0] == best[0] + 1 < 20, evals
    assert monitor.said("stopped_early")
    assert manifest["metrics"]["best"] == {"step": best[0], "eval_loss": best[1]}
    assert manifest["metrics"]["eval_loss_after"] == best[1]
    saved = tmp_path / f"run/checkpoints/step-{best[0]:08d}/adapter_model.safetensors"
    assert saved.read_bytes() == (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()

    with pytest.raises(Stopped):
        launch(job, "cut", Watcher(stop_at=best[0]))
    assert launch(job, "cut")["metrics"]["best"] == manifest["metrics"]["best"]
    assert curve(tmp_path / "cut") == curve(tmp_path / "run")
    assert json.loads((tmp_path / "cut/manifest.json").read_text())["adapter_files"] == manifest["adapter_files"]
