"""The loop on a tiny model, in this process: it learns, resumes exactly, and what it reports is what plain PEFT measures."""

import json
from pathlib import Path

import pytest
import torch
from pyarrow.fs import LocalFileSystem
from safetensors.torch import load_file

from tests.conftest import TINY, write_jsonl
from tests.train_loop.models import run
from train_loop import tensorboard
from train_loop.__main__ import Console, main
from train_loop.data.packing import collate
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import DatasetError, Stopped, TrainingError
from train_loop.layout import TENSORBOARD
from train_loop.loss import supervised_loss
from train_loop.model.adapters import add_adapter, trainable
from train_loop.model.load import load_base, quantization_config
from train_loop.model.tokenizer import load_tokenizer
from train_loop.spec import JobSpec


class StopAfter(Console):
    """A monitor that asks to stop once a step has been reported."""

    def __init__(self, step):
        super().__init__()
        self.at, self.seen = step, 0

    def on_progress(self, progress):
        self.seen = progress["step"]

    def stop_requested(self):
        return self.seen >= self.at


def adapter(tmp_path, name="run"):
    return load_file(tmp_path / name / "adapter/adapter_model.safetensors")


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lazy", [True, False])
def test_packing_and_lazy_tokenisation_do_not_change_the_run(local_job, tmp_path, mirror, packing, lazy):
    quiet = {
        "train_config.adapter_config.dropout": 0.0,
        "train_config.torch_dtype": "float32",
        "model_details.quantization": None,
    }
    run(local_job(quiet), tmp_path, mirror, "reference")
    changes = {"dataset_config.preprocessing.packing": packing, "dataset_config.preprocessing.lazy_tokenize": lazy}
    run(local_job(quiet | changes), tmp_path, mirror)
    a, b = ([json.loads(x).get("loss") for x in (tmp_path / n / "metrics.jsonl").open()] for n in ("reference", "run"))
    assert [x for x in a if x] == pytest.approx([x for x in b if x], rel=1e-4)


def test_rows_of_every_shape_train_the_same_lazily_and_eagerly(local_job, tmp_path, mirror):
    tool = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    calling = [("human", "Warm?"), ("function_call", '{"name": "weather", "arguments": {}}'), ("tool", "3"), ("gpt", "Cold.")]
    turns = [("user", "One?"), ("assistant", "Not this."), ("user", "Two?"), ("assistant", "But this.")]
    weighted = [{"role": r, "content": c} | ({"weight": 0} if c == "Not this." else {}) for r, c in turns]
    mixed = [
        {"text": "Once upon a time there was a ship."},
        {"instruction": "Say hello.", "input": "", "output": "Hello."},
        {"conversations": [{"from": r, "value": v} for r, v in calling], "tools": [tool]},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello"},
        {"messages": weighted},
        {"prompt": "Good day", "chosen": "And to you.", "rejected": "Is it?"},
    ]
    job = local_job(
        {
            "dataset_details.dataset_format": "auto",
            "dataset_config.split": {"type": "none"},
            "dataset_config.preprocessing.prompt.template": (Path(__file__).parent / "templates/qwen3.jinja").read_text(),
            "train_config.hyperparameters.max_steps": 2,
            "train_config.torch_dtype": "float32",
            "model_details.quantization": None,
        }
    )
    write_jsonl(Path(job["dataset_details"]["dataset_path"]), mixed * 3)
    for lazy in (True, False):
        job["dataset_config"]["preprocessing"]["lazy_tokenize"] = lazy
        assert run(job, tmp_path, mirror, f"lazy-{lazy}")["dataset"]["rejected"] == 0
    exported = (tmp_path / "lazy-True/adapter/chat_template.jinja").read_text()
    assert exported == job["dataset_config"]["preprocessing"]["prompt"]["template"]
    lazy, eager = adapter(tmp_path, "lazy-True"), adapter(tmp_path, "lazy-False")
    assert all(torch.equal(lazy[k], eager[k]) for k in lazy)


def test_it_learns_and_leaves_a_complete_run_folder(local_job, tmp_path, mirror):
    job = local_job({"train_config.hyperparameters.max_steps": 12, "train_config.hyperparameters.save_steps": 4})
    manifest = run(job, tmp_path, mirror)
    folder = tmp_path / "run"
    assert manifest["metrics"]["eval_loss_after"] < manifest["metrics"]["eval_loss_before"] - 0.2
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert {p.name for p in folder.iterdir()} == {
        "adapter",
        "checkpoints",
        "data",
        "job.json",
        "manifest.json",
        "metrics.jsonl",
        "rejected.jsonl",
        "tensorboard",
    }
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= {
        f["name"] for f in manifest["adapter_files"]
    }
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [p["step"] for p in points if "loss" in p] == list(range(1, 13))
    assert (folder / TENSORBOARD).read_bytes() == tensorboard.start() + b"".join(map(tensorboard.event, points))
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-00000008", "step-00000012"]


def test_the_same_job_gives_the_same_adapter_and_so_does_a_stopped_and_resumed_one(local_job, tmp_path, mirror):
    job = local_job({"train_config.hyperparameters.max_steps": 6})
    run(job, tmp_path, mirror, "whole")
    with pytest.raises(Stopped):
        run(job, tmp_path, mirror, "cut", StopAfter(3))
    assert not (tmp_path / "cut/manifest.json").exists()
    run(job, tmp_path, mirror, "cut")
    whole, cut = adapter(tmp_path, "whole"), adapter(tmp_path, "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_gradient_accumulation_takes_the_same_steps_as_a_larger_batch(local_job, tmp_path, mirror):
    base = {"train_config.adapter_config.dropout": 0.0, "train_config.torch_dtype": "float32", "model_details.quantization": None}
    hp = "train_config.hyperparameters"
    run(local_job(base | {f"{hp}.per_device_train_batch_size": 8}), tmp_path, mirror, "one")
    run(
        local_job(base | {f"{hp}.per_device_train_batch_size": 2, f"{hp}.gradient_accumulation_steps": 4}),
        tmp_path,
        mirror,
        "four",
    )
    one, four = adapter(tmp_path, "one"), adapter(tmp_path, "four")
    for key in one:
        torch.testing.assert_close(one[key], four[key], rtol=1e-3, atol=1e-4)


def test_nf4_gradients_survive_an_evaluation(local_job, mirror, tokenizer):
    """bitsandbytes repacks 4-bit layers in eval mode on some CPUs, for a kernel without a backward."""
    spec = JobSpec.model_validate(local_job())
    model = add_adapter(load_base(spec, mirror / spec.model_details.base_model, torch.device("cpu")).model, spec)
    chat = ChatTokenizer(tokenizer, spec.dataset_config.preprocessing.prompt, "right", "assistant")
    sample = chat.encode({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]})
    micro = collate([sample] * 3, capacity=None, pad_id=2)

    def gradients():
        for p in trainable(model):
            p.grad = None
        supervised_loss(model.eval() and model, micro).backward()
        return [p.grad.clone() for p in trainable(model)]

    first = gradients()
    with torch.no_grad():
        supervised_loss(model, micro)
    assert any(g.abs().sum() > 0 for g in first)
    for a, b in zip(first, gradients(), strict=True):
        torch.testing.assert_close(a, b)


def test_plain_peft_and_transformers_reproduce_the_reported_eval_loss(local_job, tmp_path, mirror):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job = local_job({"train_config.hyperparameters.max_steps": 8})
    manifest = run(job, tmp_path, mirror)
    spec = JobSpec.model_validate(job)
    folder = mirror / spec.model_details.base_model
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=quantization_config(spec.model_details.quantization, torch.float32),
        device_map={"": "cpu"},
    )
    model = PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()
    tokenizer = load_tokenizer(tmp_path / "run/adapter")
    lines = Path(spec.dataset_details.dataset_path).read_text().splitlines()
    total = count = 0
    for number in manifest["dataset"]["eval_lines"]:
        row = json.loads(lines[number - 1])
        turns = row.get("conversation") or [
            {"human": row["conversations"][0]["value"], "assistant": row["conversations"][1]["value"]}
        ]
        prompt = [{"role": "user", "content": turns[0]["human"]}]
        head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(head + turns[0]["assistant"] + "<|im_end|>\n", return_tensors="pt", add_special_tokens=False)["input_ids"]
        start = len(tokenizer(head, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        targets = ids[0, 1:]
        spoken = slice(start - 1, len(targets) - 1)  # up to <|im_end|>, without the line end
        total += torch.nn.functional.cross_entropy(logits[spoken], targets[spoken], reduction="sum").item()
        count += len(targets[spoken])
    rounding = 1e-3 if torch.cuda.is_available() else 1e-4  # a GPU evaluates in bfloat16
    assert total / count == pytest.approx(manifest["metrics"]["eval_loss_after"], abs=rounding)


def test_the_command_without_ray(local_job, tmp_path, mirror, capsys):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(local_job()))
    code = main([str(path), "--local", "--storage", str(tmp_path / "runs"), "--mirror", str(mirror)])
    answer = json.loads(capsys.readouterr().out)
    assert code == 0
    assert answer["status"] == "COMPLETED"
    assert LocalFileSystem().get_file_info(answer["adapter_uri"]).type.name == "Directory"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_details.dataset_path": "/nowhere/rows.jsonl"}, "there is no object at"),
        ({"model_details.base_model": "nobody/nothing"}, "neither in the model mirror"),
        ({"train_config.adapter_config.targets": ["no_such_layer"]}, "the adapter doesn't fit"),
        ({"dataset_config.preprocessing.prompt.max_length": 16}, "no usable row in"),
        ({"train_config.hyperparameters.learning_rate": "x"}, "train_config.hyperparameters.learning_rate"),
        ({"train_config.hyperparameters.lr": 1}, "train_config.hyperparameters.lr: unknown field\n"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_sentence(local_job, tmp_path, mirror, capsys, changes, said):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(local_job(changes)))
    assert main([str(path), "--local", "--storage", str(tmp_path / "runs"), "--mirror", str(mirror)]) in (1, 2)
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


@pytest.fixture
def model_without_a_word(mirror, tmp_path, tokenizer):
    """A mirror with a model for which one token, and it alone, isn't a number; and the token's text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(mirror / TINY)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    (token,) = tokenizer(" zebra", add_special_tokens=False)["input_ids"]
    model.model.embed_tokens.weight.data[token] = float("nan")
    model.save_pretrained(tmp_path / "mirror" / TINY)
    tokenizer.save_pretrained(tmp_path / "mirror" / TINY)
    return tmp_path / "mirror", " zebra"


def test_a_loss_that_is_not_a_number_names_the_step_and_the_row(local_job, tmp_path, model_without_a_word):
    mirror, word = model_without_a_word
    job = local_job({"train_config.hyperparameters.per_device_train_batch_size": 1, "train_config.hyperparameters.max_steps": 60})
    path = Path(job["dataset_details"]["dataset_path"])
    lines = path.read_text().splitlines()
    lines[6:6] = ["", "{broken"]  # what isn't a row counts as a line
    lines[8] = lines[8].replace("It is", "It is" + word)
    path.write_text("\n".join(lines))
    job["dataset_config"]["preprocessing"]["max_reject_ratio"] = 0.1
    with pytest.raises(TrainingError) as caught:
        run(job, tmp_path, mirror)
    assert caught.value.code == "loss_not_finite"
    assert caught.value.message.endswith(f"look at these rows of that step: {path} line 9")
    assert "at step " in caught.value.message


def test_a_template_at_fault_is_told_the_same_from_a_process_of_the_loader(local_job, tmp_path, mirror):
    rewrites = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    changes = {
        "dataset_config.preprocessing.prompt.template": rewrites,
        "dataset_config.split": {"type": "none"},
        "train_config.hyperparameters.dataloader_num_workers": 1,
    }
    with pytest.raises(DatasetError) as caught:
        run(local_job(changes), tmp_path, mirror)
    assert caught.value.code == "template_error"
    assert caught.value.message.startswith("the chat template rewrites earlier turns")
