"""However the workers share batch and model, the run takes the same steps."""

import json

import pytest
import torch
from pyarrow.fs import LocalFileSystem
from safetensors.torch import load_file

from tests.conftest import DOCUMENTED, TINY, rows, with_fields, write_jsonl
from tests.train_loop.group import run_group
from tests.train_loop.models import run
from tests.train_loop.runs import Watcher, curve
from tests.train_loop.test_adapters import batch_of, load, logits, plain_peft
from train_loop.context import LocalContext
from train_loop.errors import Stopped
from train_loop.model.tokenizer import load_tokenizer
from train_loop.parallel import sync_gradients
from train_loop.spec import JobSpec

HP = "train_config.hyperparameters"
SMALL = "tuneyard/of-few-words"
STEPS, FEW_STEPS, BATCH = 20, 6, 8
THREE = {f"{HP}.max_steps": 3, f"{HP}.save_steps": 1}
FSDP = {"train_config.distributed.type": "fsdp"}
NF4 = {"model_details.quantization": {"quant_bits": 4}}
FULL = {"train_config.train_type": "full", f"{HP}.learning_rate": 0.001}
ADAPTER = "train_config.adapter_config"
PISSA = {f"{ADAPTER}.init": "pissa", f"{HP}.max_steps": FEW_STEPS}  # both matrices have a gradient from the first step on
WHAT = {"lora": {}, "nf4": NF4, "full": FULL}
INT8 = {"model_details.quantization": {"quant_bits": 8}}
FP4 = {"model_details.quantization": {"quant_bits": 4, "quant_type": "fp4", "double_quant": False}}
DORA = {f"{ADAPTER}.use_dora": True}
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
    "fsdp dora": (DORA | MERGE, FSDP),
    "fsdp nf4 dora": (NF4 | DORA | MERGE, FSDP),
    "ddp full": (FULL, {}),
    "fsdp rslora": ({f"{ADAPTER}.use_rslora": True}, FSDP),
    "fsdp bfloat16": ({"train_config.torch_dtype": "bfloat16"} | MERGE, FSDP),
}
# On four: what it is, how they share it, and which of those on one worker takes the same steps.
ON_FOUR = {
    ("ddp", "rslora"): "fsdp rslora",
    ("ddp", "dora"): "fsdp dora",
    ("ddp", "full"): "ddp full",
    ("ddp", "nf4"): "ddp nf4",
    ("ddp", "int8"): "ddp int8",
    ("fsdp", "dora"): "fsdp dora",
    ("fsdp", "full"): "ddp full",
    ("fsdp", "nf4"): "ddp nf4",
    ("fsdp", "nf4 dora"): "fsdp nf4 dora",
}
# Sharded, and stopped at each of these steps in turn. Dropout is what each rank draws for itself.
DROPOUT, EACH = {f"{ADAPTER}.dropout": 0.2}, range(1, FEW_STEPS)
CUT = {"dropout": (DROPOUT, EACH), "nf4": (NF4, (3,)), "full": (FULL, EACH)}
WORSENS = {
    f"{HP}.max_steps": 20,
    f"{HP}.lr_scheduler_type": "constant",
    f"{HP}.eval_steps": 1,
    f"{HP}.early_stopping_patience": 1,
    f"{HP}.save_total_limit": 1,
}
# At such rates some evaluation soon is worse than the one before.
BEST = {
    "lora": WORSENS | {f"{HP}.learning_rate": 0.5, f"{ADAPTER}.alpha": 1024},
    "full": WORSENS | FULL | {f"{HP}.learning_rate": 0.1},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, mirror):
    """The tiny model with few words: with the usual many, nearly all that a run does is its tokenizer, and the model's head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("bases")
    said = [*map(json.dumps, rows(36, longest=101)), " ".join(f"word{i}" for i in range(7)) * 36]  # those of `samples` too
    tokenizer = load_tokenizer(mirror / TINY).train_new_from_iterator(said, 512)
    config = AutoConfig.from_pretrained(mirror / TINY)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config.update(ids | {"vocab_size": len(tokenizer), "initializer_range": 0.04})  # at 0.02 a gradient is next to nothing
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / SMALL)
    tokenizer.save_pretrained(folder / SMALL)
    return folder


@pytest.fixture(scope="module")
def tokenizer(bases):
    return load_tokenizer(bases / SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bases):
    """A folder with prepared rows of very different lengths, some of them cut, which don't fill the last step of an epoch."""
    folder = tmp_path_factory.mktemp("parallel")
    write_jsonl(folder / "rows.jsonl", rows(36, longest=101))
    with pytest.raises(Stopped):
        launch(folder, bases, "prepared", job(folder), Watcher(stop_at=0))
    return folder


def job(folder, changes=None, *, workers=1, accumulation=1):
    base = {
        "dataset_details": {"dataset_path": str(folder / "rows.jsonl"), "source_type": "local", "ownership": "public"},
        "dataset_config.preprocessing.prompt.max_length": 128,
        "dataset_config.split.ratios": [0.92, 0.08],
        "model_details": {"base_model": SMALL},
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


def launch(folder, bases, name, job, monitor=None):
    return run(job, folder, bases, name, monitor or Watcher())


def few(changes):
    return changes | {f"{HP}.max_steps": FEW_STEPS, f"{HP}.save_steps": 2}


@pytest.fixture(scope="module")
def alone(folder, bases):
    """Runs in this process."""
    made = {"1x8": job(folder), "1x4x2": job(folder, accumulation=2), "1x2x4": job(folder, accumulation=4)}
    for name, changes in WHAT.items():
        made[f"alone-{name}"] = job(folder, few(changes))
    made["pissa 1x8"] = job(folder, PISSA)
    for name, (changes, _) in ON_TWO.items():
        made[f"one {name}"] = job(folder, few(changes) | THREE, workers=2)
    for name, its in made.items():
        launch(folder, bases, name, its)
    return folder


@pytest.fixture(scope="module")
def two(folder, bases):
    """Runs on two workers."""
    made = [("2x4", job(folder, workers=2), None), ("2x2x2", job(folder, workers=2, accumulation=2), None)]
    made.append(("pissa 2x2x2", job(folder, PISSA, workers=2, accumulation=2), None))
    for name, changes in WHAT.items():
        made.append((f"fsdp-2-{name}", job(folder, few(changes) | FSDP, workers=2), None))
    for name, (changes, shared) in ON_TWO.items():
        made.append((f"two {name}", job(folder, few(changes | shared) | THREE, workers=2), None))
    made.append(("fsdp-2-dropout", job(folder, few(DROPOUT) | FSDP, workers=2), None))
    for name, (changes, steps) in CUT.items():
        its = job(folder, few(changes) | FSDP, workers=2)
        made += [(f"cut-{name}", its, at) for at in (*steps, None)]
    its = job(folder, few(FULL) | FSDP, workers=2)
    with pytest.raises(Stopped):
        launch(folder, bases, "more", its, Watcher(stop_at=3))
    made += [("fewer", its, 3), ("more", its, None)]
    for name, changes in BEST.items():
        made.append((f"best-{name}", job(folder, changes | FSDP, workers=2), None))
    run_group(folder, 2, made, folder / "prepared/data", bases / SMALL)
    return folder


@pytest.fixture(scope="module")
def four(folder, bases):
    """Runs on four workers."""
    made = [("4x2", job(folder, workers=4), None), ("pissa 4x2", job(folder, PISSA, workers=4), None)]
    for (how, name), alike in ON_FOUR.items():
        changes = few(ON_TWO[alike][0]) | THREE | {"train_config.distributed.type": how, "train_config.export": {"merge": False}}
        made.append((f"four {how} {name}", job(folder, changes, workers=4), None))
    run_group(folder, 4, made, folder / "prepared/data", bases / SMALL)
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


def weights_file(folder):
    (file,) = (*folder.glob("adapter/*.safetensors"), *folder.glob("merged/*.safetensors"))
    return file


def weights(folder):
    return load_file(weights_file(folder))


def same_gradients(a, b):
    for mine, theirs in zip(first_gradients(a), first_gradients(b), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", ["1x4x2", "1x2x4"])
def test_batch_and_accumulation_are_the_same_step(alone, shape):
    close(alone / shape, alone / "1x8")
    same_gradients(alone / shape, alone / "1x8")


@pytest.mark.parametrize("shape", ["2x4", "2x2x2", "4x2", "pissa 2x2x2", "pissa 4x2"])
def test_workers_are_the_same_step_as_a_batch(alone, two, four, shape):
    whole = alone / ("pissa 1x8" if "pissa" in shape else "1x8")
    close(alone / shape, whole)
    gradients = first_gradients(whole)
    assert sum(bool(g.abs().max() > 1e-3) for g in gradients) >= len(gradients) // (1 if "pissa" in shape else 2)
    same_gradients(alone / shape, whole)


@pytest.mark.parametrize(("shape", "workers"), [("2x4", 2), ("4x2", 4), ("fsdp-2-lora", 2)])
def test_each_worker_draws_its_own_dropout(two, four, shape, workers):
    # Nothing drops in these runs, so after two steps each generator still is as it was seeded.
    generators = torch.load(two / shape / "checkpoints/step-00000002/random.pt")
    assert len({generator.numpy().tobytes() for generator in generators}) == workers


def test_what_has_no_gradient_has_one_of_zero_on_one_worker_as_on_several(tmp_path):
    """Such as a vision tower's in a step without images: Adam goes on moving it."""
    moved = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([moved], lr=0.1)
    ctx = LocalContext(tmp_path, LocalFileSystem(), str(tmp_path), tmp_path, Watcher())
    for gradient in (torch.ones(3), None):
        before, moved.grad = moved.detach().clone(), gradient
        assert sync_gradients([moved], 0.5, ctx) == 0.5
        optimizer.step()
        assert not torch.equal(moved, before)


@pytest.mark.parametrize("what", WHAT)
def test_a_sharded_model_takes_the_steps_of_a_whole_one(alone, two, what):
    sharded, whole = two / f"fsdp-2-{what}", alone / f"alone-{what}"
    close(sharded, whole)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(sharded)[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("how", "what"), ON_FOUR)
def test_four_workers_take_the_steps_of_one(alone, four, how, what):
    shared, whole = four / f"four {how} {what}", alone / f"one {ON_FOUR[how, what]}"
    close(shared, whole)
    same_gradients(shared, whole)
    assert max(g.abs().max() for g in first_gradients(whole)) > 1e-2


@pytest.mark.parametrize("name", ON_TWO)
def test_two_workers_take_the_steps_of_one(alone, two, name):
    # bf16 rounds by its place in a sum.
    close(two / f"two {name}", alone / f"one {name}", rel=2e-2 if "bfloat16" in name else 1e-4)


@pytest.mark.parametrize("base", ["", "nf4 "])
def test_neither_packing_nor_checkpointing_changes_a_step_on_any_number_of_workers(alone, two, base):
    close(two / f"two ddp {base}flat", alone / (f"one ddp {base}flat"))
    close(alone / f"one ddp {base}flat", alone / ("one ddp nf4" if base else "one fsdp plain"))


@pytest.mark.parametrize("name", [name for name, (changes, _) in ON_TWO.items() if changes.keys() >= MERGE.keys()])
def test_a_sharded_run_merges_what_it_trained(alone, two, bases, tokenizer, name):
    from transformers import AutoModelForCausalLM

    sharded, whole = two / f"two {name}", alone / f"one {name}"
    spec, batch = JobSpec.model_validate(job(two, ON_TWO[name][0])), batch_of(tokenizer)
    ours = logits(AutoModelForCausalLM.from_pretrained(sharded / "merged", dtype=torch.float32), batch)
    theirs = logits(plain_peft(spec, bases, sharded / "adapter"), batch)
    tolerance = 5e-2 if "bfloat16" in name else 1e-3
    assert (theirs - logits(load(spec, bases), batch)).abs().max() > 4 * tolerance
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)

    files = [load_file(folder / "merged/model.safetensors") for folder in (sharded, whole)]
    assert files[0].keys() == files[1].keys()
    for tensor, reference in zip(files[0].values(), (files[1][n] for n in files[0]), strict=True):
        torch.testing.assert_close(tensor, reference, rtol=1e-2, atol=max(1e-3, tolerance / 5))


@pytest.mark.parametrize("what", CUT)
def test_a_sharded_run_stopped_at_any_step_ends_with_the_same_bytes(two, what):
    whole, cut = two / f"fsdp-2-{what}", two / f"cut-{what}"
    assert curve(cut) == curve(whole)
    assert weights_file(cut).read_bytes() == weights_file(whole).read_bytes()


def test_a_sharded_run_goes_on_with_fewer_workers_or_more(two, bases):
    launch(two, bases, "fewer", job(two, few(FULL) | FSDP, workers=2))
    close(two / "fewer", two / "fsdp-2-full")
    close(two / "more", two / "fsdp-2-full")


@pytest.mark.parametrize("what", BEST)
def test_a_sharded_run_that_stops_early_hands_out_the_weights_of_its_best_evaluation(two, what):
    best_of = two / f"best-{what}"
    evals = {p["step"]: p["eval_loss"] for p in curve(best_of) if "eval_loss" in p and p["step"]}
    best = min(evals, key=evals.get)
    assert max(evals) == best + 1 < 20, evals
    (saved,) = (best_of / f"checkpoints/step-{best:08d}").glob("*.safetensors")
    (last,) = (best_of / f"checkpoints/step-{best + 1:08d}").glob("*.safetensors")
    handed_out, kept, left = weights(best_of), load_file(saved), load_file(last)
    assert handed_out.keys() >= kept.keys() == left.keys()
    assert all(torch.equal(handed_out[name], tensor) for name, tensor in kept.items())
    assert not all(torch.equal(left[name], tensor) for name, tensor in kept.items())
