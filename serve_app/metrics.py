"""Every metric of the service. They leave by Ray's own metrics agent on each node, named `ray_` and what stands here.

The agent drops a gauge that isn't set for two of its intervals (20 s). Counters and histograms it keeps for as long as the node
is there, and one series for each process that ever wrote them. Hence who may write what: the dispatcher and the ingress, which
last, count and observe; the actor of a job, of which there is one for each attempt, only sets gauges. So `request_id` can be a
label of those: its series end with the job, and there are never more than jobs that run (`max_running_jobs`). No other metric has
it. Of orgs those with most jobs are named (see `serve_app.meter`); every other label has few values, known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

PREFIX = "ray_"  # Ray's own, of all that it exports
JOB = ("request_id", "org", "experiment")


@dataclass(frozen=True)
class Metric:
    """One metric: what it is called, what its labels are, what it says."""

    kind: Literal["gauge", "counter", "histogram"]
    name: str
    labels: tuple[str, ...]
    help: str
    buckets: Sequence[float] = ()

    @cached_property
    def _of_ray(self) -> Any:
        from ray.util import metrics  # here, so that what only needs the job store starts without Ray

        if self.kind == "histogram":
            return metrics.Histogram(self.name, self.help, list(self.buckets), self.labels)
        kind = metrics.Gauge if self.kind == "gauge" else metrics.Counter
        return kind(self.name, self.help, self.labels)

    def record(self, value: float, **labels: str) -> None:
        """Set a gauge, observe a histogram's value, add to a counter: 0 too, which Ray's own `inc` doesn't take.

        A counter that begins at 0 lets Prometheus see its first increase.
        """
        self._of_ray._record(float(value), labels)


METRICS: list[Metric] = []


def _gauge(name: str, help_: str, *labels: str) -> Metric:
    METRICS.append(Metric("gauge", f"tuneyard_{name}", labels, help_))
    return METRICS[-1]


def _counter(name: str, help_: str, *labels: str) -> Metric:
    METRICS.append(Metric("counter", f"tuneyard_{name}", labels, help_))
    return METRICS[-1]


def _histogram(name: str, help_: str, buckets: Sequence[float], *labels: str) -> Metric:
    METRICS.append(Metric("histogram", f"tuneyard_{name}", labels, help_, buckets))
    return METRICS[-1]


# --- the queue, by the dispatcher that leads ---

JOBS = _gauge(
    "jobs",
    "Jobs in the store, by state: queued, running (also outside the service), retrying (between two attempts), completed, "
    "failed, canceled.",
    "state",
    "org",
)
WORKERS = _gauge("workers", "Workers of running jobs.", "org")
OLDEST_QUEUED = _gauge("oldest_queued_seconds", "For how long the longest waiting job has been queued; 0 when none is.")
HEARTBEAT_AGE = _gauge("heartbeat_age_seconds", "Age of the oldest heartbeat of a running job's actor; 0 when none runs.")
LAST_PASS = _gauge(
    "dispatcher_pass_timestamp_seconds", "Unix time of the last whole pass of the dispatcher, which holds the lease."
)
ATTEMPTS = _counter("attempts_started", "Attempts started.", "gpu_type")
FAULTS = _counter(
    "attempt_faults", "Attempts that a fault has ended, by cause. Another one follows, or the job is FAILED.", "cause"
)
QUEUE_WAIT = _histogram(
    "queue_wait_seconds",
    "Time from being queued to the start of an attempt.",
    (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600),
    "gpu_type",
)
PASS_TIME = _histogram(
    "dispatch_pass_seconds",
    "Time of one pass of the dispatcher: reconciliation and admission.",
    (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
PASSES = _counter("dispatch_passes", "Passes of the dispatcher by outcome: done, store_away, failed.", "outcome")

# --- what is around the service ---

STORE_ERRORS = _counter(
    "store_errors", "Times that the job store could not be reached, by process: ingress, dispatcher.", "process"
)
STORAGE_OUTAGES = _counter(
    "storage_outages", "Times that an object storage was away, by who saw it: a run, the ingress.", "process"
)

# --- HTTP, by each ingress replica ---

HTTP_TIME = _histogram(
    "http_request_seconds",
    "Time to the first byte of the answer, by route, method and class of status (2xx, 4xx, 5xx).",
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    "route",
    "method",
    "status",
)

# --- a job that runs, by its actor ---

JOB_STEP = _gauge("job_step", "Optimizer steps done.", *JOB)
JOB_TOTAL_STEPS = _gauge("job_total_steps", "Optimizer steps in all.", *JOB)
JOB_ATTEMPT = _gauge("job_attempt", "Which attempt at the job it is.", *JOB)
JOB_PROGRESS = _gauge("job_progress_timestamp_seconds", "Unix time of the job's last step or change of phase.", *JOB, "phase")
JOB_LOSS = _gauge("job_loss", "Mean training loss of the last logged steps.", *JOB)
JOB_EVAL_LOSS = _gauge("job_eval_loss", "Loss of the last evaluation.", *JOB)
JOB_TOKENS = _gauge("job_tokens_per_second", "Tokens of all workers in a second.", *JOB)
JOB_STEP_TIME = _gauge("job_step_seconds", "Time of a step, as its reports come in.", *JOB)
JOB_MEMORY = _gauge(
    "job_gpu_memory_bytes", "Most GPU memory that the job's first worker held lately; not where it runs on CPUs.", *JOB
)
