import json
from functools import reduce
from operator import getitem

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


# --- the HTTP contract, field by field: what clients count on, whatever the code says ---

HP, ADAPTER, PRE = "train_config.hyperparameters", "train_config.adapter_config", "dataset_config.preprocessing"
LEAST = {
    "org": DOCUMENTED["org"],
    "experiment_name": "least",
    "model_details": {"base_model": "owner/name"},
    "dataset_details": {"dataset_path": "s3://bucket/rows.jsonl", "secret_id": "x"},
    "infra_config": {"gpu_type": "h100", "node_count": 3},
}
DEFAULTS = {
    PRE: {"lazy_tokenize": True, "streaming": False, "packing": True, "truncation": "right", "train_on": "assistant"},
    f"{PRE}.prompt": {"system": None, "max_length": 4096, "template": None},
    f"{PRE}.max_reject_ratio": 0.01,
    "model_details": {"quantization": None, "revision": None, "secret_id": None, "region": None},
    "train_config": {"type": "sft", "torch_dtype": "bfloat16", "task_type": "causal_lm", "train_type": "lora"},
    "train_config.tuner_backend": "tuneyard",
    "train_config.distributed": {"type": "ddp"},
    "train_config.export": {"merge": False},
    HP: {"num_epochs": 1, "max_steps": None, "gradient_accumulation_steps": 1, "gradient_checkpointing": True, "seed": 42}
    | {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "learning_rate": 1e-4, "lr_scheduler_type": "cosine"}
    | {"warmup_ratio": 0.03, "warmup_steps": None, "weight_decay": 0, "adam_beta1": 0.9, "adam_beta2": 0.999}
    | {"adam_epsilon": 1e-8, "optim": "adamw", "max_grad_norm": 1.0, "save_steps": 500, "save_total_limit": 2}
    | {"eval_steps": 500, "logging_steps": 5, "early_stopping_patience": None, "metric_for_best_model": "eval_loss"}
    | {"dataloader_num_workers": 1, "neftune_noise_alpha": None},
    ADAPTER: {"r": 16, "alpha": 16, "dropout": 0.1, "targets": ["all-linear"], "use_rslora": False, "use_dora": False}
    | {"lora_plus_ratio": None, "init": "default", "modules_to_save": None, "init_from": None},
    "infra_config": {"infra_type": "ray", "priority": 0, "max_retries": 3, "max_runtime_s": None, "min_node_count": 3},
}
VALUES = {
    f"{PRE}.truncation": ["right", "left", "reject"],
    f"{PRE}.train_on": ["assistant", "last_assistant", "all"],
    "model_details.ownership": ["public", "private"],
    "model_details.source_type": ["hf", "s3", "gcs"],
    "model_details.model_type": ["llm", "vlm"],
    "train_config.type": ["sft", "dpo", "kto", "orpo", "grpo"],
    "train_config.torch_dtype": ["bfloat16", "float16", "float32"],
    "train_config.task_type": ["causal_lm"],
    "train_config.train_type": ["lora", "full"],
    "train_config.tuner_backend": ["tuneyard", "simplismart", "peft"],
    f"{HP}.lr_scheduler_type": ["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr"],
    f"{HP}.optim": ["adamw", "adamw_8bit", "paged_adamw_8bit"],
    f"{HP}.metric_for_best_model": ["eval_loss"],
    f"{ADAPTER}.init": ["default", "pissa", "loftq", "gaussian"],
    "train_config.distributed.type": ["ddp", "fsdp"],
    "dataset_details.dataset_type": ["jsonl", "zip", "json", "parquet"],
    "dataset_details.dataset_format": ["sharegpt", "openai", "alpaca", "prompt_completion", "text", "preference", "auto"],
    "dataset_details.source_type": ["s3", "gcs", "hf"],
    "dataset_details.ownership": ["public", "private"],
    "infra_config.infra_type": ["ray", "simplismart"],
}
BOUNDS = {  # the outermost that are taken, and what isn't any more
    f"{PRE}.prompt.max_length": ([16, 1_048_576], [15, 1_048_577]),
    f"{PRE}.max_reject_ratio": ([0, 1], [-0.01, 1.01]),
    f"{HP}.num_epochs": ([0.01, 3], [0, -1]),
    f"{ADAPTER}.r": ([1, 1024], [0, 1025]),
    f"{ADAPTER}.dropout": ([0, 0.999], [-0.1, 1]),
    "infra_config.gpu_count": ([1, 16], [0, 17]),
    "infra_config.node_count": ([1, 1024], [0, 1025]),
    "infra_config.priority": ([-10, 10], [-11, 11]),
    "experiment_name": (["a", "A-z_0.9" * 18], ["", "a" * 129, "a b", "a/b", "ä", "a\n"]),
}


def at(job, path):
    return reduce(getitem, path.split("."), job)


def test_a_job_that_asks_for_nothing_has_the_contracts_defaults():
    resolved = JobSpec.model_validate(LEAST).model_dump(mode="json")
    for path, expected in DEFAULTS.items():
        found = at(resolved, path)
        assert found == expected if not isinstance(expected, dict) else found.items() >= expected.items(), path
    quantised = JobSpec.model_validate(with_fields(LEAST, {"model_details.quantization": {"quant_bits": 4}}))
    assert quantised.model_details.quantization.model_dump() == {"quant_bits": 4, "quant_type": "nf4", "double_quant": True}
    assert json.loads(JobSpec.model_validate(LEAST).model_dump_json()) == resolved


def is_taken(path, value):
    """Whether a value is one for this field, though a rule over several fields may be against it, or it isn't built yet."""
    try:
        JobSpec.model_validate(with_fields(LEAST, {path: value}))
    except ValidationError as error:
        return {e["type"] for e in error.errors() if ".".join(map(str, e["loc"])) == path} <= {"rule", "not_supported_yet"}
    return True


@pytest.mark.parametrize("path", VALUES)
def test_every_value_of_the_contract_is_taken_and_no_other(path):
    assert [value for value in [*VALUES[path], "other", 1] if is_taken(path, value)] == VALUES[path]


@pytest.mark.parametrize("path", BOUNDS)
def test_the_contracts_bounds_are_where_it_says(path):
    within, beyond = BOUNDS[path]
    assert [value for value in [*within, *beyond] if is_taken(path, value)] == within


def test_ratios_are_two_or_three_shares_of_one():
    def split(ratios):
        return with_fields(LEAST, {"dataset_config.split": {"type": "random", "ratios": ratios}})

    for ratios in ([1, 0], [0.8, 0.2], [0.8, 0.1, 0.1], [0.9, 0.1000009], [0.9, 0.0999991]):
        JobSpec.model_validate(split(ratios))
    for ratios in ([1], [0.4, 0.2, 0.2, 0.2], [0.9, 0.100002], [0.9, 0.099998], [1.5, -0.5], [90, 10], "0.9"):
        with pytest.raises(ValidationError, match="ratios"):
            JobSpec.model_validate(split(ratios))


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
    assert errors_of({"train_config.type": "dpo"})["train_config.type"][1] == '"dpo" is not supported yet: it must be "sft"'


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
