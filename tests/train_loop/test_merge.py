"""`export.merge` and `torch_dtype`, through the whole run: what is in merged/ is what was trained, plain, and listed."""

import json

import gguf
import pytest
import torch
from safetensors import safe_open

from tests.train_loop.models import run, samples
from tests.train_loop.test_architectures import eval_loss
from train_loop.__main__ import Console
from train_loop.data.packing import collate
from train_loop.errors import Stopped
from train_loop.loss import supervised_loss
from train_loop.model.adapters import add_adapter
from train_loop.model.load import compute_dtype, compute_in, load_base
from train_loop.model.merge import merged
from train_loop.model.tokenizer import load_tokenizer
from train_loop.spec import JobSpec

HP = "train_config.hyperparameters"
GGUF_NAMES = {"smollm": "LLAMA", "qwen3_moe": "QWEN3MOE"}
SMALL = {"train_config.adapter_config.r": 4, f"{HP}.max_steps": 3}


class Events(Console):
    def __init__(self):
        super().__init__()
        self.told = []

    def on_event(self, kind, message):
        self.told.append((kind, message))


@pytest.mark.parametrize(
    ("base", "bits", "dtype"), [("smollm", 4, "bfloat16"), ("smollm", 8, "float16"), ("qwen3_moe", None, "float32")]
)
def test_a_merged_model_is_plain_listed_and_has_the_eval_loss_of_the_run(base, bits, dtype, local_job, tmp_path, bases):
    from transformers import AutoModelForCausalLM

    changes = {
        "model_details": {"base_model": f"tuneyard/{base}", "quantization": bits and {"quant_bits": bits}},
        "train_config.torch_dtype": dtype,
        "train_config.export": {"merge": True},
        f"{HP}.learning_rate": 0.05,
    }
    events = Events()
    job = local_job(SMALL | changes, 20)
    manifest = run(job, tmp_path, bases, monitor=events)
    folder = tmp_path / "run/merged"
    assert {f["name"] for f in manifest["merged_files"]} == {p.name for p in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {p.name for p in folder.iterdir()}

    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == dtype
    assert config["use_cache"] == json.loads((bases / f"tuneyard/{base}/config.json").read_text())["use_cache"]
    num_layers = config["num_hidden_layers"]
    with (
        safe_open(folder / "model.safetensors", "pt") as ours,
        safe_open(bases / f"tuneyard/{base}/model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())  # those of the hub, a tied head left out
        assert {ours.get_tensor(k).dtype for k in ours.keys()} == {getattr(torch, dtype)}  # noqa: SIM118 - not a dict
        llama_cpp = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, GGUF_NAMES[base]), num_layers)
        found = {k: llama_cpp.get_name(k, try_suffixes=(".weight", ".bias")) for k in ours.keys()}  # noqa: SIM118
        # Experts one by one are what its converter puts together by itself.
        assert {k for k, name in found.items() if name is None and ".experts." not in k} == set()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = eval_loss(model, load_tokenizer(folder), job, manifest)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    before, after = (manifest["metrics"][f"eval_loss_{when}"] for when in ("before", "after"))
    assert abs(after - before) > 4 * tolerance * after
    assert theirs == pytest.approx(after, rel=tolerance)
    assert any("torch_dtype stays float16" in message for _, message in events.told) == (dtype == "float16")


@pytest.mark.parametrize("base", ["smollm", "qwen3_moe"])
def test_merging_widens_no_weight_that_the_adapter_leaves_alone(base, local_job, bases):
    targets = ["q_proj", "experts.gate_up_proj"] if base == "qwen3_moe" else ["q_proj"]
    adapter = {"train_config.adapter_config": {"r": 4, "targets": targets, "dropout": 0.0}}
    details = {"model_details": {"base_model": f"tuneyard/{base}"}, "train_config.torch_dtype": "float32"}
    spec = JobSpec.model_validate(local_job(details | adapter))
    loaded = load_base(spec, bases / f"tuneyard/{base}", torch.device("cpu")).model
    compute_in(loaded, torch.bfloat16)
    model = add_adapter(loaded, spec)
    places = {n: p.data_ptr() for n, p in loaded.named_parameters()}
    whole = merged(model, torch.bfloat16)
    moved = {n for n, p in whole.named_parameters() if p.data_ptr() != places.get(n)}
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in moved} == {t.partition(".")[0] for t in targets}


def test_float16_is_computed_in_what_can_hold_its_gradients():
    dtype, note = compute_dtype("float16", torch.device("cpu"))
    assert dtype in (torch.bfloat16, torch.float32)
    assert note.endswith("(torch_dtype stays float16)")


def test_eight_bit_layers_compute_in_another_dtype_and_back(local_job, bases, tokenizer):
    changes = {"model_details": {"base_model": "tuneyard/smollm", "quantization": {"quant_bits": 8}}}
    spec = JobSpec.model_validate(local_job(changes | {"train_config.torch_dtype": "float32"}))
    model = load_base(spec, bases / "tuneyard/smollm", torch.device("cpu")).model
    batch = collate(samples(tokenizer), capacity=128, pad_id=0)

    def loss():
        with torch.no_grad():
            return supervised_loss(model.eval(), batch).item()

    exact = loss()
    compute_in(model, torch.bfloat16)
    assert loss() == pytest.approx(exact, rel=2e-2)
    assert loss() != exact
    compute_in(model, torch.float32)
    assert loss() == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize(
    "adapter", [{"init": "pissa"}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"lora_plus_ratio": 4.0}]
)
def test_an_adapter_goes_on_after_a_stop_as_if_it_had_never_stopped(adapter, local_job, tmp_path, bases):
    from safetensors.torch import load_file

    class StopAfter(Console):
        seen = 0

        def on_progress(self, progress):
            self.seen = progress["step"]

        def stop_requested(self):
            return self.seen >= 2

    job = local_job(
        SMALL | {"model_details.base_model": "tuneyard/smollm", f"{HP}.max_steps": 4},
        20,
    )
    job["train_config"]["adapter_config"] |= adapter
    run(job, tmp_path, bases, "whole")
    with pytest.raises(Stopped):
        run(job, tmp_path, bases, "cut", StopAfter())
    run(job, tmp_path, bases, "cut")
    whole, cut = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
