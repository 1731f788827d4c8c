"""JobSpec: the five sections of a job as pydantic models. The one source of fields, defaults, bounds and docs.

Every field of the HTTP contract is declared here, and below them every rule over several of them. A value whose behaviour
isn't built yet is marked `NotYet` and refused, so that nothing a user asks for is silently ignored.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from train_loop.section import Fault, OnlyYet, Rule, Section, held_to

BUCKET = re.compile(r"[a-z0-9][a-z0-9._\-]{1,220}[a-z0-9]")  # Google's may have `_`, and dots may make them long
# The hub's own rule; each part also becomes a folder's name in the mirror, so `..` and 300 letters must not pass.
HUB_ID = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9_][\w.\-]{0,95}(/[A-Za-z0-9_][\w.\-]{0,95})?", re.ASCII)
EXPERIMENT_NAME = r"^[A-Za-z0-9._-]{1,128}$"
COMPRESSED = (".gz", ".zst")
AWS_REGION = re.compile(r"^(us|eu|ap|sa|ca|me|af|il|mx|cn|us-gov|us-iso|us-isob)-[a-z]+-\d$")


def _lower(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


# --- dataset_config ---------------------------------------------------------------------------------------------


class Prompt(Section):
    """How a conversation becomes tokens."""

    system: str | None = Field(None, max_length=32_768, description="System message for rows that have none.")
    max_length: int = Field(
        4096, ge=16, le=1_048_576, strict=True, description="Longest sample, in tokens; at most the model's context."
    )
    template: str | None = Field(
        None,
        max_length=65_536,
        description="Jinja chat template, rendered in a sandbox; null is the tokenizer's own.",
    )


class Preprocessing(Section):
    """What happens to rows before they reach the model."""

    lazy_tokenize: bool = Field(
        True, strict=True, description="Tokenise in the workers, ahead of the step (true), or once before training."
    )
    streaming: bool = Field(
        False,
        strict=True,
        description="Keep no copy of the rows: workers read them from the dataset as they need them; needs max_steps, and "
        "jsonl or json.",
    )
    packing: bool = Field(
        True, strict=True, description="Put several short samples in one row, isolated from each other; same loss."
    )
    prompt: Prompt = Field(default_factory=Prompt)
    truncation: Literal["right", "left", "reject"] = Field(
        "right", description="What to do with a sample longer than max_length."
    )
    train_on: Literal["assistant", "last_assistant", "all"] = Field(
        "assistant", description="Which tokens carry loss: every assistant turn, the last one, or all tokens."
    )
    max_reject_ratio: float = Field(
        0.01, ge=0, le=1, strict=True, description="Largest share of unusable rows before the job fails."
    )
    max_pixels: Annotated[int, Field(ge=1024, le=64_000_000, strict=True)] | None = Field(
        None, description="Scale larger images down to so many pixels, keeping their ratio; null keeps their size."
    )


class RandomSplit(Section):
    """Split by a hash of seed and row, so membership doesn't move when rows are appended."""

    type: Literal["random"]
    ratios: list[Annotated[float, Field(ge=0, le=1, strict=True)]] = Field(
        min_length=2, max_length=3, description="[train, eval] or [train, eval, test]; sum 1."
    )


class NoSplit(Section):
    """Everything is training data; nothing is evaluated."""

    type: Literal["none"]


class FileSplit(Section):
    """Evaluation rows come from a file of their own."""

    type: Literal["file"]
    eval_path: str = Field(
        min_length=1, max_length=2048, description="URI of the evaluation file, of the dataset's type and format; or a prefix."
    )


class DatasetConfig(Section):
    """How the dataset is read, rendered and split."""

    preprocessing: Preprocessing = Field(default_factory=Preprocessing)
    split: Annotated[RandomSplit | NoSplit | FileSplit, Field(discriminator="type")] = Field(
        default_factory=lambda: RandomSplit(type="random", ratios=[0.9, 0.1]), description="Train / eval / test."
    )


# --- model_details ----------------------------------------------------------------------------------------------


class Quantization(Section):
    """bitsandbytes quantisation of the frozen base."""

    quant_bits: Literal[4, 8] = Field(description="4 (NF4 or FP4) or 8 (LLM.int8()).")
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type.")
    double_quant: bool = Field(True, strict=True, description="Quantise the quantisation constants too.")


class ModelDetails(Section):
    """The base model."""

    base_model: str = Field(min_length=1, max_length=512, description="Hub id (`owner/name`), or a folder URI for s3 and gcs.")
    ownership: Literal["public", "private"] = Field("public", description="private needs secret_id.")
    source_type: Literal["hf", "s3", "gcs"] = Field(
        "hf", description="Where the base model lives; the operator's mirror is looked up first."
    )
    model_type: Literal["llm", "vlm"] = Field("llm", description="llm on a VLM base trains the language part only.")
    revision: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = Field(
        None, description="Commit or tag of the base model on the hub; the mirror has it as `owner/name@revision`."
    )
    secret_id: Annotated[str, Field(min_length=1, max_length=640)] | None = Field(
        None, description="Secret that opens a private model: of type hf for the hub, else as for the dataset."
    )
    region: Annotated[str, Field(max_length=64)] | None = Field(None, description="AWS region of the model's bucket.")
    quantization: Quantization | None = Field(None, description="Quantise the frozen base; null keeps torch_dtype.")


# --- train_config -----------------------------------------------------------------------------------------------

LORA_LEARNING_RATE = 1e-4
FULL_LEARNING_RATE = 1e-5
MAX_NODES = 1024
PositiveSteps = Annotated[int, Field(ge=1, le=100_000_000, strict=True)]


class Hyperparameters(Section):
    """Optimisation. Names and defaults follow the Hugging Face Trainer where it has them."""

    num_epochs: float = Field(1, gt=0, le=10_000, strict=True, description="Passes over the training rows; may be fractional.")
    max_steps: PositiveSteps | None = Field(None, description="Optimizer steps in all; overrides num_epochs.")
    per_device_train_batch_size: int = Field(8, ge=1, le=65_536, strict=True, description="Samples per worker and micro-batch.")
    per_device_eval_batch_size: int = Field(
        8, ge=1, le=65_536, strict=True, description="Samples per worker and evaluation batch."
    )
    gradient_accumulation_steps: int = Field(1, ge=1, le=65_536, strict=True, description="Micro-batches per optimizer step.")
    gradient_checkpointing: bool = Field(
        True, strict=True, description="Recompute activations in backward instead of keeping them."
    )
    learning_rate: float = Field(
        LORA_LEARNING_RATE, gt=0, le=1, strict=True, description="Peak learning rate; 1e-5 is the default for full."
    )
    vision_learning_rate: Annotated[float, Field(gt=0, le=1, strict=True)] | None = Field(
        None, description="Peak learning rate of the vision tower, where it isn't frozen; null is learning_rate."
    )
    aligner_learning_rate: Annotated[float, Field(gt=0, le=1, strict=True)] | None = Field(
        None, description="Peak learning rate of the aligner, where it isn't frozen; null is learning_rate."
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr"] = Field(
        "cosine", description="Shape of the learning rate after warm-up; cosine_with_min_lr ends at a tenth."
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, strict=True, description="Share of all steps spent warming up.")
    warmup_steps: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None, description="Warm-up in steps; overrides warmup_ratio."
    )
    weight_decay: float = Field(0, ge=0, le=10, strict=True, description="AdamW's decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, strict=True)
    adam_beta2: float = Field(0.999, ge=0, lt=1, strict=True)
    adam_epsilon: float = Field(1e-8, gt=0, le=1, strict=True)
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="Optimizer; 8-bit ones quantise their state, the paged one needs a GPU."
    )
    max_grad_norm: float = Field(1.0, gt=0, le=1e9, strict=True, description="Gradients are clipped to this global norm.")
    save_steps: PositiveSteps = Field(500, description="Steps between checkpoints; the last step always saves one.")
    save_total_limit: int = Field(2, ge=1, le=1000, strict=True, description="Checkpoints kept, the newest first.")
    eval_steps: PositiveSteps = Field(500, description="Steps between evaluations; also before and after training.")
    logging_steps: PositiveSteps = Field(5, description="Steps between metric lines.")
    early_stopping_patience: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        None, description="Evaluations without improvement before the job stops; then the best weights are handed out."
    )
    metric_for_best_model: Literal["eval_loss"] = Field("eval_loss", description="What `metrics.best` is judged by.")
    dataloader_num_workers: int = Field(
        1, ge=0, le=64, strict=True, description="Processes per worker that tokenise ahead of the step."
    )
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=1000, strict=True)] | None = Field(
        None, description="NEFTune noise on the input embeddings."
    )
    seed: int = Field(42, ge=0, le=2**32 - 1, strict=True, description="Everything random derives from it.")


Name = Annotated[str, Field(min_length=1, max_length=256)]


class AdapterConfig(Section):
    """LoRA."""

    r: int = Field(16, ge=1, le=1024, strict=True, description="Rank.")
    alpha: float = Field(16, gt=0, le=65_536, strict=True, description="Scale: the update is multiplied by alpha / r.")
    dropout: float = Field(0.1, ge=0, lt=1, strict=True, description="Dropout on the adapter's input.")
    targets: list[Name] = Field(
        default_factory=lambda: ["all-linear"],
        min_length=1,
        max_length=256,
        description='["all-linear"] (every linear layer but the head and the routers of experts), or module name suffixes.',
    )
    use_rslora: bool = Field(False, strict=True, description="Scale by alpha / sqrt(r) (rank-stabilised LoRA).")
    use_dora: bool = Field(False, strict=True, description="Weight-decomposed LoRA.")
    lora_plus_ratio: Annotated[float, Field(gt=0, le=1024, strict=True)] | None = Field(
        None, description="Learning rate of B over that of A (LoRA+); 16 is usual."
    )
    init: Literal["default", "pissa", "loftq", "gaussian"] = Field(
        "default",
        description="How the adapter starts: at zero (default, gaussian), at the base's principal part (pissa; the saved adapter "
        "has rank 2r), or at what quantisation lost (loftq).",
    )
    modules_to_save: Annotated[list[Name], Field(min_length=1, max_length=256)] | None = Field(
        None, description="Name suffixes of modules trained in full and saved with the adapter, such as lm_head."
    )
    init_from: Annotated[str, Field(min_length=1, max_length=2048)] | None = Field(
        None,
        description="Adapter that training continues from: request_id of a job of this org that is COMPLETED, or an "
        "s3://bucket/folder or gs://bucket/folder that the model's or the dataset's secret opens.",
    )


class Freeze(Section):
    """What of a vlm, besides its language model, keeps the weights of the base."""

    vision: bool = Field(True, strict=True, description="The vision tower, which looks at the images.")
    aligner: bool = Field(
        True, strict=True, description="The aligner (connector, merger, projector) between tower and language model."
    )


class Distributed(Section):
    """How workers share the model."""

    type: Literal["ddp", "fsdp"] = Field("ddp", description="ddp: a copy in each worker; fsdp: sharded over them.")


class Export(Section):
    """What is written besides the adapter."""

    merge: bool = Field(False, strict=True, description="Also write base + adapter merged, in torch_dtype.")


class TrainConfig(Section):
    """How the model is trained."""

    type: Annotated[Literal["sft", "dpo", "kto", "orpo", "grpo"], OnlyYet("sft")] = Field("sft", description="Objective.")
    torch_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16",
        description="Dtype of the base and of compute; a machine without bf16 units computes in float32 and says so. float16 is "
        "computed in bfloat16.",
    )
    task_type: Literal["causal_lm"] = Field("causal_lm", description="Task.")
    train_type: Literal["lora", "full"] = Field("lora", description="Train an adapter, or every weight (not with quantization).")
    tuner_backend: Literal["tuneyard", "simplismart", "peft"] = Field("tuneyard", description="Names of the same engine.")
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    adapter_config: AdapterConfig = Field(default_factory=AdapterConfig)
    freeze: Freeze = Field(default_factory=Freeze)
    distributed: Distributed = Field(default_factory=Distributed)
    export: Export = Field(default_factory=Export)
    report_to: list[Annotated[str, Field(min_length=1, max_length=640)]] = Field(
        default_factory=list,
        max_length=4,
        description="Secrets of type mlflow or wandb: trackers that the metrics are sent to, besides the run's folder.",
    )

    @model_validator(mode="before")
    @classmethod
    def _full_learns_more_slowly(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("train_type") != "full":
            return data
        given = data.get("hyperparameters") or {}
        if not isinstance(given, dict) or given.get("learning_rate") is not None:
            return data
        return data | {"hyperparameters": given | {"learning_rate": FULL_LEARNING_RATE}}


# --- dataset_details --------------------------------------------------------------------------------------------


class DatasetDetails(Section):
    """Where the dataset is."""

    dataset_name: str = Field("", max_length=256, description="Free text.")
    dataset_path: str = Field(
        min_length=1,
        max_length=2048,
        description="s3://bucket/key, s3://bucket/prefix/, gs:// likewise, or the id of a dataset of the hub.",
    )
    dataset_description: str = Field("", max_length=4096, description="Free text.")
    dataset_type: Literal["jsonl", "zip", "json", "parquet"] = Field(
        "jsonl", description="File type; jsonl and json may be compressed, .gz or .zst. A zip holds train.jsonl and its images."
    )
    dataset_format: Literal["sharegpt", "openai", "alpaca", "prompt_completion", "text", "preference", "auto"] = Field(
        "sharegpt",
        description="Shape of a row; auto tells it by the keys of each. sft trains on the preferred answers of preference rows.",
    )
    source_type: Literal["s3", "gcs", "hf", "local"] = Field(
        "s3", description="Where the dataset lives; runs without the service take local, a path, too."
    )
    ownership: Literal["public", "private"] = Field("private", description="private s3 and gcs need secret_id.")
    secret_id: str | None = Field(
        None,
        min_length=1,
        max_length=640,
        description="Secret that opens the dataset: of POST /secret/, or an ARN of AWS Secrets Manager that the operator allows.",
    )
    region: str | None = Field(None, max_length=64, description="AWS region of the bucket.")


# --- infra_config -----------------------------------------------------------------------------------------------


class InfraConfig(Section):
    """How many workers, on what."""

    gpu_type: Annotated[str, BeforeValidator(_lower)] = Field(
        min_length=1, max_length=64, description="A name of the operator's profile table, any case."
    )
    gpu_count: int = Field(1, ge=1, le=16, strict=True, description="GPUs per node.")
    node_count: int = Field(1, ge=1, le=MAX_NODES, strict=True, description="Nodes; workers = gpu_count * node_count.")
    min_node_count: Annotated[int, Field(ge=1, le=MAX_NODES, strict=True)] | None = Field(
        None, description="Go on with as few nodes as this when there is no room for node_count; default node_count."
    )
    infra_type: Literal["ray", "simplismart"] = Field("ray", description="Names of the same thing.")
    priority: int = Field(0, ge=-10, le=10, strict=True, description="Higher runs first; waiting half an hour is worth one.")
    max_runtime_s: Annotated[int, Field(ge=1, le=31_536_000, strict=True)] | None = Field(
        None, description="Longest time of running, in seconds; then the job is saved and FAILED, and can be resumed."
    )
    max_retries: int = Field(
        3, ge=0, le=100, strict=True, description="Restarts after a fault; lost and preempted machines don't count."
    )

    @model_validator(mode="before")
    @classmethod
    def _takes_all_nodes_unless_told(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("min_node_count") is not None:
            return data
        nodes = data.get("node_count", cls.model_fields["node_count"].default)
        if type(nodes) is not int or not 1 <= nodes <= MAX_NODES:
            return data  # node_count is told alone
        return data | {"min_node_count": nodes}

    @property
    def num_workers(self) -> int:
        """World size."""
        return self.gpu_count * self.node_count


# --- rules over several fields ----------------------------------------------------------------------------------
# Each is about the sections that its parameters name, and says which field to mend.


def ratios_add_up(dataset_config: DatasetConfig) -> Iterator[Fault]:
    if isinstance(split := dataset_config.split, RandomSplit):
        total = math.fsum(split.ratios)
        if abs(total - 1) > 1e-6:
            yield Fault("dataset_config.split.ratios", f"ratios must add up to 1, these add up to {total:g}")
        elif split.ratios[0] == 0:
            yield Fault("dataset_config.split.ratios", "the first ratio is the training share and must be above 0")


def eval_file_is_next_to_the_dataset(dataset_config: DatasetConfig, dataset_details: DatasetDetails) -> Iterator[Fault]:
    split, source = dataset_config.split, dataset_details.source_type
    scheme = SCHEMES.get(source)
    if isinstance(split, FileSplit) and scheme is not None and not _is_object(split.eval_path, scheme):
        yield Fault("dataset_config.split.eval_path", f"eval_path must be {scheme}bucket/key when source_type is {source}")


def streaming_has_an_end(dataset_config: DatasetConfig, train_config: TrainConfig) -> Iterator[Fault]:
    if dataset_config.preprocessing.streaming and train_config.hyperparameters.max_steps is None:
        message = "a streamed dataset has no known length: streaming needs max_steps"
        yield Fault("train_config.hyperparameters.max_steps", message)


def streaming_reads_from_anywhere(dataset_config: DatasetConfig, dataset_details: DatasetDetails) -> Iterator[Fault]:
    pre, split = dataset_config.preprocessing, dataset_config.split
    if not pre.streaming:
        return
    if not pre.lazy_tokenize:
        message = "streamed rows are tokenised by the workers: lazy_tokenize must be true with streaming"
        yield Fault("dataset_config.preprocessing.lazy_tokenize", message)
    if dataset_details.dataset_type == "parquet":
        message = "streaming reads single rows, which jsonl and json files allow and parquet files don't: streaming must be false"
        yield Fault("dataset_config.preprocessing.streaming", message)
    if dataset_details.dataset_type == "zip":
        message = "rows of a zip are read once, with their images, before training: streaming must be false"
        yield Fault("dataset_config.preprocessing.streaming", message)
    paths = {"dataset_details.dataset_path": dataset_details.dataset_path}
    if isinstance(split, FileSplit):
        paths["dataset_config.split.eval_path"] = split.eval_path
    for field, path in paths.items():
        if path.endswith(COMPRESSED):
            yield Fault(field, "streaming reads single rows, which a compressed file doesn't allow: store it uncompressed")


def model_is_where_it_is_said(model_details: ModelDetails) -> Iterator[Fault]:
    field, name, scheme = "model_details.base_model", model_details.base_model, SCHEMES.get(model_details.source_type)
    if scheme is None and "://" in name:
        source = next((s for s, prefix in SCHEMES.items() if name.startswith(prefix)), "s3 or gcs")
        yield Fault(field, f"base_model must be a hub id such as owner/name; for a bucket's folder, source_type is {source}")
    elif scheme is None and not HUB_ID.fullmatch(name):
        yield Fault(field, "base_model must be a hub id such as owner/name")
    elif scheme is not None and not _is_object(name, scheme):
        yield Fault(field, f"base_model must be a folder {scheme}bucket/folder when source_type is {model_details.source_type}")


def only_the_hub_has_revisions(model_details: ModelDetails) -> Iterator[Fault]:
    if model_details.revision is not None and model_details.source_type in SCHEMES:
        yield Fault("model_details.revision", "a folder has no revisions: leave revision out, or name the folder of that version")


def private_model_has_a_secret(model_details: ModelDetails) -> Iterator[Fault]:
    if model_details.ownership == "private" and model_details.secret_id is None:
        yield Fault("model_details.secret_id", "a private model needs secret_id: the id of keys that POST /secret/ has stored")


def full_trains_unquantised_weights(model_details: ModelDetails, train_config: TrainConfig) -> Iterator[Fault]:
    if train_config.train_type == "full" and model_details.quantization is not None:
        message = "full trains the weights themselves, which can't be done on quantised ones: leave quantization out, or use lora"
        yield Fault("model_details.quantization", message)


def adapter_starts_once(train_config: TrainConfig) -> Iterator[Fault]:
    adapter = train_config.adapter_config
    if adapter.init_from is not None and adapter.init != "default":
        message = f"the adapter starts at the one of init_from: init {adapter.init} would be lost, leave one of them out"
        yield Fault("train_config.adapter_config.init", message)


def pissa_keeps_what_it_does_not_train(train_config: TrainConfig) -> Iterator[Fault]:
    if train_config.adapter_config.init != "pissa":
        return
    if train_config.hyperparameters.weight_decay > 0:
        message = "pissa moves the base's principal part into the adapter, and weight_decay would wear it away: it must be 0"
        yield Fault("train_config.hyperparameters.weight_decay", message)
    if train_config.distributed.type == "fsdp":
        yield Fault("train_config.distributed.type", "pissa trains half of each adapter, which fsdp can't tell apart: use ddp")


def loftq_has_something_to_make_up_for(model_details: ModelDetails, train_config: TrainConfig) -> Iterator[Fault]:
    if train_config.adapter_config.init == "loftq" and model_details.quantization is None:
        message = "loftq starts from what quantisation lost: give model_details.quantization, or another init"
        yield Fault("train_config.adapter_config.init", message)


def early_stopping_has_something_to_judge_by(dataset_config: DatasetConfig, train_config: TrainConfig) -> Iterator[Fault]:
    split, patience = dataset_config.split, train_config.hyperparameters.early_stopping_patience
    evaluates = not isinstance(split, NoSplit) and not (isinstance(split, RandomSplit) and split.ratios[1] == 0)
    if patience is not None and not evaluates:
        message = (
            "early stopping goes by eval_loss: give dataset_config.split an eval share, or leave early_stopping_patience out"
        )
        yield Fault("train_config.hyperparameters.early_stopping_patience", message)


def fsdp_shards_what_it_can(model_details: ModelDetails, train_config: TrainConfig) -> Iterator[Fault]:
    if train_config.distributed.type != "fsdp":
        return
    if model_details.quantization is not None and model_details.quantization.quant_bits == 8:
        message = "fsdp can't shard 8-bit weights, which are no floating-point numbers: use quant_bits 4, or ddp"
        yield Fault("train_config.distributed.type", message)
    if train_config.hyperparameters.optim != "adamw":
        message = "8-bit optimizers keep their state by whole tensors, which fsdp doesn't have: use adamw, or ddp"
        yield Fault("train_config.hyperparameters.optim", message)


def all_linear_is_alone(train_config: TrainConfig) -> Iterator[Fault]:
    targets = train_config.adapter_config.targets
    if "all-linear" in targets and len(targets) > 1:
        message = '"all-linear" already means every layer: give it alone, or names only'
        yield Fault("train_config.adapter_config.targets", message)


def images_come_in_a_zip(model_details: ModelDetails, dataset_details: DatasetDetails) -> Iterator[Fault]:
    vision, zipped = model_details.model_type == "vlm", dataset_details.dataset_type == "zip"
    if vision and not zipped:
        message = f"a vlm learns from images: its dataset is a zip of them with a train.jsonl, not {dataset_details.dataset_type}"
        yield Fault("dataset_details.dataset_type", message)
    elif zipped and not vision:
        yield Fault("dataset_details.dataset_type", "a zip holds images, for model_type vlm; an llm's rows come as jsonl")


def only_a_vlm_has_pixels(model_details: ModelDetails, dataset_config: DatasetConfig) -> Iterator[Fault]:
    if dataset_config.preprocessing.max_pixels is not None and model_details.model_type != "vlm":
        yield Fault(
            "dataset_config.preprocessing.max_pixels", "max_pixels is for images, which only a vlm's rows have: leave it out"
        )


def only_a_vlm_has_more_to_train(model_details: ModelDetails, train_config: TrainConfig) -> Iterator[Fault]:
    freeze, hp = train_config.freeze, train_config.hyperparameters
    for part, is_frozen in (("vision", freeze.vision), ("aligner", freeze.aligner)):
        field = f"train_config.freeze.{part}"
        if model_details.model_type == "llm" and not is_frozen:
            yield Fault(field, f"an llm job trains the language model alone: {part} must stay frozen, or model_type be vlm")
        elif is_frozen and getattr(hp, f"{part}_learning_rate") is not None:
            rate = f"train_config.hyperparameters.{part}_learning_rate"
            yield Fault(rate, f"{part} is frozen, so it has no learning rate: leave this out, or set {field} to false")


def dataset_is_where_it_is_said(dataset_details: DatasetDetails) -> Iterator[Fault]:
    field, source, path = "dataset_details.dataset_path", dataset_details.source_type, dataset_details.dataset_path
    scheme = SCHEMES.get(source)
    if scheme is not None and not path.startswith(scheme):
        yield Fault(field, f"dataset_path must start with {scheme} when source_type is {source}")
    elif scheme is not None and not _is_object(path, scheme):
        yield Fault(field, f"dataset_path must be {scheme}bucket/key")
    elif source == "hf" and not HUB_ID.fullmatch(path):
        yield Fault(field, "dataset_path must be the id of a dataset of the hub, such as owner/name, when source_type is hf")


def private_dataset_has_a_secret(dataset_details: DatasetDetails) -> Iterator[Fault]:
    if dataset_details.source_type in SCHEMES and dataset_details.ownership == "private" and dataset_details.secret_id is None:
        message = "a private dataset needs secret_id: the id of keys that POST /secret/ has stored"
        yield Fault("dataset_details.secret_id", message)


def fewest_nodes_are_not_more(infra_config: InfraConfig) -> Iterator[Fault]:
    fewest, nodes = infra_config.min_node_count, infra_config.node_count
    if fewest is not None and fewest > nodes:
        yield Fault("infra_config.min_node_count", f"min_node_count must be at most node_count, which is {nodes}")


SCHEMES = {"s3": "s3://", "gcs": "gs://"}
RULES: tuple[Rule, ...] = (
    ratios_add_up,
    eval_file_is_next_to_the_dataset,
    streaming_has_an_end,
    streaming_reads_from_anywhere,
    model_is_where_it_is_said,
    only_the_hub_has_revisions,
    private_model_has_a_secret,
    full_trains_unquantised_weights,
    adapter_starts_once,
    pissa_keeps_what_it_does_not_train,
    loftq_has_something_to_make_up_for,
    early_stopping_has_something_to_judge_by,
    fsdp_shards_what_it_can,
    all_linear_is_alone,
    images_come_in_a_zip,
    only_a_vlm_has_pixels,
    only_a_vlm_has_more_to_train,
    dataset_is_where_it_is_said,
    private_dataset_has_a_secret,
    fewest_nodes_are_not_more,
)


def _is_object(uri: str, scheme: str) -> bool:
    bucket, _, key = uri.removeprefix(scheme).partition("/")
    return uri.startswith(scheme) and bool(BUCKET.fullmatch(bucket)) and bool(key)


# --- the job ----------------------------------------------------------------------------------------------------


def _org(value: str) -> str:
    try:
        return str(uuid.UUID(value))
    except ValueError:
        raise PydanticCustomError("uuid", "must be a UUID") from None


def _experiment_name(value: str) -> str:
    if not re.fullmatch(EXPERIMENT_NAME, value):
        said = "must be 1 to 128 letters, digits and . _ - without blanks"
        raise PydanticCustomError("experiment_name", said, {"pattern": EXPERIMENT_NAME})  # type: ignore[arg-type]
    return value


class JobSpec(Section):
    """A whole job, as submitted. Secrets appear by reference only."""

    org: Annotated[str, AfterValidator(_org), WithJsonSchema({"type": "string", "format": "uuid"})] = Field(
        description="Organisation that owns the job."
    )
    experiment_name: Annotated[
        str, AfterValidator(_experiment_name), WithJsonSchema({"type": "string", "pattern": EXPERIMENT_NAME})
    ] = Field(
        description="1-128 of letters, digits, `.`, `_`, `-`; unique among the org's jobs that run or completed.",
    )
    dataset_config: DatasetConfig = Field(default_factory=DatasetConfig)
    model_details: ModelDetails
    train_config: TrainConfig = Field(default_factory=TrainConfig)
    dataset_details: DatasetDetails
    infra_config: InfraConfig

    @model_validator(mode="wrap")
    @classmethod
    def _all_errors_at_once(cls, data: Any, validate: ModelWrapValidatorHandler[JobSpec]) -> JobSpec:
        return held_to(RULES, cls, data, validate)
