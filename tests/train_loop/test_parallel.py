"""However the workers share batch and model, the run takes the same steps."""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import DOCUMENTED, TINY, rows, with_fields, write_jsonl
from tests.train_loop.group import run_group
from tests.train_loop.models import run
from tests.train_loop.runs import Watcher, curve
from tests.train_loop.test_adapters import batch_of, load, logits, plain_peft
from train_loop.errors import Stopped
from train_loop.spec import JobSpec

HP = "train_config.hyperparameters"
STEPS, FEW_STEPS, BATCH = 20, 6, 8
THREE = {"train_config.hyperparameters.max_steps": 3}
FSDP = {"train_config.distributed.type": "fsdp"}
NF4 = {"model_details.quantization": {"quant_bits": 4}}
FULL = {"train_config.train_type": "full", f"{HP}.learning_rate": 0.001}
ADAPTER = "train_config.adapter_config"
PISSA = {f"{ADAPTER}.init": "pissa", f"{HP}.max_steps": FEW_STEPS}  # both matrices have a gradient from the first step on
WHAT = {"lora": {}, "nf4": NF4, "full": FULL}
INT8 = {"model_details.quantization": {"quant_bits": 8}}
FP4 = {"model_details.quantization": {"quant_bits": 4, "quant_type": "fp4", "double_quant": False}}
MERGE = {"train_config.export": {"merge": True}}
FLAT = {f"{HP}.gradient_checkpointing": False, "dataset_config.preprocessing.packing": False}
# On two workers against one, a few steps each: what it is, what the job has, and how its workers share it.
ON_TWO = {
    "fsdp plain": (MERGE, FSDP),
    "fsdp nf4": (NF4 | MERGE, FSDP),
    "fsdp fp4": (FP4, FSDP),
    "ddp nf4": (NF4, {}),
    "ddp nf4 flat": (NF4 | FLAT, {}),
    "ddp flat": (FLAT, {}),
    "ddp int8": (INT8, {}),
    "fsdp flat": (FLAT, FSDP),
    "fsdp accumulation": ({f"{HP}.gradient_accumulation_steps": 2, f"{HP}.per_device_train_batch_size": 2}, FSDP),
    "fsdp modules_to_save": ({f"{ADAPTER}.modules_to_save": ["lm_head", "norm"]} | MERGE, FSDP),
    "fsdp dora": ({f"{ADAPTER}.use_dora": True} | MERGE, FSDP),
    "fsdp bfloat16": ({"train_config.torch_dtype": "bfloat16"} | MERGE, FSDP),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mirror):
    """A folder with prepared rows of very different lengths, some of them cut, which don't fill the last step of an epoch."""
    folder = tmp_path_factory.mktemp("parallel")
    write_jsonl(folder / "rows.jsonl", rows(36, longest=101))
    with pytest.raises(Stopped):
        launch(folder, mirror, "prepared", job(folder), Watcher(stop_at=0))
    return folder


def job(folder, changes=None, *, workers=1, accumulation=1):
    base = {
        "dataset_details": {"dataset_path": str(folder / "rows.jsonl"), "source_type": "local", "ownership": "public"},
        "dataset_config.preprocessing.prompt.max_length": 128,
        "dataset_config.split.ratios": [0.92, 0.08],
        "model_details": {"base_model": TINY},
        "train_config.torch_dtype": "float32",
        "train_config.adapter_config": {"r": 4, "dropout": 0.0},
        HP: {
            "per_device_train_batch_size": BATCH // workers // accumulation,
            "gradient_accumulation_steps": accumulation,
            "max_steps": STEPS,
            "logging_steps": 1,
            "learning_rate": 0.01,
            "dataloader_num_workers": 0,
            "max_grad_norm": 1e9,
            "save_steps": 1,
            "save_total_limit": 100,
        },
        "infra_config": {"gpu_type": "cpu", "gpu_count": workers},
    }
    return with_fields(DOCUMENTED, base | (changes or {}))


def launch(folder, mirror, name, job, monitor=None):
    return run(job, folder, mirror, name, monitor or Watcher())


def few(changes):
    return changes | {f"{HP}.max_steps": FEW_STEPS, f"{HP}.save_steps": 2}


@pytest.fixture(scope="module")
def runs(folder, mirror):
    """Every run of this module: in this process, on two workers, on four."""
    alone = {"1x8": job(folder), "1x4x2": job(folder, accumulation=2), "1x2x4": job(folder, accumulation=4)}
    for name, changes in WHAT.items():
        alone[f"alone-{name}"] = job(folder, few(changes))
    alone["pissa 1x8"] = job(folder, PISSA)
    for name, (changes, _) in ON_TWO.items():
        alone[f"one {name}"] = job(folder, few(changes) | THREE, workers=2)
    for name, made in alone.items():
        launch(folder, mirror, name, made)
    on_two = [("2x4", job(folder, workers=2), None), ("2x2x2", job(folder, workers=2, accumulation=2), None)]
    on_four = [("4x2", job(folder, workers=4), None)]
    on_two.append(("pissa 2x2x2", job(folder, PISSA, workers=2, accumulation=2), None))
    on_four.append(("pissa 4x2", job(folder, PISSA, workers=4), None))
    for name, changes in WHAT.items():
        two = job(folder, few(changes) | FSDP, workers=2)
        on_two.append((f"fsdp-2-{name}", two, None))
        on_four.append((f"fsdp-4-{name}", job(folder, few(changes) | FSDP, workers=4), None))
        if name != "lora":
            on_two += [(f"cut-{name}", two, 3), (f"cut-{name}", two, None)]
    on_two.append(("fewer", two, 3))
    for name, (changes, shared) in ON_TWO.items():
        on_two.append((f"two {name}", job(folder, few(changes | shared) | THREE, workers=2), None))
    on_two.append(("ddp-2-full", job(folder, few(FULL), workers=2), None))
    for world_size, them in ((2, on_two), (4, on_four)):
        run_group(folder, world_size, them, folder / "prepared/data", mirror / TINY)
    return folder


def close(a, b, rel=1e-4):
    """The same curves. Adam divides gradients by their own size, so rounding doubles with every step, and shows in the gradient's
    norm long before it does in the loss: from 1e-7 at the first to 1e-4 at the eighth, where losses agree to 4e-7."""
    a, b = curve(a), curve(b)
    assert [p["step"] for p in a] == [p["step"] for p in b]
    for name, allowed in (("loss", rel), ("grad_norm", 10 * rel), ("eval_loss", rel)):
        assert [p[name] for p in a if name in p] == pytest.approx([p[name] for p in b if name in p], rel=allowed), name


def first_gradients(folder):
    """Adam's first moment after one step is a tenth of the gradient, which nothing has clipped."""
    state = torch.load(folder / "checkpoints/step-00000001/optimizer.pt")["state"]
    return [10 * state[i]["exp_avg"] for i in sorted(state)]


def weights(folder):
    (file,) = (*folder.glob("adapter/*.safetensors"), *folder.glob("merged/*.safetensors"))
    return load_file(file)


@pytest.mark.parametrize("shape", ["1x4x2", "1x2x4", "2x4", "2x2x2", "4x2", "pissa 2x2x2", "pissa 4x2"])
def test_workers_batch_and_accumulation_are_the_same_step(runs, shape):
    alone = runs / ("pissa 1x8" if "pissa" in shape else "1x8")
    close(runs / shape, alone)
    gradients = first_gradients(alone)
    assert sum(bool(g.abs().max() > 1e-3) for g in gradients) >= len(gradients) // (1 if "pissa" in shape else 2)
    for mine, reference in zip(first_gradients(runs / shape), gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("what", WHAT)
def test_a_sharded_model_takes_the_steps_of_a_whole_one(runs, what, world_size):
    sharded, alone = runs / f"fsdp-{world_size}-{what}", runs / f"alone-{what}"
    close(sharded, alone)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(sharded)[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ON_TWO)
def test_two_workers_take_the_steps_of_one(runs, name):
    # LLM.int8() rounds by the largest number of a row of activations, bf16 by its place in a sum.
    close(runs / f"two {name}", runs / f"one {name}", rel=2e-2 if "int8" in name or "bfloat16" in name else 1e-4)


@pytest.mark.parametrize("base", ["", "nf4 "])
def test_neither_packing_nor_checkpointing_changes_a_step_on_any_number_of_workers(runs, base):
    close(runs / f"two ddp {base}flat", runs / (f"one ddp {base}flat"))
    close(runs / f"one ddp {base}flat", runs / ("one ddp nf4" if base else "one fsdp plain"))


@pytest.mark.parametrize("name", [name for name, (changes, _) in ON_TWO.items() if changes.keys() >= MERGE.keys()])
def test_a_sharded_run_merges_what_it_trained(runs, mirror, tokenizer, name):
    from transformers import AutoModelForCausalLM

    sharded, alone = runs / f"two {name}", runs / f"one {name}"
    spec, batch = JobSpec.model_validate(job(runs, ON_TWO[name][0])), batch_of(tokenizer)
    ours = logits(AutoModelForCausalLM.from_pretrained(sharded / "merged", dtype=torch.float32), batch)
    theirs = logits(plain_peft(spec, mirror, sharded / "adapter"), batch)
    tolerance = 5e-2 if "bfloat16" in name else 1e-3
    assert (theirs - logits(load(spec, mirror), batch)).abs().max() > 4 * tolerance
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)

    files = [load_file(folder / "merged/model.safetensors") for folder in (sharded, alone)]
    assert files[0].keys() == files[1].keys()
    for tensor, reference in zip(files[0].values(), (files[1][n] for n in files[0]), strict=True):
        torch.testing.assert_close(tensor, reference, rtol=1e-2, atol=max(1e-3, tolerance / 5))


def test_full_weights_are_trained_alike_by_ddp(runs):
    close(runs / "ddp-2-full", runs / "alone-full")


@pytest.mark.parametrize("what", ["nf4", "full"])
def test_a_sharded_run_resumes_to_the_same_bytes(runs, what):
    whole, cut = runs / f"fsdp-2-{what}", runs / f"cut-{what}"
    assert curve(cut) == curve(whole)
    assert all(torch.equal(weights(cut)[name], tensor) for name, tensor in weights(whole).items())


def test_a_sharded_run_goes_on_with_fewer_workers(runs, mirror):
    launch(runs, mirror, "fewer", job(runs, few(FULL) | FSDP, workers=2))
    close(runs / "fewer", runs / "fsdp-2-full")
