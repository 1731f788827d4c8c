"""JobSpec: the five sections of a job as pydantic models. The one source of fields, defaults, bounds and docs.

Every field of the HTTP contract is declared here. A value whose behaviour isn't built yet is refused by `NotYet`,
so that nothing a user asks for is silently ignored.
"""

from __future__ import annotations

import math
import re
import uuid
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

S3_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]$")
# The hub's own rule; each part also becomes a folder's name in the mirror, so `..` and 300 letters must not pass.
HUB_ID = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9_][\w.\-]{0,95}(/[A-Za-z0-9_][\w.\-]{0,95})?", re.ASCII)
EXPERIMENT_NAME = r"^[A-Za-z0-9._-]{1,128}$"
AWS_REGION = re.compile(r"^(us|eu|ap|sa|ca|me|af|il|mx|cn|us-gov|us-iso|us-isob)-[a-z]+-\d$")


def _refuse(value: object) -> PydanticCustomError:
    return PydanticCustomError("not_supported_yet", "{value} is not supported yet", {"value": repr(value)})


def _wrong(field: str, message: str, code: str = "section", **context: Any) -> PydanticCustomError:
    """An error that several fields make together, shown at `field` of the section."""
    return PydanticCustomError(code, message, {"field": field, **context})  # type: ignore[arg-type]


def NotYet(*values: object) -> AfterValidator:  # noqa: N802 - reads as an annotation
    """Refuse these values as "not supported yet"."""

    def check(value: Any) -> Any:
        if any(value is v or (value == v and type(value) is type(v)) for v in values):
            raise _refuse(value)
        return value

    return AfterValidator(check)


def OnlyYet(*values: object) -> AfterValidator:  # noqa: N802 - reads as an annotation
    """Refuse every value but these as "not supported yet"."""

    def check(value: Any) -> Any:
        if value not in values:
            raise _refuse(value)
        return value

    return AfterValidator(check)


def _lower(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


class Section(BaseModel):
    """Base of every section: unknown names are errors, numbers must be finite, `null` means the default."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        # Names such as model_type are the wire's, not pydantic's.
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return {k: v for k, v in data.items() if v is not None or k not in fields or fields[k].is_required()}


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
    streaming: Annotated[bool, NotYet(True)] = Field(
        False, strict=True, description="Read without materialising the dataset; needs hyperparameters.max_steps."
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


class RandomSplit(Section):
    """Split by a hash of seed and row, so membership doesn't move when rows are appended."""

    type: Literal["random"]
    ratios: list[Annotated[float, Field(ge=0, le=1, strict=True)]] = Field(
        min_length=2, max_length=3, description="[train, eval] or [train, eval, test]; sum 1."
    )

    @model_validator(mode="after")
    def _sum_is_one(self) -> RandomSplit:
        if abs(math.fsum(self.ratios) - 1) > 1e-6:
            raise _wrong("ratios", "ratios must add up to 1, these add up to {total}", total=f"{math.fsum(self.ratios):g}")
        if self.ratios[0] == 0:
            raise _wrong("ratios", "the first ratio is the training share and must be above 0")
        return self


class NoSplit(Section):
    """Everything is training data; nothing is evaluated."""

    type: Literal["none"]


class FileSplit(Section):
    """Evaluation rows come from a file of their own."""

    type: Annotated[Literal["file"], NotYet("file")]
    eval_path: str = Field(description="URI of the evaluation file.")


class DatasetConfig(Section):
    """How the dataset is read, rendered and split."""

    preprocessing: Preprocessing = Field(default_factory=Preprocessing)
    split: Annotated[RandomSplit | NoSplit | FileSplit, Field(discriminator="type")] = Field(
        default_factory=lambda: RandomSplit(type="random", ratios=[0.9, 0.1]), description="Train / eval / test."
    )


# --- model_details ----------------------------------------------------------------------------------------------


class Quantization(Section):
    """bitsandbytes quantisation of the frozen base."""

    quant_bits: Annotated[Literal[4, 8], NotYet(8)] = Field(description="4 (NF4 or FP4) or 8 (LLM.int8()).")
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type.")
    double_quant: bool = Field(True, strict=True, description="Quantise the quantisation constants too.")


class ModelDetails(Section):
    """The base model."""

    base_model: str = Field(min_length=1, max_length=512, description="Hub id (`owner/name`), or a folder URI for s3 and gcs.")
    ownership: Annotated[Literal["public", "private"], NotYet("private")] = Field(
        "public", description="private needs secret_id."
    )
    source_type: Annotated[Literal["hf", "s3", "gcs"], NotYet("s3", "gcs")] = Field(
        "hf", description="Where the base model lives; the operator's mirror is looked up first."
    )
    model_type: Annotated[Literal["llm", "vlm"], NotYet("vlm")] = Field(
        "llm", description="llm on a VLM base trains the language part only."
    )
    revision: Annotated[str | None, OnlyYet(None)] = Field(None, max_length=128, description="Commit or tag of the base model.")
    secret_id: Annotated[str | None, OnlyYet(None)] = Field(None, description="Secret that opens a private model.")
    region: Annotated[str | None, OnlyYet(None)] = Field(None, description="Cloud region of the model's bucket.")
    quantization: Quantization | None = Field(None, description="Quantise the frozen base; null keeps torch_dtype.")

    @model_validator(mode="after")
    def _hub_id(self) -> ModelDetails:
        if self.source_type == "hf" and not HUB_ID.fullmatch(self.base_model):
            raise _wrong("base_model", "base_model must be a hub id such as owner/name")
        return self


# --- train_config -----------------------------------------------------------------------------------------------

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
    learning_rate: float = Field(1e-4, gt=0, le=1, strict=True, description="Peak learning rate; 1e-5 is the default for full.")
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
    optim: Annotated[Literal["adamw", "adamw_8bit", "paged_adamw_8bit"], NotYet("adamw_8bit", "paged_adamw_8bit")] = Field(
        "adamw", description="Optimizer."
    )
    max_grad_norm: float = Field(1.0, gt=0, le=1e9, strict=True, description="Gradients are clipped to this global norm.")
    save_steps: PositiveSteps = Field(500, description="Steps between checkpoints; the last step always saves one.")
    save_total_limit: int = Field(2, ge=1, le=1000, strict=True, description="Checkpoints kept, the newest first.")
    eval_steps: PositiveSteps = Field(500, description="Steps between evaluations; also before and after training.")
    logging_steps: PositiveSteps = Field(5, description="Steps between metric lines.")
    early_stopping_patience: Annotated[int | None, OnlyYet(None)] = Field(
        None, description="Evaluations without improvement before the job stops."
    )
    metric_for_best_model: Literal["eval_loss"] = Field("eval_loss", description="What `metrics.best` is judged by.")
    dataloader_num_workers: int = Field(
        1, ge=0, le=64, strict=True, description="Processes per worker that tokenise ahead of the step."
    )
    neftune_noise_alpha: Annotated[float | None, OnlyYet(None)] = Field(
        None, description="NEFTune noise on the input embeddings."
    )
    seed: int = Field(42, ge=0, le=2**32 - 1, strict=True, description="Everything random derives from it.")


class AdapterConfig(Section):
    """LoRA."""

    r: int = Field(16, ge=1, le=1024, strict=True, description="Rank.")
    alpha: float = Field(16, gt=0, le=65_536, strict=True, description="Scale: the update is multiplied by alpha / r.")
    dropout: float = Field(0.1, ge=0, lt=1, strict=True, description="Dropout on the adapter's input.")
    targets: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        default_factory=lambda: ["all-linear"],
        min_length=1,
        max_length=256,
        description='["all-linear"] (every linear layer but the head), or module name suffixes.',
    )
    use_rslora: bool = Field(False, strict=True, description="Scale by alpha / sqrt(r) (rank-stabilised LoRA).")
    use_dora: Annotated[bool, NotYet(True)] = Field(False, strict=True, description="Weight-decomposed LoRA.")
    lora_plus_ratio: Annotated[float | None, OnlyYet(None)] = Field(
        None, description="Learning rate of B over that of A (LoRA+)."
    )
    init: Annotated[Literal["default", "pissa", "loftq", "gaussian"], NotYet("pissa", "loftq")] = Field(
        "default", description="How the adapter starts."
    )
    modules_to_save: Annotated[list[str] | None, OnlyYet(None)] = Field(
        None, description="Modules trained in full and saved with the adapter."
    )
    init_from: Annotated[str | None, OnlyYet(None)] = Field(
        None, description="Finished job (request_id) or URI whose adapter training continues from."
    )

    @model_validator(mode="after")
    def _all_linear_alone(self) -> AdapterConfig:
        if "all-linear" in self.targets and len(self.targets) > 1:
            raise _wrong("targets", '"all-linear" already means every layer: give it alone, or names only')
        return self


class Distributed(Section):
    """How workers share the model."""

    type: Annotated[Literal["ddp", "fsdp"], NotYet("fsdp")] = Field(
        "ddp", description="ddp: a copy in each worker; fsdp: sharded over them."
    )


class Export(Section):
    """What is written besides the adapter."""

    merge: Annotated[bool, NotYet(True)] = Field(False, strict=True, description="Also write base + adapter merged.")


class TrainConfig(Section):
    """How the model is trained."""

    type: Annotated[Literal["sft", "dpo", "kto", "orpo", "grpo"], OnlyYet("sft")] = Field("sft", description="Objective.")
    torch_dtype: Annotated[Literal["bfloat16", "float16", "float32"], NotYet("float16")] = Field(
        "bfloat16",
        description="Dtype of the base and of compute; a CPU without bf16 units computes in float32 and says so.",
    )
    task_type: Literal["causal_lm"] = Field("causal_lm", description="Task.")
    train_type: Annotated[Literal["lora", "full"], NotYet("full")] = Field(
        "lora", description="Train an adapter, or every weight (not with quantization)."
    )
    tuner_backend: Literal["tuneyard", "simplismart", "peft"] = Field("tuneyard", description="Names of the same engine.")
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    adapter_config: AdapterConfig = Field(default_factory=AdapterConfig)
    distributed: Distributed = Field(default_factory=Distributed)
    export: Export = Field(default_factory=Export)


# --- dataset_details --------------------------------------------------------------------------------------------


class DatasetDetails(Section):
    """Where the dataset is."""

    dataset_name: str = Field("", max_length=256, description="Free text.")
    dataset_path: str = Field(min_length=1, max_length=2048, description="s3://bucket/key.")
    dataset_description: str = Field("", max_length=4096, description="Free text.")
    dataset_type: Annotated[Literal["jsonl", "zip", "json", "parquet"], OnlyYet("jsonl")] = Field(
        "jsonl", description="File type."
    )
    dataset_format: Annotated[
        Literal["sharegpt", "openai", "alpaca", "prompt_completion", "text", "preference", "auto"],
        OnlyYet("sharegpt", "openai"),
    ] = Field("sharegpt", description="Shape of a row.")
    source_type: Annotated[Literal["s3", "gcs", "hf", "local"], NotYet("gcs", "hf")] = Field(
        "s3", description="Where the dataset lives; local is a path, for runs without the service."
    )
    ownership: Literal["public", "private"] = Field("private", description="private s3 needs secret_id.")
    secret_id: str | None = Field(
        None,
        min_length=1,
        max_length=640,
        description="Secret that opens the bucket: of POST /secret/, or an ARN of AWS Secrets Manager that the operator allows.",
    )
    region: str | None = Field(None, max_length=64, description="AWS region of the bucket.")

    @model_validator(mode="after")
    def _reachable(self) -> DatasetDetails:
        if self.source_type == "s3":
            bucket, _, key = self.dataset_path.removeprefix("s3://").partition("/")
            if not self.dataset_path.startswith("s3://"):
                raise _wrong("dataset_path", "dataset_path must start with s3:// when source_type is s3")
            if not S3_BUCKET.match(bucket) or not key:
                raise _wrong("dataset_path", "dataset_path must be s3://bucket/key")
            if key.endswith("/"):
                raise _wrong("dataset_path", "a prefix is not supported yet, name one object", "not_supported_yet")
            if self.ownership == "private" and self.secret_id is None:
                raise _wrong("secret_id", "a private dataset needs secret_id")
        return self


# --- infra_config -----------------------------------------------------------------------------------------------


class InfraConfig(Section):
    """How many workers, on what."""

    gpu_type: Annotated[str, BeforeValidator(_lower)] = Field(
        min_length=1, max_length=64, description="A name of the operator's profile table, any case."
    )
    gpu_count: int = Field(1, ge=1, le=16, strict=True, description="GPUs per node.")
    node_count: int = Field(1, ge=1, le=1024, strict=True, description="Nodes; workers = gpu_count * node_count.")
    min_node_count: Annotated[int, Field(ge=1, le=1024, strict=True)] | None = Field(
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

    @model_validator(mode="after")
    def _elastic(self) -> InfraConfig:
        if self.min_node_count is not None and self.min_node_count > self.node_count:
            raise _wrong("min_node_count", "min_node_count can't be above node_count, {count}", count=self.node_count)
        return self

    @property
    def num_workers(self) -> int:
        """World size."""
        return self.gpu_count * self.node_count


# --- the job ----------------------------------------------------------------------------------------------------


def _org(value: str) -> str:
    try:
        return str(uuid.UUID(value))
    except ValueError:
        raise PydanticCustomError("uuid", "org must be a UUID") from None


class JobSpec(Section):
    """A whole job, as submitted. Secrets appear by reference only."""

    org: Annotated[str, AfterValidator(_org), WithJsonSchema({"type": "string", "format": "uuid"})] = Field(
        description="Organisation that owns the job."
    )
    experiment_name: str = Field(
        pattern=EXPERIMENT_NAME,
        description="1-128 of letters, digits, `.`, `_`, `-`; unique among the org's jobs that run or completed.",
    )
    dataset_config: DatasetConfig = Field(default_factory=DatasetConfig)
    model_details: ModelDetails
    train_config: TrainConfig = Field(default_factory=TrainConfig)
    dataset_details: DatasetDetails
    infra_config: InfraConfig
