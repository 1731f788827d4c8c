"""Plans: what they say must be what the run then does."""

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow.fs import LocalFileSystem

from tests.conftest import TINY, rows, with_fields, write_jsonl
from tests.train_loop.models import make_base
from train_loop.__main__ import Console, main
from train_loop.context import LocalContext
from train_loop.errors import DatasetError, ModelError
from train_loop.loss import CHUNK_LOGITS, CHUNK_TOKENS
from train_loop.model.adapters import add_adapter, trainable
from train_loop.model.load import compute_dtype, load_base
from train_loop.model.source import ModelPlaces
from train_loop.plan import Hardware, ModelShape, make_plan, memory_of_a_worker, model_shape, this_machine
from train_loop.spec import JobSpec
from train_loop.trainee import load_trainee

HP = "train_config.hyperparameters"


def planned(job, mirror, hardware=None):
    return make_plan(JobSpec.model_validate(job), ModelPlaces(str(mirror)), hardware or this_machine())


def test_the_plan_is_what_the_run_does(local_job, mirror, tmp_path, capsys):
    job = local_job({f"{HP}.max_steps": None, f"{HP}.num_epochs": 2, f"{HP}.learning_rate": 0.0001})
    plan = planned(job, mirror)
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    assert main([str(path), "--local", "--storage", str(tmp_path / "runs"), "--mirror", str(mirror)]) == 0
    run = next((tmp_path / "runs").glob("*/*/manifest.json")).parent
    manifest = json.loads((run / "manifest.json").read_text())
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert plan["steps"] == manifest["steps"]
    assert plan["rows"]["total"] == manifest["dataset"]["rows"]
    assert plan["rows"]["exact"]
    assert plan["tokens"]["trained_on"] == pytest.approx(sum(p.get("tokens", 0) for p in points), rel=0.1)
    assert str(plan["trainable_params"]) in capsys.readouterr().err.replace(",", "")


def test_a_large_file_is_estimated_from_a_small_part_of_it(local_job, mirror, tmp_path):
    job = local_job()
    path = tmp_path / "rows.jsonl"
    with path.open("a") as file:
        file.write("".join(json.dumps(r) + "\n" for r in rows(30)) * 600)
    plan = planned(job, mirror)
    assert not plan["rows"]["exact"]
    assert plan["rows"]["read"] <= 9 * 32
    assert plan["rows"]["total"] == pytest.approx(18_040, rel=0.2)
    assert plan == planned(job, mirror)


def test_a_large_file_is_looked_at_in_other_places_than_its_head(local_job, mirror, tmp_path):
    job = local_job()
    write_jsonl(tmp_path / "rows.jsonl", [*rows(100), *({"conversation": [{"human": "Q", "assistant": "long " * 60}]},) * 8000])
    tokens = planned(job, mirror)["tokens"]
    assert tokens["per_row_mean"] > 50
    assert tokens["truncated_share"] == 0


def bytes_read():
    """That this process has asked the kernel for so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("dataset_type", ["jsonl", "json", "parquet"])
def test_little_of_a_large_file_is_read(local_job, mirror, tmp_path, dataset_type):
    path = tmp_path / f"rows.{dataset_type}"
    fields = {"dataset_path": str(path), "dataset_type": dataset_type, "dataset_format": "prompt_completion"}
    long = {"dataset_config.preprocessing.prompt.max_length": 4096}
    job = local_job({f"dataset_details.{name}": value for name, value in fields.items()} | long)

    def cost(num_rows):
        """Bytes that a plan reads, for so many rows of text that doesn't shrink."""
        texts = [f"{i} {random.Random(i).randbytes(90).hex()}" for i in range(num_rows)]
        match dataset_type:
            case "parquet":
                pq.write_table(pa.table({"prompt": texts, "completion": texts}), path, row_group_size=500)
            case "json":
                path.write_text(json.dumps([{"prompt": text, "completion": text} for text in texts]))
            case "jsonl":
                write_jsonl(path, [{"prompt": text, "completion": text} for text in texts])
        before = bytes_read()
        plan = planned(job, mirror)
        assert plan["rows"]["total"] == pytest.approx(num_rows, rel=0.2)
        return bytes_read() - before

    cost(10)  # which loads what the first plan of a process does
    alone = cost(10)
    assert cost(100_000) - alone < path.stat().st_size / 3  # nine places, however large it is


def test_samples_are_rendered_with_their_trained_tokens_marked(local_job, mirror):
    samples = planned(local_job(), mirror)["samples"]
    assert len(samples) == 3
    said = ["".join(s["text"] for s in sample["segments"] if s["trained"]) for sample in samples]
    assert said[0] == "It is 1.<|im_end|>"
    assert all("What is" in "".join(s["text"] for s in sample["segments"] if not s["trained"]) for sample in samples)
    assert all(0 < sample["trained_tokens"] < sample["tokens"] for sample in samples)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_config.preprocessing.prompt.max_length": 40}, "longer than max_length 40"),
        ({"train_config.adapter_config.r": 100}, "more than the model's hidden size 64"),
        ({"dataset_config.preprocessing.prompt.max_length": 9000}, "more than the model's context, 8192"),
        ({f"{HP}.per_device_train_batch_size": 500}, "every step is the whole dataset"),
        ({"dataset_config.preprocessing.prompt.max_length": 40}, "40 of 40 rows looked at are longer than max_length 40 (up to"),
        (
            {"dataset_config.preprocessing": {"prompt": {"max_length": 60}, "truncation": "reject", "max_reject_ratio": 1}},
            "tokens) and will be rejected",
        ),
        ({f"{HP}.learning_rate": 0.5}, "learning_rate 0.5 is outside what LoRA usually wants, 1e-05 to 0.001"),
        ({f"{HP}.learning_rate": 9e-6}, "learning_rate 9e-06 is outside what LoRA usually wants"),
        (
            {"train_config.train_type": "full", "model_details.quantization": None, f"{HP}.learning_rate": 2e-4},
            "learning_rate 0.0002 is outside what full fine-tuning usually wants, 1e-06 to 0.0001",
        ),
        ({"train_config.adapter_config.targets": ["no_such_layer"]}, "names no layer"),
    ],
)
def test_warnings(local_job, mirror, changes, said):
    usual = {f"{HP}.learning_rate": 0.0001}
    assert not any(said in w for w in planned(local_job(usual), mirror)["warnings"])
    assert any(said in w for w in planned(local_job(usual | changes), mirror)["warnings"])


@pytest.mark.parametrize("name", ["smollm", "qwen3_moe"])
@pytest.mark.parametrize(
    "changes",
    [
        {"init": "pissa"},
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["norm", "o_proj"]},
        {"targets": ["embed_tokens", "q_proj"]},
        {"targets": ["q_proj", "experts.down_proj"], "dropout": 0.0},
    ],
)
def test_trainable_parameters_are_those_of_the_adapter(name, changes, local_job, tmp_path, tokenizer):
    if "experts.down_proj" in changes.get("targets", ()) and name == "smollm":
        changes = {"targets": ["q_proj", "mlp.down_proj"]}
    base_model = make_base(name, tmp_path, tokenizer)
    fields = {f"train_config.adapter_config.{k}": v for k, v in changes.items()}
    job = local_job({"model_details": {"base_model": base_model}} | fields)
    spec, plan = JobSpec.model_validate(job), planned(job, tmp_path)
    base = load_base(spec, tmp_path / base_model, torch.device("cpu")).model
    assert plan["trainable_params"] == sum(p.numel() for p in trainable(add_adapter(base, spec)))
    assert any("experts get no adapter" in w for w in plan["warnings"]) == (
        name == "qwen3_moe" and "experts.down_proj" not in changes.get("targets", ())
    )


def test_a_split_is_empty_only_where_the_run_leaves_it_empty(local_job, mirror):
    def split(ratios, num_rows):
        job = local_job({"dataset_config.split.ratios": ratios}, num_rows)
        plan = planned(job, mirror)
        return plan["rows"]["train"], plan["rows"]["eval"], any("eval split is empty" in w for w in plan["warnings"])

    assert split([0.999, 0.001], 40) == (39, 1, False)
    assert split([0.9, 0.1], 2) == (1, 1, False)
    assert split([0.9, 0.1], 1) == (1, 0, True)


def test_memory_follows_what_it_depends_on(local_job, mirror):
    gpu = Hardware("cuda", 1 << 30, 1e14, price_per_hour=4.0)
    full = planned(local_job({"model_details.quantization": None}), mirror, gpu)
    four_bit = planned(local_job(), mirror, gpu)["memory"]
    kept = planned(local_job({f"{HP}.gradient_checkpointing": False}), mirror, gpu)["memory"]
    eight_bit = planned(local_job({"model_details.quantization": {"quant_bits": 8}}), mirror, gpu)["memory"]
    assert four_bit["weights_bytes"] < eight_bit["weights_bytes"] < full["memory"]["weights_bytes"]
    assert kept["activations_bytes"] > four_bit["activations_bytes"]
    parts = [v for k, v in four_bit.items() if k.endswith("_bytes") and k not in ("total_bytes", "available_bytes")]
    assert four_bit["total_bytes"] == sum(parts)
    assert full["price"] == pytest.approx(full["gpu_hours"] * 4.0, abs=0.01)
    poor = planned(local_job(), mirror, Hardware("cuda", 1 << 20, 1e14))
    assert any("a worker needs about" in w for w in poor["warnings"])


def test_a_gpu_s_head_holds_more_logits_at_a_time(local_job, mirror):
    spec = JobSpec.model_validate(local_job({"train_config.torch_dtype": "float32"}))
    shape = model_shape(spec, mirror / TINY)
    tokens, per_logit = 1 << 20, 8 + 4
    on_cpu, on_gpu = (
        memory_of_a_worker(spec, shape, tokens, Hardware(device, None, 1e14), evaluates=False)["logits_bytes"]
        for device in ("cpu", "cuda")
    )
    assert on_cpu == CHUNK_TOKENS * shape.vocab * per_logit
    assert on_cpu < on_gpu <= CHUNK_LOGITS * per_logit


def test_what_is_not_learned_has_no_logits(local_job, mirror):
    spec = JobSpec.model_validate(local_job({"train_config.torch_dtype": "float32"}))
    shape, cpu = model_shape(spec, mirror / TINY), Hardware("cpu", None, 1e14)
    memory = memory_of_a_worker(spec, shape, 1 << 20, cpu, evaluates=False, batch_supervised=100)
    assert memory["logits_bytes"] == 100 * shape.vocab * 8  # and what they become


def test_a_dataset_without_a_usable_row_has_no_plan(local_job, mirror, tmp_path):
    job = local_job()
    (tmp_path / "rows.jsonl").write_text('{"text": "no turns"}\n')
    with pytest.raises(DatasetError, match="none of the 1 rows"):
        planned(job, mirror)


CONFIG = "can't use the config.json of acme/odd"


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", "{}", CONFIG),
        ("config.json", '{"model_type": "no-such-type"}', CONFIG),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}', CONFIG),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}', CONFIG),
        ("config.json", '{"model_type": "clip"}', CONFIG),
        ("tokenizer.json", "{}", "the base model's tokenizer can't be loaded"),
    ],
)
def test_a_model_that_transformers_can_not_use_has_no_plan(local_job, mirror, tmp_path, file, text, said):
    folder = tmp_path / "models" / "acme" / "odd"
    shutil.copytree(mirror / TINY, folder)
    (folder / file).write_text(text)
    job = local_job({"model_details.base_model": "acme/odd"})
    with pytest.raises(ModelError, match=said) as caught:
        planned(job, tmp_path / "models")
    assert caught.value.field == "model_details.base_model"


def test_rows_that_would_fail_the_job_and_few_steps_are_warned_of(local_job, mirror, tmp_path):
    job = local_job({f"{HP}.max_steps": None})
    assert any("only" in w and "steps: raise num_epochs" in w for w in planned(job, mirror)["warnings"])
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": "no turns"}\n' * 3)
    why = '3 of 43 rows looked at can\'t be used (the first: no list "conversations" or "conversation"; '
    why += "its keys are those of dataset_format text)"
    assert f"{why}, more than max_reject_ratio = 0.01 allows: it will fail" in planned(job, mirror)["warnings"]
    patient = with_fields(job, {f"{HP}.num_epochs": 100, "dataset_config.preprocessing.max_reject_ratio": 0.1})
    warnings = planned(patient, mirror)["warnings"]
    assert f"{why}: they are left out" in warnings
    assert not any("raise num_epochs" in w for w in warnings)
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows(1)[0]))
    once = planned(job, mirror)["warnings"]
    assert "only 1 step: raise num_epochs, or lower the batch size" in once
    assert any(w.endswith("and there is 1: every step is the whole dataset") for w in once)


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("dataset_format", "row", "trained", "turns"),
    [
        ("openai", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}, "Hello", 2),
        ("alpaca", {"instruction": "Hi", "output": "Hello"}, "Hello", 2),
        ("prompt_completion", {"query": "Hi", "response": "Hello"}, "Hello", 2),
        ("preference", {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}, "Hello", 2),
        ("text", {"text": "Once upon a time."}, "Once upon a time.", 0),
        ("auto", {"text": "Once upon a time."}, "Once upon a time.", 0),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "Warm?"},
                    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
                    {"from": "observation", "value": "3 degrees"},
                    {"from": "gpt", "value": "Cold."},
                ],
                "tools": [TOOL],
            },
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>Cold.',
            4,
        ),
    ],
)
def test_samples_of_every_format_are_shown(local_job, mirror, tmp_path, dataset_format, row, trained, turns):
    template = (Path(__file__).parent / "templates/qwen2.5.jinja").read_text()
    changes = {"dataset_details.dataset_format": dataset_format, "dataset_config.preprocessing.prompt.template": template}
    job = local_job(changes)
    write_jsonl(tmp_path / "rows.jsonl", [row] * 2)
    sample = planned(job, mirror)["samples"][0]
    assert "".join(s["text"] for s in sample["segments"] if s["trained"]) == trained + "<|im_end|>"
    assert sample["turns"] == turns
    if "tools" in row:
        assert "weather" in sample["segments"][0]["text"]


@pytest.mark.parametrize("dataset_format", ["preference", "auto"])
def test_that_rejected_answers_are_left_out_is_said_once(local_job, mirror, tmp_path, dataset_format):
    job = local_job({"dataset_details.dataset_format": dataset_format})
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}] * 2)
    said = planned(job, mirror)["warnings"]
    assert len([w for w in said if "sft trains on the preferred answers of preference rows" in w]) == 1


def kept_for_backward(spec, mirror, tmp_path, tokens):
    """Bytes of the tensors that a forward pass of the blocks saves for two documents, and the names of the functions in its
    graph."""
    ctx = LocalContext(mirror / TINY, LocalFileSystem(), str(tmp_path), tmp_path, Console())
    trainee = load_trainee(spec, ctx)
    trainee.model.train()
    weights = {t.untyped_storage().data_ptr() for t in (*trainee.model.parameters(), *trainee.model.buffers())}
    kept = {}

    def save(tensor):
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids, positions = torch.zeros((1, tokens), dtype=torch.long), torch.arange(tokens)[None] % (tokens // 2)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved), trainee.autocast():
        blocks = trainee.model.get_base_model().base_model
        hidden = blocks(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    seen, ahead = set(), [hidden.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
    return sum(kept.values()), {node.name() for node in seen}


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("adapter", [{}, {"dropout": 0.0}, {"use_dora": True}, {"use_dora": True, "dropout": 0.0}], ids=str)
@pytest.mark.parametrize("torch_dtype", ["bfloat16", "float32"])
def test_activations_are_what_is_saved_for_the_backward_pass(bits, adapter, torch_dtype, local_job, mirror, tmp_path):
    changes = {f"train_config.adapter_config.{name}": value for name, value in adapter.items()}
    changes |= {"model_details.quantization": bits and {"quant_bits": bits}, "train_config.torch_dtype": torch_dtype}
    spec = JobSpec.model_validate(local_job(changes | {f"{HP}.gradient_checkpointing": False}))
    tokens, shape = 256, model_shape(spec, mirror / TINY)
    planned = memory_of_a_worker(spec, shape, tokens, this_machine(), evaluates=False)["activations_bytes"]
    kept, functions = kept_for_backward(spec, mirror, tmp_path, tokens)
    assert planned == pytest.approx(kept, rel=0.05)
    # bitsandbytes' own keeps its input beside what autograd saves, where checkpointing doesn't find it.
    assert not [name for name in functions if "MatMul8bit" in name]


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_checkpointing_leaves_what_goes_into_the_blocks(bits, local_job, mirror, tmp_path):
    spec = JobSpec.model_validate(local_job({"model_details.quantization": bits and {"quant_bits": bits}}))
    tokens, shape = 256, model_shape(spec, mirror / TINY)
    width = compute_dtype("bfloat16", torch.device("cpu"))[0].itemsize
    after_the_last = 2 * tokens * shape.hidden * 4  # of the norm, at most
    left = kept_for_backward(spec, mirror, tmp_path, tokens)[0]
    assert 0 <= left - tokens * shape.num_layers * shape.hidden * width <= after_the_last


def test_full_training_takes_more_memory_and_sharding_less(local_job, mirror):
    gpu = Hardware("cuda", 1 << 40, 1e14)
    quiet = {"model_details.quantization": None, "infra_config.gpu_count": 2}
    full = {"train_config.train_type": "full"}
    sharded = {"train_config.distributed.type": "fsdp"}
    lora, whole, shards = (planned(local_job(quiet | c), mirror, gpu) for c in ({}, full, full | sharded))
    assert whole["trainable_params"] > lora["trainable_params"]
    assert whole["memory"]["optimizer_bytes"] == 8 * whole["trainable_params"]
    for part in ("weights_bytes", "optimizer_bytes"):
        assert shards["memory"][part] == pytest.approx(whole["memory"][part] / 2, abs=1)
    assert not any("targets" in w for w in whole["warnings"])


def test_a_cpu_has_room_for_a_copy_of_what_is_trained_where_that_is_little(local_job, mirror, monkeypatch):
    cpu, gpu = (Hardware(device, 1 << 40, 1e14) for device in ("cpu", "cuda"))
    plan = planned(local_job(), mirror, cpu)
    assert plan["memory"]["checkpoint_bytes"] == 12 * plan["trainable_params"]  # and two moments
    assert planned(local_job(), mirror, gpu)["memory"]["checkpoint_bytes"] == 0
    monkeypatch.setattr("train_loop.snapshot.CPU_BYTES", 100)
    assert planned(local_job(), mirror, cpu)["memory"]["checkpoint_bytes"] == 0


def test_a_sharded_base_needs_room_for_all_of_it_where_it_is_loaded(local_job):
    """Eight billion parameters over sixteen workers, with little else in memory."""
    shape = ModelShape(
        linear_params=7 * 10**9,
        other_params=10**9,
        vision_params=0,
        num_layers=32,
        hidden=4096,
        intermediate=14336,
        attention=4096,
        key_value=1024,
        vocab=128256,
        context=8192,
        adapted=[(4096, 4096)],
        saved_params=0,
        leaves_experts=False,
        joins=True,
    )

    def memory(workers, kind, device, bits=None):
        quantization = bits and {"quant_bits": bits}
        infra = {"infra_config.gpu_count": workers, "train_config.distributed.type": kind}
        spec = JobSpec.model_validate(local_job(infra | {"model_details.quantization": quantization}))
        return memory_of_a_worker(spec, shape, 64, Hardware(device, None, 1e14), evaluates=True)

    whole = memory(1, "ddp", "cuda")["weights_bytes"]
    on_gpus = memory(16, "fsdp", "cuda")
    assert on_gpus["weights_bytes"] == whole / 16
    assert on_gpus["total_bytes"] < whole / 2
    assert memory(16, "fsdp", "cpu")["total_bytes"] > memory(1, "ddp", "cpu")["weights_bytes"]
    quantised = memory(1, "ddp", "cuda", 4)
    assert quantised["weights_bytes"] < memory(16, "fsdp", "cuda", 4)["total_bytes"] < quantised["total_bytes"]
