"""Admission, launch, reconciliation: one detached actor, and a lease in the store so that two never act.

The loop is a plain comparison of the store with the cluster, so a restart of anything (this actor, a job actor, the whole
head node) is only one more pass.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
import uuid
from collections import Counter

import ray
import structlog
from sqlalchemy.exc import OperationalError

from serve_app import logs
from serve_app.job_actor import JobActor, actor_name
from serve_app.lifecycle import Status
from serve_app.settings import Settings
from serve_app.store.jobs import Job, JobStore, StaleAttempt

log = structlog.get_logger()
POLL_S = 2.0
LEASE_S = 15.0
NAME_FREE_S = 10.0
LOOK_AHEAD = 1000  # queued jobs looked at in a pass
NAME = "dispatcher"


class Dispatcher:
    """Starts its loop by itself, so that a restarted actor goes on without being called."""

    def __init__(self) -> None:
        logs.configure()
        self.settings = Settings.load()
        self.store = JobStore.open(self.settings.database_url)
        self.owner = uuid.uuid4().hex
        self.wake = threading.Event()
        threading.Thread(target=self._loop, name="dispatch", daemon=True).start()

    def poke(self) -> None:
        """Look now instead of at the next poll."""
        self.wake.set()

    def ping(self) -> bool:
        """Whether the actor is alive."""
        return True

    def _loop(self) -> None:
        while True:
            try:
                if self.store.acquire_lease(NAME, self.owner, LEASE_S) is not None:
                    self._reconcile()
                    self._admit()
            except OperationalError:
                log.warning("the job store is away; trying again", exc_info=True)
            except Exception:
                log.exception("a dispatch pass failed; trying again")
            self.wake.wait(POLL_S)
            self.wake.clear()

    def _admit(self) -> None:
        running = self.store.running()
        limits = self.settings
        jobs_of, gpus_of = Counter(job.org_id for job in running), Counter[str]()
        for job in running:
            gpus_of[job.org_id] += _num_workers(job)
        for job in self.store.queued(limit=LOOK_AHEAD):
            if jobs_of.total() >= limits.max_running_jobs:
                return
            org, workers = job.org_id, _num_workers(job)
            if _over(jobs_of[org] + 1, limits.max_running_jobs_per_org) or _over(gpus_of[org] + workers, limits.max_gpus_per_org):
                continue  # its turn comes when another of its org's jobs ends; other orgs needn't wait for that
            if gpus_of.total() and _over(gpus_of.total() + workers, limits.max_workers):
                return
            jobs_of[org] += 1
            gpus_of[org] += workers
            self._start(job)

    def _start(self, job: Job) -> None:
        started = self.store.start_attempt(job.request_id, job.attempt)
        if started is not None:
            log.info("starting", request_id=job.request_id, attempt=started.attempt)
            self._end_actor(job.request_id)  # of an earlier attempt, which a resumed job may still have
            actor = (
                ray.remote(num_cpus=0, max_concurrency=1000)(JobActor)
                .options(name=actor_name(job.request_id), namespace=self.settings.ray_namespace, lifetime="detached")
                .remote(job.request_id, started.attempt)
            )
            actor.run.remote()

    def _end_actor(self, request_id: str) -> None:
        deadline = time.monotonic() + NAME_FREE_S
        while (actor := _find(request_id, self.settings.ray_namespace)) is not None and time.monotonic() < deadline:
            ray.kill(actor)
            time.sleep(0.05)  # its name is free a moment later

    def _reconcile(self) -> None:
        now = dt.datetime.now(dt.UTC)
        for job in self.store.running():
            actor = _find(job.request_id, self.settings.ray_namespace)
            if job.cancel_requested and actor is not None:
                actor.cancel.remote()
                asked = job.cancel_requested_at or now
                if (now - asked).total_seconds() > self.settings.cancel_grace_s:
                    # Everything the run owns (controller, workers, placement group) dies with its actor.
                    ray.kill(actor)
                    self._finish(job, Status.CANCELED, "Canceled; the workers didn't stop in time and were ended.")
            elif job.cancel_requested:
                self._finish(job, Status.CANCELED, "Canceled on request.")
            elif actor is None and _silent_s(job, now) > POLL_S:
                self._retry(job)
            elif actor is not None and _silent_s(job, now) > self.settings.heartbeat_timeout_s:
                ray.kill(actor)
        self._sweep()

    def _retry(self, job: Job) -> None:
        retries = job.spec["infra_config"]["max_retries"]
        if job.attempt - job.resumed_at_attempt > retries:
            text = f"The job's process died {job.attempt} times; giving up (infra_config.max_retries = {retries})."
            self._finish(job, Status.FAILED, text, error_code="job_actor_died", error_message=text)
        else:
            self.store.journal.add_event(job.request_id, "restarted", f"attempt {job.attempt} died; starting another")
            self._start(job)

    def _finish(self, job: Job, status: Status, message: str, **fields: str) -> None:
        try:
            self.store.finish(job.request_id, job.attempt, status, message=message, **fields)
        except StaleAttempt:
            log.info("already finished by its own actor", request_id=job.request_id)

    def _sweep(self) -> None:
        """End job actors whose job is in a final state, or unknown, once their answers aren't needed any more."""
        prefix = actor_name("")
        for entry in ray.util.list_named_actors(all_namespaces=True):
            name = entry["name"]
            if entry["namespace"] == self.settings.ray_namespace and name.startswith(prefix):
                job = self.store.get(name.removeprefix(prefix))
                if job is None or job.status not in (Status.QUEUED, Status.RUNNING):
                    actor = _find(name.removeprefix(prefix), self.settings.ray_namespace)
                    if actor is not None:
                        ray.kill(actor)


def _find(request_id: str, namespace: str) -> ray.actor.ActorHandle | None:
    try:
        return ray.get_actor(actor_name(request_id), namespace=namespace)
    except ValueError:
        return None


def _num_workers(job: Job) -> int:
    infra = job.spec["infra_config"]
    return int(infra["gpu_count"] * infra["node_count"])


def _over(asked: int, limit: int | None) -> bool:
    return limit is not None and asked > limit


def _silent_s(job: Job, now: dt.datetime) -> float:
    last = job.heartbeat_at or job.started_at or job.created_at
    return (now - last).total_seconds()
