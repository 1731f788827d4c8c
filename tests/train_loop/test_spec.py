import pytest
from pydantic import ValidationError

from tests.conftest import DOCUMENTED, with_fields
from train_loop.spec import JobSpec


def test_the_documented_request_is_valid_and_defaults_are_filled_in():
    spec = JobSpec.model_validate(DOCUMENTED)
    assert spec.infra_config.num_workers == 4
    assert spec.train_config.hyperparameters.warmup_ratio == 0.03
    assert spec.model_details.quantization.quant_type == "nf4"
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_null_means_the_default():
    spec = JobSpec.model_validate(with_fields(DOCUMENTED, {"train_config.hyperparameters.seed": None}))
    assert spec.train_config.hyperparameters.seed == 42


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset_config.preprocessing.streaming", True),
        ("dataset_config.split", {"type": "file", "eval_path": "s3://bucket/eval.jsonl"}),
        ("model_details.model_type", "vlm"),
        ("model_details.ownership", "private"),
        ("model_details.revision", "main"),
        ("model_details.quantization.quant_bits", 8),
        ("train_config.type", "dpo"),
        ("train_config.train_type", "full"),
        ("train_config.torch_dtype", "float16"),
        ("train_config.distributed.type", "fsdp"),
        ("train_config.export", {"merge": True}),
        ("train_config.hyperparameters.optim", "paged_adamw_8bit"),
        ("train_config.hyperparameters.early_stopping_patience", 3),
        ("train_config.hyperparameters.neftune_noise_alpha", 5.0),
        ("train_config.adapter_config.use_dora", True),
        ("train_config.adapter_config.init", "pissa"),
        ("train_config.adapter_config.modules_to_save", ["lm_head"]),
        ("dataset_details.dataset_type", "zip"),
        ("dataset_details.dataset_format", "alpaca"),
        ("dataset_details.dataset_path", "s3://bucket/prefix/"),
        ("infra_config.priority", 3),
        ("infra_config.min_node_count", 1),
        ("infra_config.max_runtime_s", 60),
    ],
)
def test_what_is_not_built_yet_is_refused_by_name(field, value):
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(with_fields(DOCUMENTED, {field: value}))
    assert [e["type"] for e in caught.value.errors()] == ["not_supported_yet"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train_config.hyperparameters.learning_rate", "0.1"),
        ("train_config.hyperparameters.learning_rate", 0),
        ("train_config.hyperparameters.learning_rate", float("nan")),
        ("train_config.hyperparameters.per_device_train_batch_size", 1.5),
        ("train_config.hyperparameters.save_steps", True),
        ("train_config.adapter_config.dropout", 1),
        ("train_config.adapter_config.targets", []),
        ("train_config.adapter_config.targets", ["all-linear", "q_proj"]),
        ("dataset_config.preprocessing.prompt.max_length", 8),
        ("dataset_config.split.ratios", [0.9, 0.2]),
        ("dataset_config.split.ratios", [0, 1]),
        ("dataset_details.dataset_path", "http://bucket/key"),
        ("dataset_details.secret_id", None),
        ("infra_config.gpu_count", 17),
        ("experiment_name", "has a blank"),
        ("org", "not-a-uuid"),
    ],
)
def test_wrong_values_are_refused(field, value):
    with pytest.raises(ValidationError):
        JobSpec.model_validate(with_fields(DOCUMENTED, {field: value}))


def test_every_field_is_described():
    schema = JobSpec.model_json_schema()
    sections = {name: d for name, d in schema["$defs"].items() if "properties" in d}
    bare = [
        f"{s}.{f}" for s, d in sections.items() for f, p in d["properties"].items() if "description" not in p and "$ref" not in p
    ]
    assert set(bare) <= {
        "RandomSplit.type",
        "NoSplit.type",
        "FileSplit.type",
        "Hyperparameters.adam_beta1",
        "Hyperparameters.adam_beta2",
        "Hyperparameters.adam_epsilon",
    }
