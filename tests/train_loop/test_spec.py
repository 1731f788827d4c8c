import pytest
from pydantic import ValidationError

from tests.conftest import DOCUMENTED, with_fields
from train_loop.spec import JobSpec, TrainConfig

STREAMED = {"dataset_config.preprocessing.streaming": True, "train_config.hyperparameters.max_steps": 9}


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
        ("train_config.type", "dpo"),
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


VLM = {"model_details.model_type": "vlm", "dataset_details.dataset_type": "zip"}
STREAMED = {"dataset_config.preprocessing.streaming": True, "train_config.hyperparameters.max_steps": 5}


def errors_of(changes):
    """By dotted name: (type, sentence) of every error, one a field."""
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(with_fields(DOCUMENTED, changes))
    found = [(".".join(map(str, e["loc"])), (e["type"], e["msg"])) for e in caught.value.errors()]
    assert len(dict(found)) == len(found), "one error a field"
    return dict(found)


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"dataset_config.split.ratios": [0.9, 0.2]}, "dataset_config.split.ratios", "add up to 1.1"),
        ({"dataset_config.split.ratios": [0, 1]}, "dataset_config.split.ratios", "above 0"),
        (
            {"dataset_config.split": {"type": "file", "eval_path": "gs://bucket/eval.jsonl"}},
            "dataset_config.split.eval_path",
            "s3://bucket/key",
        ),
        (
            {"dataset_config.preprocessing.streaming": True},
            "train_config.hyperparameters.max_steps",
            "streaming needs max_steps",
        ),
        (
            STREAMED | {"dataset_config.preprocessing.lazy_tokenize": False},
            "dataset_config.preprocessing.lazy_tokenize",
            "must be true",
        ),
        (STREAMED | {"dataset_details.dataset_type": "parquet"}, "dataset_config.preprocessing.streaming", "parquet files don't"),
        (
            STREAMED | {"dataset_details.dataset_path": "s3://bucket/rows.jsonl.gz"},
            "dataset_details.dataset_path",
            "uncompressed",
        ),
        (
            STREAMED | {"dataset_config.split": {"type": "file", "eval_path": "s3://bucket/eval.jsonl.zst"}},
            "dataset_config.split.eval_path",
            "uncompressed",
        ),
        ({"model_details.base_model": "s3://bucket/llama"}, "model_details.base_model", "source_type is s3"),
        ({"model_details.base_model": "a//b"}, "model_details.base_model", "owner/name"),
        ({"model_details.source_type": "s3"}, "model_details.base_model", "s3://bucket/folder"),
        (
            {"model_details.source_type": "gcs", "model_details.base_model": "s3://bucket/llama"},
            "model_details.base_model",
            "gs://bucket/folder",
        ),
        ({"model_details.ownership": "private"}, "model_details.secret_id", "private model needs secret_id"),
        (
            {"model_details.source_type": "s3", "model_details.base_model": "s3://bucket/llama", "model_details.revision": "v1"},
            "model_details.revision",
            "a folder has no revisions",
        ),
        (
            {"train_config.adapter_config.init": "loftq", "model_details.quantization": None},
            "train_config.adapter_config.init",
            "what quantisation lost",
        ),
        (
            {"train_config.adapter_config.init": "pissa", "train_config.hyperparameters.weight_decay": 0.1},
            "train_config.hyperparameters.weight_decay",
            "must be 0",
        ),
        (
            {"train_config.adapter_config.init": "pissa", "train_config.distributed.type": "fsdp"},
            "train_config.distributed.type",
            "use ddp",
        ),
        (
            {"train_config.adapter_config.init": "pissa", "train_config.adapter_config.init_from": "x"},
            "train_config.adapter_config.init",
            "leave one of them out",
        ),
        ({"train_config.train_type": "full"}, "model_details.quantization", "leave quantization out"),
        (
            {"dataset_config.split": {"type": "none"}, "train_config.hyperparameters.early_stopping_patience": 3},
            "train_config.hyperparameters.early_stopping_patience",
            "goes by eval_loss",
        ),
        (
            {"dataset_config.split.ratios": [1, 0], "train_config.hyperparameters.early_stopping_patience": 3},
            "train_config.hyperparameters.early_stopping_patience",
            "goes by eval_loss",
        ),
        (
            {"train_config.distributed.type": "fsdp", "model_details.quantization.quant_bits": 8},
            "train_config.distributed.type",
            "use quant_bits 4, or ddp",
        ),
        (
            {"train_config.distributed.type": "fsdp", "train_config.hyperparameters.optim": "adamw_8bit"},
            "train_config.hyperparameters.optim",
            "use adamw, or ddp",
        ),
        ({"train_config.adapter_config.targets": ["all-linear", "q_proj"]}, "train_config.adapter_config.targets", "alone"),
        ({"model_details.model_type": "vlm"}, "dataset_details.dataset_type", "zip"),
        ({"dataset_details.dataset_type": "zip"}, "dataset_details.dataset_type", "model_type vlm"),
        (
            VLM | STREAMED,
            "dataset_config.preprocessing.streaming",
            "rows of a zip are read once",
        ),
        (
            {"dataset_config.preprocessing.max_pixels": 2048},
            "dataset_config.preprocessing.max_pixels",
            "which only a vlm's rows have",
        ),
        ({"train_config.freeze": {"vision": False}}, "train_config.freeze.vision", "model_type be vlm"),
        ({"train_config.freeze": {"aligner": False}}, "train_config.freeze.aligner", "model_type be vlm"),
        (
            VLM | {"train_config.hyperparameters.vision_learning_rate": 1e-5},
            "train_config.hyperparameters.vision_learning_rate",
            "set train_config.freeze.vision to false",
        ),
        (
            VLM | {"train_config.freeze": {"vision": False}, "train_config.hyperparameters.aligner_learning_rate": 1e-5},
            "train_config.hyperparameters.aligner_learning_rate",
            "aligner is frozen",
        ),
        ({"dataset_details.dataset_path": "gs://bucket/key"}, "dataset_details.dataset_path", "s3://"),
        ({"dataset_details.dataset_path": "s3://bucket"}, "dataset_details.dataset_path", "s3://bucket/key"),
        ({"dataset_details.source_type": "gcs"}, "dataset_details.dataset_path", "gs://"),
        ({"dataset_details.source_type": "hf"}, "dataset_details.dataset_path", "id of a dataset of the hub"),
        ({"dataset_details.secret_id": None}, "dataset_details.secret_id", "private dataset needs secret_id"),
        (
            {
                "dataset_details.source_type": "gcs",
                "dataset_details.dataset_path": "gs://bucket/key",
                "dataset_details.secret_id": None,
            },
            "dataset_details.secret_id",
            "private dataset needs secret_id",
        ),
        ({"infra_config.min_node_count": 3}, "infra_config.min_node_count", "at most node_count, which is 2"),
    ],
)
def test_every_rule_over_several_fields_says_which_to_mend(changes, field, said):
    found = errors_of(changes)
    assert found[field][0] == "rule"
    assert said in found[field][1]
    # What isn't built yet is said besides, of the fields that ask for it.
    assert {kind for name, (kind, _) in found.items() if name != field} <= {"not_supported_yet"}


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        (
            {"train_config.type": "dpo", "dataset_details.dataset_format": "preference"},
            {"train_config.type"},
        ),
    ],
)
def test_what_keeps_the_rules_is_only_not_supported_yet(changes, fields):
    found = errors_of(changes)
    assert found.keys() == fields
    assert {kind for kind, _ in found.values()} == {"not_supported_yet"}


def test_wrong_fields_broken_rules_and_what_is_not_built_yet_come_at_once():
    changes = {
        "infra_config.gpu_count": "two",
        "train_config.train_type": "full",
        "dataset_details.secret_id": None,
        "model_details.model_type": "vlm",
        "train_config.type": "dpo",
        "dataset_config.preprocessing.streaming": "yes",
    }
    assert {field: kind for field, (kind, _) in errors_of(changes).items()} == {
        "infra_config.gpu_count": "int_type",
        "dataset_config.preprocessing.streaming": "bool_type",
        "model_details.quantization": "rule",
        "dataset_details.secret_id": "rule",
        "train_config.type": "not_supported_yet",
        "dataset_details.dataset_type": "rule",
    }


def test_a_wrong_field_is_not_called_unsupported_too():
    assert errors_of({"dataset_config.preprocessing.streaming": "x"}).popitem()[1][0] == "bool_type"


def test_a_refused_value_is_shown_as_it_was_written():
    assert errors_of({"train_config.type": "dpo"})["train_config.type"][1] == '"dpo" is not supported yet'


def test_full_fine_tuning_has_a_lower_learning_rate_of_its_own():
    train = DOCUMENTED["train_config"] | {"train_type": "full"}
    for given in (None, {}, {"learning_rate": None}):
        assert TrainConfig.model_validate(train | {"hyperparameters": given}).hyperparameters.learning_rate == 1e-5
    assert TrainConfig.model_validate(train).hyperparameters.learning_rate == 1e-4
    assert TrainConfig.model_validate({}).hyperparameters.learning_rate == 1e-4


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
