"""What the dispatcher measures of the queue, and a job's actor of its run, as they go along anyway."""

from __future__ import annotations

import datetime as dt
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from serve_app import metrics
from serve_app.lifecycle import FINAL, Status
from serve_app.store import outside
from serve_app.store.jobs import Job, JobStore
from serve_app.store.tally import NewEvents, count_jobs, oldest_queued
from train_loop.errors import Cause
from train_loop.storage import AWAY, BACK

LOOK_S = 5.0  # Ray's agent hears of a gauge every 10 s, and forgets one that isn't set for 20 s
COUNT_S = 30.0  # between two counts of the jobs that have ended, which may be many
NAMED_ORGS = 20
OTHER_ORGS = "other"
STATES = ("queued", "running", "retrying", *sorted(status.lower() for status in FINAL))


class QueueMeter:
    """The dispatcher's: its passes as they end, and every LOOK_S what is in the store."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self.forget()
        for outcome in ("done", "store_away", "failed"):
            metrics.PASSES.record(0, outcome=outcome)
        for cause in Cause:
            metrics.FAULTS.record(0, cause=str(cause))
        metrics.STORE_ERRORS.record(0, process="dispatcher")
        metrics.STORAGE_OUTAGES.record(0, process="run")

    def forget(self) -> None:
        """Another dispatcher acts: what happens meanwhile is its to count."""
        self._faults = NewEvents([str(cause) for cause in Cause])
        self._ended: Mapping[tuple[Status, str], int] = {}
        self._looked_at = self._counted_at = -math.inf

    def passed(self, seconds: float) -> None:
        """A pass is done, by the dispatcher that holds the lease. Raises what the store raises when it is away."""
        metrics.PASSES.record(1, outcome="done")
        metrics.PASS_TIME.record(seconds)
        metrics.LAST_PASS.record(time.time())
        if time.monotonic() - self._looked_at > LOOK_S:
            self._look()
            self._looked_at = time.monotonic()

    def store_away(self) -> None:
        """A pass ended for want of the store."""
        metrics.PASSES.record(1, outcome="store_away")
        metrics.STORE_ERRORS.record(1, process="dispatcher")

    def failed(self) -> None:
        """A pass ended by an error that nobody foresaw."""
        metrics.PASSES.record(1, outcome="failed")

    def _look(self) -> None:
        running, now = self._store.running(), dt.datetime.now(dt.UTC)
        with self._store.read() as tx:
            jobs = Counter(("running", job.org_id) for job in outside.running(tx))
            queued, oldest, faults = count_jobs(tx, [Status.QUEUED]), oldest_queued(tx), self._faults.take(tx)
            if time.monotonic() - self._counted_at > COUNT_S:
                self._ended, self._counted_at = count_jobs(tx, FINAL), time.monotonic()
        workers = Counter[tuple[str, str]]()
        for counted in (queued, self._ended):
            jobs.update({(status.lower(), org): count for (status, org), count in counted.items()})
        for job in running:
            jobs["running" if job.open else "retrying", job.org_id] += 1
            workers["working", job.org_id] += job.num_workers if job.open else 0
        for (state, org), count in by_named_org(jobs, STATES).items():
            metrics.JOBS.record(count, state=state, org=org)
        for (_, org), count in by_named_org(workers, ["working"]).items():
            metrics.WORKERS.record(count, org=org)
        metrics.OLDEST_QUEUED.record((now - (oldest or now)).total_seconds())
        beats = [job.heartbeat_at for job in running if job.open and job.heartbeat_at]
        metrics.HEARTBEAT_AGE.record((now - min(beats, default=now)).total_seconds())
        for kind, message in faults:
            count_fault(kind, message)


def by_named_org(counts: Mapping[tuple[str, str], int], kinds: Sequence[str]) -> Counter[tuple[str, str]]:
    """Counts by kind and org with the NAMED_ORGS that have most in all under their names, the rest together as one that is there
    for each of `kinds`, also when it counts nothing."""
    in_all = Counter[str]()
    for (_, org), count in counts.items():
        in_all[org] += count
    names = {org for org, _ in sorted(in_all.items(), key=lambda entry: (-entry[1], entry[0]))[:NAMED_ORGS]}
    told = Counter({(kind, OTHER_ORGS): 0 for kind in kinds})
    for (kind, org), count in counts.items():
        told[kind, org if org in names else OTHER_ORGS] += count
    return told


def count_fault(kind: str, message: str) -> None:
    """Count an event: an attempt's end by this cause, or a run that noticed that a storage was away, which has the same kind."""
    if message.startswith(AWAY):
        metrics.STORAGE_OUTAGES.record(1, process="run")
    elif not message.startswith(BACK):
        metrics.FAULTS.record(1, cause=kind)


class RunMeter:
    """A job actor's."""

    def __init__(self, job: Job, attempt: int) -> None:
        self._of_job = {"request_id": job.request_id, "org": job.org_id, "experiment": job.experiment_name}
        self._attempt = attempt

    def show(self, live: Mapping[str, Any], step_s: float | None, progress_at: float) -> None:
        """Set the gauges: from the fields of a status query, what a step takes, and the Unix time of the last step or phase."""
        last = (live.get("metrics") or {}).get("last") or {}
        values = {
            metrics.JOB_ATTEMPT: self._attempt,
            metrics.JOB_STEP: live.get("step", 0),
            metrics.JOB_TOTAL_STEPS: live.get("total_steps"),
            metrics.JOB_LOSS: last.get("loss"),
            metrics.JOB_EVAL_LOSS: (live.get("metrics") or {}).get("eval_loss_after"),
            metrics.JOB_TOKENS: last.get("tokens_per_second"),
            metrics.JOB_STEP_TIME: step_s,
            metrics.JOB_MEMORY: last.get("memory_bytes"),
        }
        for metric, value in values.items():
            if value is not None:
                metric.record(value, **self._of_job)
        metrics.JOB_PROGRESS.record(progress_at, **self._of_job, phase=live["phase"])
