"""The live half of a job: one detached actor for each attempt, from launch to the attempt's end.

It answers status queries, passes on the wish to stop, hands out credentials to the run's workers (and to nobody else:
they appear in no config, environment or plan), and writes progress through to the store. When the attempt has ended and that is
written down, it ends itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import ray
import structlog

from serve_app import logs
from serve_app.cluster import actor_name, poke_dispatcher
from serve_app.lifecycle import NOTHING_TO_SAVE, Phase, Status
from serve_app.meter import RunMeter
from serve_app.run_keys import keys_of
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.storage import run_uri
from serve_app.store.jobs import STORE_AWAY, Job, JobStore, StaleAttempt
from serve_app.store.journal import Notes
from serve_app.stored_spec import read_spec
from serve_app.traces import AttemptTrace
from train_loop.errors import Cause, RunFault, Stopped, UserError, first_line
from train_loop.hang import StepClock
from train_loop.launch import ActorMonitor, Placement, launch
from train_loop.memory_kills import Place
from train_loop.record import LIVE, completed
from train_loop.redact import Redactor
from train_loop.run_files import Keys, RunFiles
from train_loop.trackers.tracker import TrackerKeys

log = structlog.get_logger()
FLUSH_S = 1.0
BEAT_S = 5.0
ROOM_WAITS = 1  # there was room when the dispatcher started the attempt: where Ray has none, it decides again
FROZEN = 2.0  # times the silence after which a worker ends itself
MAX_KEPT_LINES = 20_000  # while the store is away

Ending = Callable[[], Job]  # writes how the attempt ended
Answer = TypeVar("Answer")


class JobActor:
    """One attempt at one job, started by its own constructor.

    Its methods are async: status never waits for training, which runs in a thread; another one writes to the store.
    """

    def __init__(self, request_id: str, attempt: int) -> None:
        logs.configure(request_id=request_id, attempt=attempt)
        settings = Settings.load()
        self.open(settings, JobStore.open(settings.database_url), request_id, attempt, ray.get_runtime_context().get_node_id())
        self.flusher = threading.Thread(target=self._flush_until_ended, name="flush", daemon=True)
        self.flusher.start()
        threading.Thread(target=self._live, name="attempt", daemon=True).start()

    def open(self, settings: Settings, store: JobStore, request_id: str, attempt: int, node_id: str) -> None:
        """Take up the attempt, on that node of Ray's. Nothing goes on by itself yet. Raises StaleAttempt."""
        self.settings, self.store, self.attempt, self.node_id = settings, store, attempt, node_id
        self.log = log.bind(request_id=request_id, attempt=attempt)
        job = self._patiently(lambda: self.store.get(request_id))
        if job is None or job.attempt != attempt or not job.open:
            raise StaleAttempt(f"attempt {attempt} of job {request_id} isn't open")
        self.job: Job = job
        self.spec, unknown = read_spec(job.spec)
        self.live: dict[str, Any] = {"phase": str(Phase.PREPARING_DATA)}
        self.outbox = _Outbox()
        if unknown:
            said = f"this version of the service doesn't know {', '.join(unknown)}: the job runs without"
            self.outbox.event("unknown_fields", said)
        self.redactor = Redactor()
        self.stop = self.canceled = job.cancel_requested
        self.overtime_at: float | None = None
        self.started = time.monotonic()
        self.why: UserError | RunFault | None = None  # told by a worker that ends itself
        self.workers_at = dict[int, Place]()
        self.placement = self._placement()
        self.clock = StepClock(self.placement.hang_floor_s, self.placement.hang_factor)
        self.step_at = self.started
        self.step_s: float | None = None
        self.meter, self.trace = RunMeter(job, attempt), AttemptTrace(job)
        self.ended = threading.Event()

    # --- asked by the ingress and the dispatcher ---

    async def status(self) -> dict[str, Any]:
        """The fields that change while a job runs."""
        return dict(self.live)

    async def cancel(self) -> None:
        """Ask the run to stop at its next step boundary."""
        self.stop = True

    # --- asked and told by the run (train_loop.context.Monitor) ---

    async def keys(self) -> Keys:
        """The run's credentials, opened afresh from the vault each time."""
        return await asyncio.to_thread(self._patiently, self._keys)

    async def tracker(self, secret: str) -> TrackerKeys:
        """The keys of one of the job's trackers."""
        return await asyncio.to_thread(self._patiently, lambda: self._tracker(secret))

    async def on_phase(self, name: str) -> None:
        self.live["phase"], self.step_at = name, time.monotonic()
        self.log.info("phase", phase=name)
        self.trace.phase(name)
        self.outbox.wake()

    async def on_event(self, kind: str, message: str) -> None:
        told = self.redactor(message)
        self.outbox.event(kind, told)
        self.log.info("told by the run", kind=kind, message=told)

    async def on_progress(self, progress: dict[str, Any]) -> None:
        self.outbox.points(progress.pop("points", []))
        now, before = time.monotonic(), self.live.get("step", 0)
        if progress["step"] > before:
            self.step_s = (now - self.step_at) / (progress["step"] - before)
            self.clock.took(self.step_s)
        self.step_at = now
        self.live.update(progress)

    async def on_log(self, rank: int, lines: list[tuple[float, str]]) -> None:
        """Keep a worker's log lines, without any secret of the run."""
        self.outbox.lines([(rank, time_, self.redactor(line)) for time_, line in lines])

    async def stop_requested(self) -> bool:
        return self.stop

    async def is_current(self) -> bool:
        """Whether this attempt is still the job's own, by the store: a cut-off machine's workers must not write any more."""
        job = await asyncio.to_thread(self._patiently, lambda: self.store.get(self.job.request_id))
        return job is not None and job.open and job.attempt == self.attempt

    async def on_place(self, rank: int, place: Place) -> None:
        """A worker runs there."""
        self.workers_at[rank] = place

    async def places(self) -> list[Place]:
        return list(self.workers_at.values())

    async def on_failure(self, why: UserError | RunFault) -> None:
        self.why = self.why or why

    async def failure(self) -> UserError | RunFault | None:
        return self.why

    # --- the attempt ---

    def _live(self) -> None:
        """From launch to the end of this process."""
        ending = self.run()
        self.ended.set()
        self.flusher.join()
        self.write(ending)
        poke_dispatcher(self.settings.ray_namespace)
        self._exit()

    def write(self, ending: Ending) -> None:
        """Write down what is left to tell, and how the attempt ended."""
        try:
            self._patiently(self.report)
            job = self._patiently(ending)
            self.log.info("the attempt has ended", status=job.status, message=job.message)
            self.trace.end(job)
        except StaleAttempt:
            self.log.info("the attempt was closed from outside")

    def run(self) -> Ending:
        """Run to the end, whatever it is; how to write it down."""
        request_id, attempt = self.job.request_id, self.attempt
        me = ActorMonitor(actor_name(request_id, attempt), self.settings.ray_namespace)
        try:
            manifest = launch(self.spec, request_id, self._files(me), self.placement, me)
        except Stopped:
            return self._stopped
        except UserError as error:
            message = self.redactor(error.message)
            failed = {"message": message, "error_code": error.code, "error_message": message}
            return lambda: self.store.finish(request_id, attempt, Status.FAILED, **failed)
        except RunFault as fault:
            cause, text = fault.cause, self.redactor(fault.message)
            return lambda: self.store.record_fault(request_id, attempt, cause, text)
        except Exception as error:
            self.log.exception("the run failed")
            text = self.redactor(f"an unexpected error ({type(error).__name__}): {first_line(error)}")
            return lambda: self.store.record_fault(request_id, attempt, Cause.INTERNAL, text)
        done, last = completed(manifest)
        self.live |= last
        return lambda: self.store.finish(request_id, attempt, Status.COMPLETED, **done)

    def _stopped(self) -> Job:
        """Out of time is FAILED; CANCELED is the dispatcher's to write, once nothing of this attempt is left."""
        if self.overtime_at is not None and not self.canceled:
            limit = self.spec.infra_config.max_runtime_s
            text = (
                f"Stopped after infra_config.max_runtime_s = {limit} seconds; what was trained so far is kept as a checkpoint: "
                "resume to go on for as long again."
            )
            return self.store.finish(
                self.job.request_id,
                self.attempt,
                Status.FAILED,
                message=text,
                error_code="max_runtime_exceeded",
                error_message=text,
            )
        return self.job

    def _tracker(self, secret: str) -> TrackerKeys:
        keys = self._vault.tracker(self.job.org_id, secret)
        self.redactor.hide(*keys.values())
        return keys

    def _keys(self) -> Keys:
        keys = keys_of(self.spec, self._vault, self.settings)
        self.redactor.hide(*keys.values())
        return keys

    @cached_property
    def _vault(self) -> SecretVault:
        # Made once: it keeps a role's temporary keys until shortly before they expire.
        return SecretVault.from_settings(self.store, self.settings)

    def _files(self, me: ActorMonitor) -> RunFiles:
        uri = run_uri(self.settings, self.job.org_id, self.job.request_id)
        return RunFiles(
            storage_uri=uri,
            model_mirror=str(self.settings.model_mirror),
            keys=me.keys,
            tracker=me.tracker,
            model_cache_bytes=self.settings.model_cache_bytes,
        )

    def _placement(self) -> Placement:
        infra, profile = self.spec.infra_config, self.settings.profiles[self.spec.infra_config.gpu_type]
        if self.settings.embedded:
            self.outbox.event(
                "placement",
                f"embedded mode: {infra.gpu_type} x {infra.gpu_count} x {infra.node_count} runs as "
                f"{self.job.num_workers} CPU worker{'s' if self.job.num_workers > 1 else ''} on this machine",
            )
        return Placement(
            resources=profile.resources,
            use_gpu=profile.use_gpu,
            accelerator_type=profile.accelerator_type,
            data_cpus=self.settings.data_cpus,
            num_workers=self.job.num_workers,
            room_waits=ROOM_WAITS,
        )

    # --- the store ---

    def report(self) -> Job:
        """Write progress and heartbeat through to the store; the job there. Raises StaleAttempt."""
        notes = self.outbox.take()
        fields = {k: v for k, v in self.live.items() if k in LIVE}
        fields["ran_s"] = self.job.ran_s + time.monotonic() - self.started
        fields["actor_node"] = self.node_id
        try:
            job = self.store.report(self.job.request_id, self.attempt, notes, **fields)
        except STORE_AWAY:
            self.outbox.put_back(notes)
            raise
        limit = self.spec.infra_config.max_runtime_s
        if self.overtime_at is None and limit is not None and fields["ran_s"] > limit:
            self.overtime_at = time.monotonic()
        self.canceled = job.cancel_requested
        self.stop = self.stop or self.canceled or self.overtime_at is not None
        return job

    def _flush_until_ended(self) -> None:
        """Write progress and heartbeat through to the store, about once a second, and at every change of phase."""
        written, beat_at = None, float("-inf")
        while not self.ended.is_set():
            now = time.monotonic()
            if self.outbox or self.live != written or now - beat_at > BEAT_S:
                seen = dict(self.live)
                self.meter.show(seen, self.step_s, time.time() - (now - self.step_at))
                try:
                    self.report()
                    written, beat_at = seen, now
                except STORE_AWAY as error:
                    # Training goes on; what there is to tell waits.
                    self.log.warning("the job store is away", error=type(error).__name__)
                except StaleAttempt:
                    self.log.info("a newer attempt has taken over")
                    self._exit()
                    return
                except Exception:  # what was to be told is lost; the heartbeat isn't
                    self.log.exception("progress can't be written")
            if self._hangs() or self._is_over():
                return
            self.outbox.wait(FLUSH_S)

    def _hangs(self) -> bool:
        """Close the attempt and end this process when training is silent longer than workers allow themselves."""
        silent_s, limit_s = time.monotonic() - self.step_at, FROZEN * self.clock.limit_s
        if self.live["phase"] != Phase.TRAINING or silent_s < limit_s:
            return False
        text = f"no step for {silent_s:.0f} s, and the workers don't see to it themselves."
        self._close(lambda: self.store.record_fault(self.job.request_id, self.attempt, Cause.HANG, text))
        return True

    def _is_over(self) -> bool:
        """Close the attempt and end this process when the run is out of time and doesn't stop by itself, as cancel does."""
        if self.overtime_at is None or self.canceled:
            return False
        waits_s = 0.0 if self.live["phase"] in NOTHING_TO_SAVE else self.settings.cancel_grace_s
        if time.monotonic() - self.overtime_at < waits_s:
            return False
        self._close(self._stopped)
        return True

    def _close(self, ending: Ending) -> None:
        """Write down how the attempt ended, and end this process with all that it has started."""
        with contextlib.suppress(StaleAttempt):
            self.trace.end(self._patiently(ending))
        self._exit()

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        """Ask the store, for as long as it takes it to come back."""
        while True:
            try:
                return ask()
            except STORE_AWAY as error:
                self.log.warning("the job store is away; waiting for it", error=type(error).__name__)
                time.sleep(FLUSH_S)

    def _exit(self) -> None:
        ray.kill(ray.get_runtime_context().current_actor)


class _Outbox:
    """What is to be written next, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._events: list[tuple[str, str]] = []
        self._points: list[dict[str, Any]] = []
        self._lines: list[tuple[int, float, str]] = []

    def __bool__(self) -> bool:
        return bool(self._events or self._points or self._lines)

    def event(self, kind: str, message: str) -> None:
        with self._lock:
            self._events.append((kind, message))

    def points(self, points: list[dict[str, Any]]) -> None:
        with self._lock:
            self._points += points

    def lines(self, lines: list[tuple[int, float, str]]) -> None:
        with self._lock:
            self._lines = (self._lines + lines)[-MAX_KEPT_LINES:]

    def take(self) -> Notes:
        with self._lock:
            notes = Notes(self._events, self._points, self._lines)
            self._events, self._points, self._lines = [], [], []
            return notes

    def put_back(self, notes: Notes) -> None:
        with self._lock:
            self._events = [*notes.events, *self._events]
            self._points = [*notes.points, *self._points]
            self._lines = [*notes.lines, *self._lines][-MAX_KEPT_LINES:]

    def wake(self) -> None:
        self._wake.set()

    def wait(self, seconds: float) -> None:
        self._wake.wait(seconds)
        self._wake.clear()
