"""Fields that change how a job computes, where the result alone would hardly tell; and which test fails when one is ignored."""

import importlib
from typing import Any, Literal, get_args

import pytest
import torch
from pyarrow.fs import LocalFileSystem

from tests.conftest import TINY
from tests.train_loop.models import make_base, run, samples
from tests.train_loop.runs import Watcher, adapter, curve
from tests.train_loop.test_hyperparameters import CHANGES
from train_loop import evaluate, loop
from train_loop.context import LocalContext
from train_loop.data.packing import collate
from train_loop.errors import Stopped
from train_loop.loss import supervised_loss
from train_loop.model import load
from train_loop.section import Section
from train_loop.spec import JobSpec
from train_loop.trainee import load_trainee

HP = "train_config.hyperparameters"
ADAPTER = "train_config.adapter_config"
EXACT = {"train_config.torch_dtype": "float32", "model_details.quantization": None, f"{ADAPTER}.dropout": 0.0}
NF4 = {"model_details.quantization": {"quant_bits": 4}}

# Of a field that test_hyperparameters doesn't change: a test that fails when it is ignored.
PROVED_BY = {
    "train_loop.test_tokenize.test_every_setting_of_a_job_reaches_its_tokens": (
        *("dataset_config.preprocessing.prompt.system", "dataset_config.preprocessing.prompt.max_length"),
        *("dataset_config.preprocessing.prompt.template", "dataset_config.preprocessing.truncation"),
        "dataset_config.preprocessing.train_on",
    ),
    "train_loop.test_streaming.test_a_streamed_run_takes_the_steps_of_any_other": (
        "dataset_config.preprocessing.lazy_tokenize",
        "dataset_config.preprocessing.streaming",
    ),
    "train_loop.test_streaming.test_rows_are_tokenised_in_as_many_processes_as_asked": (f"{HP}.dataloader_num_workers",),
    "train_loop.test_fields.test_packed_rows_share_a_line_and_an_architecture_that_can_not_keep_them_apart_says_so": (
        "dataset_config.preprocessing.packing",
    ),
    "train_loop.test_real_rows.test_half_a_download_has_one_bad_row_which_max_reject_ratio_allows_or_not": (
        "dataset_config.preprocessing.max_reject_ratio",
        "dataset_details.dataset_type",
        "dataset_details.dataset_path",
    ),
    "train_loop.test_prepare.test_a_file_of_their_own_gives_the_rows_to_evaluate_on": (
        "dataset_config.split.type",
        "dataset_config.split.eval_path",
    ),
    "train_loop.test_streaming.test_rows_of_the_test_share_are_neither_trained_nor_evaluated_on": (
        "dataset_config.split.ratios",
    ),
    "train_loop.test_loop.test_rows_of_every_shape_train_the_same_lazily_and_eagerly": ("dataset_details.dataset_format",),
    "train_loop.test_remote_sources.test_a_dataset_of_the_hub_is_read_with_its_token": ("dataset_details.source_type",),
    "service.test_whole_jobs.test_the_documented_job_on_four_workers": ("dataset_details.secret_id",),
    "train_loop.test_s3_sources.test_a_bucket_is_looked_for_in_the_region_of_its_secret_else_the_jobs": (
        "dataset_details.region",
        "model_details.region",
    ),
    "train_loop.test_s3_sources.test_the_machines_own_keys_open_nothing_that_is_public": (
        "dataset_details.ownership",
        "model_details.ownership",
    ),
    "train_loop.test_model_sources.test_a_folder_of_a_bucket_is_fetched_once_a_state_and_trained_on": (
        "model_details.base_model",
        "model_details.source_type",
    ),
    "train_loop.test_model_sources.test_a_revision_has_a_folder_of_its_own_in_the_mirror": ("model_details.revision",),
    "serve_app.test_model_at_submit.test_a_private_model_of_the_hub_needs_a_token": ("model_details.secret_id",),
    "train_loop.test_adapters.test_every_setting_of_quantisation_gives_other_weights": (
        "model_details.quantization.quant_bits",
        "model_details.quantization.quant_type",
        "model_details.quantization.double_quant",
    ),
    "train_loop.test_adapters.test_training_goes_on_from_the_adapter_of_another_job": (f"{ADAPTER}.init_from",),
    "train_loop.test_fields.test_torch_dtype_is_what_is_computed_in_where_the_machine_can": ("train_config.torch_dtype",),
    "train_loop.test_full.test_a_whole_model_of_any_kind_loads_as_it_was_evaluated": ("train_config.train_type",),
    "train_loop.test_sharding.test_each_worker_keeps_its_slice_and_only_the_first_what_is_gathered": (
        "train_config.distributed.type",
    ),
    "train_loop.test_merge.test_a_merged_model_is_plain_listed_and_has_the_eval_loss_of_the_run": ("train_config.export.merge",),
    "train_loop.test_trackers.test_mlflow_has_the_points_of_the_runs_folder_and_how_the_job_was_set_up": (
        "train_config.report_to",
    ),
    "train_loop.test_fields.test_evaluation_takes_as_many_rows_at_a_time_as_is_said": (f"{HP}.per_device_eval_batch_size",),
    "train_loop.test_fields.test_gradient_checkpointing_runs_each_block_again_and_gives_the_same_gradients": (
        f"{HP}.gradient_checkpointing",
    ),
    "train_loop.test_fields.test_an_8_bit_optimizer_goes_on_to_the_same_bytes": (f"{HP}.optim",),
    "train_loop.test_full.test_early_stopping_hands_out_the_best_weights": (f"{HP}.early_stopping_patience",),
    "train_loop.test_hyperparameters.test_epochs_may_be_fractions_and_lines_evaluations_and_checkpoints_come_when_they_are_due": (
        *(f"{HP}.num_epochs", f"{HP}.logging_steps", f"{HP}.eval_steps", f"{HP}.save_steps", f"{HP}.save_total_limit"),
    ),
    "train_loop.test_image_datasets.test_pictures_are_scaled_down_to_max_pixels": ("dataset_config.preprocessing.max_pixels",),
    "train_loop.test_vision_models.test_what_is_not_frozen_learns_and_nothing_else": (
        "model_details.model_type",
        *("train_config.freeze.vision", "train_config.freeze.aligner"),
    ),
    "train_loop.test_vision_models.test_tower_and_aligner_may_learn_at_rates_of_their_own": (
        *(f"{HP}.vision_learning_rate", f"{HP}.aligner_learning_rate"),
    ),
}
ONE_VALUE = (Literal["causal_lm"], Literal["eval_loss"])
# Nothing goes by them: free text, names of one and the same, and what has one value yet (test_spec refuses the others).
WITHOUT_EFFECT = {
    *("dataset_details.dataset_name", "dataset_details.dataset_description", "train_config.tuner_backend"),
    "train_config.type",
}


@pytest.fixture
def trainee_of(local_job, tmp_path, mirror):
    def make(changes):
        spec = JobSpec.model_validate(local_job(EXACT | changes))
        ctx = LocalContext(mirror / TINY, LocalFileSystem(), str(tmp_path), tmp_path, Watcher())
        return load_trainee(spec, ctx)

    return make


@pytest.fixture
def batch(tokenizer):
    return collate(samples(tokenizer), capacity=128, pad_id=0)


@pytest.mark.parametrize("base", [{}, NF4, {f"{ADAPTER}.dropout": 0.5}], ids=["plain", "nf4", "dropout"])
def test_gradient_checkpointing_runs_each_block_again_and_gives_the_same_gradients(base, trainee_of, batch):
    def step(checkpointing):
        trainee = trainee_of(base | {f"{HP}.gradient_checkpointing": checkpointing})
        blocks = trainee.model.get_base_model().model.layers
        runs = []
        for block in blocks:
            block.self_attn.register_forward_hook(lambda module, *_: runs.append(module))
        for p in trainee.parameters:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        torch.manual_seed(0)
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
    assert (lines, samples_of_step) == (1, 8)
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


def leaves(annotation: Any, name: str = "") -> dict[str, Any]:
    """The fields below a section by dotted name, and what they hold."""
    sections = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, Section)]
    if not sections:
        return {name: annotation}
    below = ((f"{name}.{field}".lstrip("."), info) for section in sections for field, info in section.model_fields.items())
    return {leaf: what for field, info in below for leaf, what in leaves(info.annotation, field).items()}


def test_of_every_field_a_test_fails_that_ignores_it():
    parts = ("dataset_config", "dataset_details", "model_details", "train_config")
    fields = {name for name, what in leaves(JobSpec).items() if name.startswith(parts) and what not in ONE_VALUE}
    changed = {next(iter(changes)) for changes in CHANGES.values()}
    assert fields == changed | WITHOUT_EFFECT | {name for names in PROVED_BY.values() for name in names}
    for test in PROVED_BY:
        module, _, name = test.rpartition(".")
        assert callable(getattr(importlib.import_module(f"tests.{module}"), name))
