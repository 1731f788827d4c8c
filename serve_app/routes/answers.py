"""Every answer of the interface, field by field: what the OpenAPI document and docs/api.md say, and the tests hold routes to.

Typed dictionaries, not models: an answer is built once, rendered as it is, and nothing validates it again on its way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, NotRequired

from fastapi import Response
from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, to_json
from typing_extensions import TypedDict

from serve_app.lifecycle import Phase, Status
from train_loop.section import Section
from train_loop.spec import DatasetConfig, DatasetDetails, InfraConfig, ModelDetails, TrainConfig


def reply(answer: Any) -> Response:
    """An answer's JSON; a number that isn't one (a loss that went wrong) is null."""
    return Response(to_json(answer, inf_nan_mode="null"), media_type="application/json")


def documented(
    model: Any, said: str, example: Any = None, *, refused: Sequence[int] = (), **more: Any
) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: what 200 holds, and with which statuses it refuses that others with a token or a body don't have."""
    content: dict[str, Any] = {} if example is None else {"application/json": {"example": example}}
    return {200: {"model": model, "description": said, "content": content | more}, **{status: {} for status in refused}}


class Like:
    """In an annotation: this text is one of that enumeration's, or this dictionary has that section's fields."""

    def __init__(self, said: type[Section | StrEnum]) -> None:
        self.said = said

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(self.said)


def _is(description: str, **more: Any) -> Any:
    return Field(description=description, **more)


def _time(description: str) -> Any:
    return Field(description=description, json_schema_extra={"format": "date-time"})


def _id(description: str) -> Any:
    return Field(description=description, json_schema_extra={"format": "uuid"})


class Health(TypedDict):
    """The service's state in a word."""

    status: Annotated[str, _is("`ok`; or `ready`, or `paused` while the operator lets no job start.")]
    message: NotRequired[Annotated[str, _is("While it is paused: since when, and what that means.")]]


class Submitted(TypedDict):
    """A job that was accepted, and is durable."""

    request_id: Annotated[str, _id("The job's id.")]
    status: Annotated[str, Like(Status), _is("QUEUED; of a repeated Idempotency-Key, what the job is now.")]
    message: Annotated[str, _is("What was accepted: base, length, workers, data, warnings; for a person.")]
    experiment_name: Annotated[str, _is("The job's name.")]


class MetricPoint(TypedDict):
    """One logging step. What wasn't measured at this step is left out."""

    step: Annotated[int, _is("Optimizer steps so far; 0 is before training.")]
    epoch: NotRequired[Annotated[float, _is("Passes over the training rows so far.")]]
    loss: NotRequired[Annotated[float | None, _is("Mean training loss of a supervised token since the point before.")]]
    eval_loss: NotRequired[Annotated[float | None, _is("Loss on the evaluation rows.")]]
    learning_rate: NotRequired[Annotated[float, _is("Learning rate of this step.")]]
    grad_norm: NotRequired[Annotated[float | None, _is("Norm of the gradient, before clipping.")]]
    tokens: NotRequired[Annotated[int, _is("Tokens of all workers since the point before.")]]
    tokens_per_second: NotRequired[Annotated[float, _is("Tokens of all workers in a second, since the point before.")]]
    memory_bytes: NotRequired[Annotated[int, _is("Most GPU memory of the first worker since the point before; on GPUs only.")]]
    time: NotRequired[Annotated[float, _is("When, in seconds of Unix time.")]]


class BestPoint(TypedDict):
    """The best evaluation so far."""

    step: Annotated[int, _is("After this step.")]
    eval_loss: Annotated[float | None, _is("Its loss.")]


class JobMetrics(TypedDict, total=False):
    """A job's numbers in short; empty until there are some."""

    last: Annotated[MetricPoint | None, _is("The last point that has a loss.")]
    best: Annotated[BestPoint | None, _is("The best evaluation after training began.")]
    eval_loss_before: Annotated[float | None, _is("Evaluation loss before training.")]
    eval_loss_after: Annotated[float | None, _is("The last evaluation loss.")]


class JobAnswer(TypedDict):
    """A job. The same from its actor while it runs and from the store; `updated_at` says how old it is."""

    request_id: Annotated[str, _id("The job's id.")]
    org: Annotated[str, _id("Organisation that owns it.")]
    experiment_name: Annotated[str, _is("Its name.")]
    status: Annotated[str, Like(Status), _is("Where it stands; COMPLETED, FAILED and CANCELED are final.")]
    phase: Annotated[str, Like(Phase), _is("What it does at the moment.")]
    message: Annotated[str | None, _is("The same for a person.")]
    progress: Annotated[float, _is("Share of the steps done, 0 to 1.")]
    step: Annotated[int, _is("Optimizer steps done.")]
    total_steps: Annotated[int | None, _is("Optimizer steps in all, once known.")]
    epoch: Annotated[float, _is("Passes over the training rows so far.")]
    eta_s: Annotated[float | None, _is("Seconds of training left, by the pace of the last steps.")]
    created_at: Annotated[str, _time("When it was submitted (RFC 3339, UTC, as all times).")]
    updated_at: Annotated[str, _time("When this was true.")]
    started_at: Annotated[str | None, _time("When its first attempt began.")]
    completed_at: Annotated[str | None, _time("When it came to its final state.")]
    queue_position: Annotated[int | None, _is("While QUEUED: 1 is the next to start.")]
    attempt: Annotated[int, _is("How many times it was started.")]
    ray_job: Annotated[str | None, _is("Submission id of a run that `ray job submit` started outside the service, else null.")]
    dataset_config: Annotated[dict[str, Any], Like(DatasetConfig), _is("As resolved, defaults filled in; so the next four.")]
    model_details: Annotated[dict[str, Any], Like(ModelDetails)]
    train_config: Annotated[dict[str, Any], Like(TrainConfig)]
    dataset_details: Annotated[dict[str, Any], Like(DatasetDetails)]
    infra_config: Annotated[dict[str, Any], Like(InfraConfig)]
    metrics: Annotated[JobMetrics, _is("Last and best numbers.")]
    output_model_path: Annotated[str | None, _is("Folder of the adapter, or of the full model, once COMPLETED.")]
    error_message: Annotated[str | None, _is("Of a FAILED job: what to mend.")]
    error_code: Annotated[str | None, _is("The same as a word that stays the same.")]


class JobList(TypedDict):
    """One page of jobs."""

    jobs: Annotated[list[JobAnswer], _is("Newest first.")]
    next_cursor: Annotated[str | None, _is("`cursor` of the next page; null on the last.")]


class Points(TypedDict):
    """Metric points, by step."""

    points: Annotated[list[MetricPoint], _is("In order of steps, at most 10,000.")]


class EventEntry(TypedDict):
    """One thing that happened to a job."""

    id: Annotated[int, _is("Grows; the next page's `after`.")]
    time: Annotated[str, _time("When.")]
    kind: Annotated[str, _is("What, in a word: queued, started, completed …")]
    message: Annotated[str, _is("What, in a sentence.")]


class Events(TypedDict):
    """The event log, a page of it."""

    events: Annotated[list[EventEntry], _is("Oldest first, at most 1000.")]


class LogEntry(TypedDict):
    """One line that a worker logged or printed."""

    id: Annotated[int, _is("Grows; the next page's `after`.")]
    time: Annotated[str, _time("When.")]
    attempt: Annotated[int, _is("Of which attempt.")]
    rank: Annotated[int, _is("By which worker.")]
    line: Annotated[str, _is("Its text, secrets taken out.")]


class Logs(TypedDict):
    """Log lines, a page of them."""

    logs: Annotated[list[LogEntry], _is("In order.")]


class ArtifactFile(TypedDict):
    """One file of a job."""

    name: Annotated[str, _is("Its path within the run's folder.")]
    uri: Annotated[str, _is("Where it is, for those with keys to the storage.")]
    size_bytes: Annotated[int, _is("Its size.")]
    sha256: Annotated[str | None, _is("Its hash, of files that the manifest lists.")]
    url: Annotated[str | None, _is("A link that works for 15 minutes; null where the storage is a plain folder.")]


class Artifacts(TypedDict):
    """A job's files."""

    files: Annotated[list[ArtifactFile], _is("By name.")]


class PlanRows(TypedDict):
    """Rows of the dataset."""

    total: Annotated[int, _is("Usable rows.")]
    exact: Annotated[bool, _is("Counted, and not estimated from a sample.")]
    train: Annotated[int, _is("Rows to train on.")]
    eval: Annotated[int, _is("Rows to evaluate on.")]
    read: Annotated[int, _is("Rows looked at for this plan.")]


class PlanTokens(TypedDict):
    """Tokens of the rows looked at."""

    per_row_mean: Annotated[float, _is("Mean length, before truncation.")]
    per_row_max: Annotated[int, _is("Longest, before truncation.")]
    supervised_share: Annotated[float, _is("Share of the tokens that carry loss.")]
    truncated_share: Annotated[float, _is("Share of the rows longer than max_length.")]
    trained_on: Annotated[int, _is("Tokens of the whole job, all passes.")]


class PlanMemory(TypedDict):
    """Peak memory of one worker by part, estimated."""

    weights_bytes: Annotated[int, _is("The base.")]
    adapter_bytes: Annotated[int, _is("What is trained.")]
    gradients_bytes: Annotated[int, _is("Its gradients.")]
    optimizer_bytes: Annotated[int, _is("Its optimizer's state.")]
    checkpoint_bytes: Annotated[int, _is("On CPUs: a copy of what is trained and of that state, for checkpoints.")]
    activations_bytes: Annotated[int, _is("What is kept for the backward pass.")]
    logits_bytes: Annotated[int, _is("A chunk of the head's outputs.")]
    runtime_bytes: Annotated[int, _is("Interpreter, libraries, CUDA context.")]
    total_bytes: Annotated[int, _is("The peak.")]
    available_bytes: Annotated[int | None, _is("What the worker's machine has, if known.")]
    batch_tokens: Annotated[int, _is("Tokens of a large micro-batch, padding included.")]


class PlanSegment(TypedDict):
    """A run of tokens."""

    text: Annotated[str, _is("The tokens as text.")]
    trained: Annotated[bool, _is("Whether they carry loss.")]


class PlanSample(TypedDict):
    """A rendered row."""

    tokens: Annotated[int, _is("Its length.")]
    trained_tokens: Annotated[int, _is("How many of them carry loss.")]
    turns: Annotated[int, _is("Messages.")]
    segments: Annotated[list[PlanSegment], _is("The whole text, cut where training starts and stops.")]


class Plan(TypedDict):
    """What a job would take."""

    message: Annotated[str, _is("The job in a sentence.")]
    workers: Annotated[int, _is("gpu_count * node_count.")]
    rows: Annotated[PlanRows, _is("Rows.")]
    tokens: Annotated[PlanTokens, _is("Tokens.")]
    steps: Annotated[int, _is("Optimizer steps in all.")]
    samples_per_step: Annotated[int, _is("Samples of a step, over all workers.")]
    trainable_params: Annotated[int, _is("Numbers that are trained.")]
    memory: Annotated[PlanMemory, _is("Memory of a worker.")]
    time_s: Annotated[int, _is("Seconds from start to end, estimated.")]
    gpu_hours: Annotated[float, _is("The same times the workers, in hours.")]
    price: Annotated[float | None, _is("At the profile's price_per_hour; null without one.")]
    samples: Annotated[list[PlanSample], _is("The first three usable rows, rendered.")]
    warnings: Annotated[list[str], _is("What to know before paying for it.")]


class SecretAnswer(TypedDict):
    """What may be told about a secret."""

    secret_id: Annotated[str, _id("What jobs name it by.")]
    name: Annotated[str, _is("Its name, for people.")]
    type: Annotated[str, _is("aws, s3, gcs, hf, mlflow or wandb.")]
    created_at: Annotated[str, _time("When it was stored.")]


class Secrets(TypedDict):
    """The org's secrets."""

    secrets: Annotated[list[SecretAnswer], _is("Without values.")]


class WebhookAnswer(TypedDict):
    """An endpoint that is told when jobs of its org end."""

    webhook_id: Annotated[str, _id("Its id.")]
    url: Annotated[str, _is("Where messages are posted.")]
    events: Annotated[list[str], _is("Which: job.completed, job.failed, job.canceled.")]
    created_at: Annotated[str, _time("When it was stored.")]


class NewWebhook(WebhookAnswer):
    """The same, with what only this answer ever shows."""

    secret: Annotated[str, _is("Signs its messages: `whsec_` and the key in base64.")]


class WebhookList(TypedDict):
    """The org's webhooks."""

    webhooks: Annotated[list[WebhookAnswer], _is("Newest first, without secrets.")]


class TestedWebhook(TypedDict):
    """What came of a test message."""

    webhook_id: Annotated[str, _id("Its id.")]
    delivered: Annotated[bool, _is("Whether the endpoint answered with a status of 200 to 299.")]
    error: Annotated[str | None, _is("Else why not.")]


class DeletedWebhook(TypedDict):
    """A webhook that is gone."""

    webhook_id: Annotated[str, _id("Its id.")]
    deleted: Annotated[bool, _is("true.")]


class Deleted(TypedDict):
    """A secret that is gone."""

    secret_id: Annotated[str, _id("Its id.")]
    deleted: Annotated[bool, _is("true.")]
