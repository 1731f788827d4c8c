"""Runs that `ray job submit` started on the service's cluster, outside its queue: found, listened to, stopped on request.

Each tells its monitor, an actor of its own, how it goes, and the dispatcher asks there (train_loop.record). One whose monitor is
gone without a last word has ended as Ray says of its job. Whoever may submit to Ray is trusted with all of the cluster anyway, so
nothing here fences; but whatever such an actor says or does, the others' turn comes.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, Protocol

import ray
import structlog
from pydantic import BaseModel, Field
from ray.exceptions import RayError

from serve_app.lifecycle import Status
from serve_app.store import outside
from serve_app.store.jobs import STORE_AWAY, Job, JobStore, utc_now
from serve_app.store.journal import Notes
from serve_app.store.outside import Ending, Heard
from serve_app.stored_spec import read_spec
from train_loop.record import MONITOR
from train_loop.redact import Redactor

log = structlog.get_logger()
ASK_S = 5.0
MAX_SAID_CHARS = 300
ENDINGS = {"SUCCEEDED": Status.COMPLETED, "FAILED": Status.FAILED, "STOPPED": Status.CANCELED}  # of Ray's, those that are final


class RayJob(NamedTuple):
    """What Ray says of a job: its own word for the state, and a message that may have the end of its log."""

    status: str
    message: str


class Runs(Protocol):
    """The runs outside, as far as this goes."""

    def alive(self) -> set[str]:
        """The request_ids of those whose monitor is there."""
        ...

    def told(self, cursors: Mapping[str, str]) -> dict[str, bytes]:
        """What these have told since their cursors, as train_loop.record has it; without those that don't answer."""
        ...

    def ray_job(self, submission_id: str) -> RayJob | None:
        """What Ray says of that job; None where it knows none."""
        ...

    def stop(self, submission_id: str) -> None:
        """Do as `ray job stop` does; again is harmless."""
        ...


class RayRuns:
    """Through the Ray that this process is connected to."""

    def __init__(self) -> None:
        self._namespaces: dict[str, str] = {}  # by request_id

    def alive(self) -> set[str]:
        named = ray.util.list_named_actors(all_namespaces=True)
        monitors = (entry for entry in named if entry["name"].startswith(MONITOR))
        self._namespaces = {entry["name"].removeprefix(MONITOR): entry["namespace"] for entry in monitors}
        return {name for name in self._namespaces if _is_id(name)}

    def told(self, cursors: Mapping[str, str]) -> dict[str, bytes]:
        asked = {}
        for request_id, cursor in cursors.items():
            try:
                monitor = ray.get_actor(f"{MONITOR}{request_id}", namespace=self._namespaces[request_id])
                asked[monitor.since.remote(cursor)] = request_id
            except (ValueError, AttributeError, RayError):
                continue  # gone, or something else that has such a name
            except Exception:  # Ray loads the actor's class, which goes at about the same time as the actor
                log.info("a run outside the service can't be asked", request_id=request_id, exc_info=True)
        answers: dict[str, bytes] = {}
        if asked:
            done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ASK_S)
            for answer in done:
                with contextlib.suppress(RayError):
                    answers[asked[answer]] = ray.get(answer)
        return answers

    def ray_job(self, submission_id: str) -> RayJob | None:
        # Where the job API keeps it. The API itself goes through the dashboard, which may be away or slow.
        from ray._private.ray_constants import KV_NAMESPACE_JOB
        from ray.dashboard.modules.job.common import JobInfoStorageClient
        from ray.experimental.internal_kv import _internal_kv_get

        kept = _internal_kv_get(JobInfoStorageClient.JOB_DATA_KEY.format(job_id=submission_id), namespace=KV_NAMESPACE_JOB)
        if kept is None:
            return None
        info = json.loads(kept)
        return RayJob(info["status"], info.get("message") or "")

    def stop(self, submission_id: str) -> None:
        from ray.dashboard.modules.job.common import JOB_ACTOR_NAME_TEMPLATE, SUPERVISOR_ACTOR_RAY_NAMESPACE

        with contextlib.suppress(ValueError, RayError):
            name = JOB_ACTOR_NAME_TEMPLATE.format(job_id=submission_id)
            ray.get_actor(name, namespace=SUPERVISOR_ACTOR_RAY_NAMESPACE).stop.remote()


class Listener:
    """What a dispatcher does about them again and again. It keeps nothing between two turns."""

    def __init__(self, store: JobStore, runs: Runs, now: Callable[[], dt.datetime] = utc_now) -> None:
        self._store, self._runs, self._now = store, runs, now

    def run(self) -> None:
        """One turn: what is new is written down, what is to stop is stopped, what is gone has ended."""
        alive = self._runs.alive()
        with self._store.read() as tx:
            cursors, running = outside.cursors(tx, alive), outside.running(tx)
        ended = {}
        for request_id, answer in self._runs.told(cursors).items():
            with self._seen_to(request_id):
                job = self._hear(answer, cursors[request_id])
                if job is not None and job.status is not Status.RUNNING:
                    ended[request_id] = job.ray_cursor or ""
        if ended:
            self._runs.told(ended)  # they wait for it to be known that they were heard to the end
        for job in running:
            with self._seen_to(job.request_id):
                if job.cancel_requested:
                    self._runs.stop(_ray_job(job))
                if job.request_id not in alive:
                    self._gone(job)

    @contextlib.contextmanager
    def _seen_to(self, request_id: str) -> Iterator[None]:
        """Have what goes wrong with one run stay with that one."""
        try:
            yield
        except STORE_AWAY:
            raise
        except Exception:
            log.exception("a run outside the service can't be seen to", request_id=request_id)

    def _hear(self, answer: bytes, asked: str) -> Job | None:
        told = Told.model_validate_json(answer)
        if told.ray_job is None:  # started by hand, and not by Ray's job API: nobody would say how it has ended
            return None
        spec, _ = read_spec(told.spec)
        heard = Heard(
            request_id=str(told.request_id),
            ray_job=told.ray_job,
            spec=spec,
            asked=asked,
            cursor=told.cursor,
            live=told.live.model_dump(exclude_unset=True),
            notes=Notes(
                [note.event for note in told.notes if note.event is not None],
                [note.point for note in told.notes if note.point is not None],
                [note.line for note in told.notes if note.line is not None],
            ),
            ending=next((note.ending for note in told.notes if note.ending is not None), None),
        )
        with self._store.write() as tx:
            return outside.hear(tx, heard, self._now())

    def _gone(self, job: Job) -> None:
        """It has told of no end, and will tell nothing more."""
        found = self._runs.ray_job(_ray_job(job))
        if found is not None and found.status not in ENDINGS:
            return  # on its way to one
        with self._store.write() as tx:
            ended = outside.end(tx, job.request_id, _by_ray(job, found), self._now())
        log.info("a run outside the service has ended without a word", request_id=job.request_id, status=ended.status)


def _ray_job(job: Job) -> str:
    return str(job.ray_job)


def _by_ray(job: Job, found: RayJob | None) -> Ending:
    """How a run has ended of which only Ray says so."""
    if found is None:
        text = f"Ray knows no job {job.ray_job} any more: the cluster was restarted while it ran."
        return Ending(Status.FAILED, text, error_code="cluster_away", error_message=text)
    status = ENDINGS[found.status]
    if status is Status.COMPLETED:
        return Ending(status, f"Ray says that it succeeded; where its adapter is stands in its log: ray job logs {job.ray_job}")
    if status is Status.CANCELED:
        return Ending(status, "Stopped: Ray's job was stopped.")
    said = Redactor()(found.message).split(", last available logs", 1)[0].strip()[:MAX_SAID_CHARS] or "it gives no reason"
    text = f"Ray says: {said}. Its log says more: ray job logs {job.ray_job}"
    return Ending(status, text, error_code="worker_died", error_message=text)


class Live(BaseModel):
    """The fields that change while a run goes on, those of them that it has said something of."""

    phase: str = Field("", max_length=32)
    step: int = 0
    total_steps: int | None = None
    epoch: float = 0.0
    eta_s: float | None = None
    progress: float = 0.0
    metrics: dict[str, Any] = {}


class Note(BaseModel):
    """One of these."""

    event: tuple[Annotated[str, Field(max_length=64)], str] | None = None
    point: dict[str, Any] | None = None
    line: tuple[int, float, str] | None = None
    ending: Ending | None = None


class Told(BaseModel):
    """A record's answer (train_loop.record), of whatever version."""

    request_id: uuid.UUID
    ray_job: str | None = Field(None, max_length=255)
    spec: dict[str, Any]
    cursor: str = Field(max_length=64)
    live: Live
    notes: list[Note]


def _is_id(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return str(uuid.UUID(name)) == name
    return False
