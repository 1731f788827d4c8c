"""Fields that change how a job computes, where the result alone would hardly tell."""

import pytest
import torch
from pyarrow.fs import LocalFileSystem

from tests.conftest import TINY
from tests.train_loop.models import make_base, run, samples
from tests.train_loop.runs import Watcher, adapter, curve
from train_loop import evaluate, loop
from train_loop.context import LocalContext
from train_loop.data.packing import collate
from train_loop.errors import Stopped
from train_loop.loss import supervised_loss
from train_loop.model import load
from train_loop.spec import JobSpec
from train_loop.trainee import load_trainee

HP = "train_config.hyperparameters"
ADAPTER = "train_config.adapter_config"
EXACT = {"train_config.torch_dtype": "float32", "model_details.quantization": None, f"{ADAPTER}.dropout": 0.0}
NF4 = {"model_details.quantization": {"quant_bits": 4}}


@pytest.fixture
def trainee_of(local_job, tmp_path, mirror):
    def make(changes):
        spec = JobSpec.model_validate(local_job(EXACT | changes))
        ctx = LocalContext(mirror / TINY, LocalFileSystem(), str(tmp_path), tmp_path, Watcher())
        return load_trainee(spec, ctx)

    return make


@pytest.fixture
def batch(tokenizer):
    return collate(samples(tokenizer), max_length=128, packing=True, pad_id=0)


@pytest.mark.parametrize("base", [{}, NF4])
def test_gradient_checkpointing_runs_each_block_again_and_gives_the_same_gradients(base, trainee_of, batch):
    def step(checkpointing):
        trainee = trainee_of(base | {f"{HP}.gradient_checkpointing": checkpointing})
        blocks = trainee.model.get_base_model().model.layers
        runs = []
        for block in blocks:
            block.self_attn.register_forward_hook(lambda module, *_: runs.append(module))
        for p in trainee.parameters:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        loss = supervised_loss(trainee.model.train(), batch)
        loss.backward()
        return len(runs) / len(blocks), loss.item(), [p.grad for p in trainee.parameters]

    (once, loss, gradients), (twice, same_loss, same_gradients) = step(False), step(True)
    assert (once, twice) == (1, 2)
    assert same_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("asked", "computed"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_torch_dtype_is_what_is_computed_in_where_the_machine_can(asked, computed, trainee_of, batch, monkeypatch):
    monkeypatch.setattr(load, "cpu_has_bf16_units", lambda: True)
    trainee = trainee_of({"train_config.torch_dtype": asked})
    seen = set()
    base = trainee.model.get_base_model()
    base.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda _, inputs, output: seen.update({inputs[0].dtype, output.dtype})
    )
    with trainee.autocast():
        supervised_loss(trainee.model, batch).backward()
    assert seen == {computed}
    assert base.get_input_embeddings().weight.dtype is computed
    assert {p.dtype for p in trainee.parameters} == {torch.float32}
    assert {p.grad.dtype for p in trainee.parameters} == {torch.float32}


def test_rslora_scales_an_adapter_by_the_root_of_its_rank(trainee_of, batch):
    def effect(rs):
        model = trainee_of({f"{ADAPTER}.r": 16, f"{ADAPTER}.use_rslora": rs}).model.eval()
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        torch.nn.init.ones_(layer.lora_B["default"].weight)
        torch.nn.init.ones_(layer.lora_A["default"].weight)
        return layer.get_delta_weight("default")

    torch.testing.assert_close(effect(True), effect(False) * 16**0.5)


def test_evaluation_takes_as_many_rows_at_a_time_as_is_said(local_job, tmp_path, mirror, monkeypatch):
    shapes = []

    def watched(model, micro):
        shapes.append(len(micro.rows))
        return supervised_loss(model, micro)

    monkeypatch.setattr(evaluate, "supervised_loss", watched)
    split = {"dataset_config.split.ratios": [0.5, 0.5], "dataset_config.preprocessing.packing": False, f"{HP}.max_steps": 1}
    found = {}
    for size in (2, 5):
        shapes.clear()
        manifest = run(local_job(EXACT | split | {f"{HP}.per_device_eval_batch_size": size}), tmp_path, mirror, f"eval-{size}")
        assert max(shapes) == size
        assert sum(shapes) == 2 * manifest["dataset"]["split"]["eval"]  # before and after
        found[size] = manifest["metrics"]["eval_loss_after"]
    assert found[2] == pytest.approx(found[5], rel=1e-5)


def test_the_names_of_the_engine_are_one_engine(local_job, tmp_path, mirror):
    for name in ("tuneyard", "simplismart", "peft"):
        run(local_job({"train_config.tuner_backend": name, f"{HP}.max_steps": 2}), tmp_path, mirror, name)
    assert adapter(tmp_path / "peft") == adapter(tmp_path / "tuneyard") == adapter(tmp_path / "simplismart")


def test_packed_rows_share_a_line_and_an_architecture_that_can_not_keep_them_apart_says_so(
    local_job, tmp_path, mirror, tokenizer, monkeypatch
):
    seen = []

    def watched(model, micro):
        seen.append((len(micro.rows), len(micro.input_ids)))
        return supervised_loss(model, micro)

    monkeypatch.setattr(loop, "supervised_loss", watched)
    make_base("falcon", tmp_path / "mirror", tokenizer)

    def lines_of(name, places, packing, base):
        seen.clear()
        monitor = Watcher()
        changes = {"dataset_config.preprocessing.packing": packing, f"{HP}.max_steps": 1, "model_details": {"base_model": base}}
        run(local_job(EXACT | changes), tmp_path, places, name, monitor)
        return seen[0], monitor.said("packing")

    (samples_of_step, lines), said = lines_of("packed", mirror, True, TINY)
    assert lines < samples_of_step == 8
    assert not said
    assert lines_of("padded", mirror, False, TINY) == ((8, 8), [])
    shape, said = lines_of("falcon", tmp_path / "mirror", True, "tuneyard/falcon")
    assert shape == (8, 8)
    assert len(said) == 1


def test_an_8_bit_optimizer_goes_on_to_the_same_bytes(local_job, tmp_path, mirror):
    # Its state is bytes in what has 4096 elements at least.
    wide = {f"{ADAPTER}.r": 64, f"{HP}.max_steps": 4, f"{HP}.optim": "adamw_8bit"}
    run(local_job(wide), tmp_path, mirror, "whole")
    for step in (1, 3):
        with pytest.raises(Stopped):
            run(local_job(wide), tmp_path, mirror, "cut", Watcher(stop_at=step))
    run(local_job(wide), tmp_path, mirror, "cut")
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    state = torch.load(tmp_path / "whole/checkpoints/step-00000004/optimizer.pt")["state"]
    # bitsandbytes keeps what it has in bytes in a dictionary of its own.
    tensors = [t for s in state.values() for inner in (s, *s.values()) if isinstance(inner, dict) for t in inner.values()]
    assert torch.uint8 in {t.dtype for t in tensors if isinstance(t, torch.Tensor)}
    run(local_job(wide | {f"{HP}.optim": "adamw"}), tmp_path, mirror, "plain")
    assert adapter(tmp_path / "plain") != adapter(tmp_path / "whole")
