"""An llm job on a vision model: the language model is trained, and nothing of what looks at images."""

import pytest
import torch
from safetensors.torch import load_file

from tests.train_loop.models import VISION, make_base, run
from tests.train_loop.test_architectures import eval_loss
from train_loop.model.adapters import add_adapter
from train_loop.model.load import load_base
from train_loop.model.source import ModelPlaces
from train_loop.model.tokenizer import load_tokenizer
from train_loop.plan import Hardware, make_plan
from train_loop.spec import JobSpec

HP = "train_config.hyperparameters"
ADAPTER = "train_config.adapter_config"
FULL = {"train_config.train_type": "full", f"{HP}.learning_rate": 0.003}
SUFFIXES = {f"{ADAPTER}.targets": ["q_proj", "k_proj"]}


@pytest.fixture(scope="module")
def vision_bases(tmp_path_factory, tokenizer):
    mirror = tmp_path_factory.mktemp("vision_bases")
    for name in VISION:
        make_base(name, mirror, tokenizer)
    return mirror


@pytest.fixture
def job_of(local_job):
    def make(name, changes):
        quiet = {"train_config.torch_dtype": "float32", f"{HP}.max_steps": 2, f"{ADAPTER}.r": 4}
        return local_job(quiet | {"model_details": {"base_model": f"tuneyard/{name}"}} | changes, num_rows=20)

    return make


def load(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def is_vision(name):
    return any(part in name for part in ("vision", "projector", "connector"))


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("changes", [{}, SUFFIXES, FULL])
def test_what_learns_is_of_the_language_model_and_the_plan_counts_it(name, changes, job_of, vision_bases):
    job = job_of(name, changes)
    spec = JobSpec.model_validate(job)
    base = load_base(spec, vision_bases / "tuneyard" / name, torch.device("cpu")).model
    assert any(is_vision(n) and n.endswith("q_proj.weight") for n, _ in base.named_parameters())
    model = base if changes is FULL else add_adapter(base, spec)
    learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n in learns if is_vision(n)] == []
    if changes is FULL:
        assert learns.keys() == {n for n, _ in base.named_parameters() if not is_vision(n)}
    planned = make_plan(spec, ModelPlaces(str(vision_bases)), Hardware("cpu", 1 << 30, 1e9))
    assert planned["trainable_params"] == sum(p.numel() for p in learns.values())


def test_its_adapter_loads_with_plain_peft(job_of, vision_bases, tmp_path):
    from peft import PeftModel

    job = job_of("llava", SUFFIXES)
    manifest = run(job, tmp_path, vision_bases)
    adapter = tmp_path / "run/adapter"
    metrics = manifest["metrics"]
    assert metrics["eval_loss_after"] != pytest.approx(metrics["eval_loss_before"], abs=1e-3)
    theirs = PeftModel.from_pretrained(load(vision_bases / "tuneyard/llava"), adapter).eval()
    assert eval_loss(theirs, load_tokenizer(adapter), job, manifest) == pytest.approx(metrics["eval_loss_after"], rel=1e-5)


@pytest.mark.parametrize("name", VISION)
def test_its_whole_model_is_handed_out_with_the_vision_tower_of_the_base(name, job_of, vision_bases, tmp_path):
    job = job_of(name, FULL)
    manifest = run(job, tmp_path, vision_bases)
    merged, base = tmp_path / "run/merged", vision_bases / "tuneyard" / name
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    assert {n for n in before if torch.equal(before[n], after[n])} == {n for n in before if is_vision(n)}
    loss = eval_loss(load(merged), load_tokenizer(merged), job, manifest)
    assert loss == pytest.approx(manifest["metrics"]["eval_loss_after"], rel=1e-5)
    told = (merged / "README.md").read_text()
    assert ("AutoModelForImageTextToText" if name != "gemma3_vision" else "AutoModelForCausalLM") in told
