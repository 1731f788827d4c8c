"""Kill any process of a running service, in any phase of a job, and see what becomes of the job."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import sqlalchemy as sa

from benchmarks.api import hold_dispatcher
from serve_app.client import FINAL
from serve_app.store.jobs import STORE_AWAY, JobStore
from serve_app.store.tables import jobs, leases
from tests.conftest import ORG, rows
from tests.running import DATASETS, FINISH_S, Running, members

PHASES = (
    "queued",
    "preparing_data",
    "waiting_for_resources",
    "loading_model",
    "training",
    "evaluating",
    "saving",
    "exporting",
)
SAVE_STEPS = 4
# By then the second checkpoint is under way, which waits for the first one: whoever is killed later has one to go on from.
SAVED_STEP = 2 * SAVE_STEPS + 1
IN_TRAINING = PHASES[PHASES.index("training") :]
PASS_S = 3.0  # of the dispatcher, on a busy machine
LOOK_S = 0.01  # between two looks at a job's phase: some phases of a tiny job last tens of milliseconds
S3_AWAY_S, S3_SLOW_S = 25, 16  # the latter with its restart
STOPPED_S, GOES_S = 2.0, 0.3
HP = "train_config.hyperparameters"


# --- the service under fire ---


class Service(Running):
    """A service with data in its S3, and jobs short enough to be killed often yet with every phase in them."""

    def start(self) -> None:
        super().start()
        self.prepare_looking()

    @contextlib.contextmanager
    def up_with_data(self) -> Iterator[Self]:
        """From start to down, with the dataset in its S3."""
        self.start()
        try:
            self.upload()
            yield self
        finally:
            self.down()

    def down(self) -> None:
        super().down()
        self.store.engine.dispose()

    def prepare_looking(self) -> None:
        """A connection for quick looks at whether it is ready, which don't wait or try again."""
        self._looking = httpx.Client(
            base_url=self.up["url"], headers={"Authorization": f"Bearer {self.token}"}, timeout=2, trust_env=False
        )

    def upload(self) -> None:
        """The dataset, once in the life of the home."""
        self.s3().create_bucket(Bucket=DATASETS)
        self.put_rows()

    def put_rows(self) -> None:
        """The rows as a new object, so that the next job prepares them instead of taking over what another one has."""
        self.s3().put_object(Bucket=DATASETS, Key="rows.jsonl", Body="\n".join(json.dumps(r) for r in rows(240)).encode())

    @cached_property
    def store(self) -> JobStore:
        """The job store, as the service's own processes open it."""
        return JobStore.open(self.env.get("TUNEYARD_DATABASE_URL") or f"sqlite:///{self.home}/tuneyard.db")

    def submit(self, name: str, changes: dict[str, Any] | None = None) -> str:
        """Queue a job on two workers that checkpoints often; its request_id."""
        base = {
            "infra_config.gpu_count": 2,
            "infra_config.max_retries": 50,
            "dataset_config.split.ratios": [0.8, 0.2],
            f"{HP}.max_steps": 36,
            f"{HP}.save_steps": SAVE_STEPS,
            f"{HP}.eval_steps": 6,
            f"{HP}.learning_rate": 0.01,
        }
        job = self.job(name, base | (changes or {}))
        request_id: str = self.client.submit(job)["request_id"]
        return request_id

    def look(self, request_id: str) -> dict[str, Any] | None:
        """The job as the store has it, or None while the store is away.

        Its actor writes each change of phase there at once. A request would cost proxy, ingress and actor as much as the job
        itself takes, a hundred times a second, and finds nobody while they are killed.
        """
        try:
            job = self.store.get(request_id)
        except STORE_AWAY:
            return None
        return None if job is None else vars(job)

    def until(self, request_id: str, holds: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The job as soon as `holds`; looks without pause."""
        job: dict[str, Any] = {}
        deadline = time.monotonic() + FINISH_S
        while time.monotonic() < deadline:
            job = self.look(request_id) or job
            if job and holds(job):
                return job
            if job and job["status"] in FINAL:
                raise AssertionError(f"job {request_id} ended before {what}: {self.describe(request_id, job)}")
            time.sleep(LOOK_S)
        raise AssertionError(f"job {request_id} hangs before {what}: {self.describe(request_id, job)}")

    def finished(self, request_id: str) -> dict[str, Any]:
        """The job in its final state, which must be COMPLETED."""
        job = self.wait(request_id)
        assert job["status"] == "COMPLETED", self.describe(request_id, job)
        return job

    def result(self, job: dict[str, Any]) -> Result:
        """What a COMPLETED job made."""
        files = {f["name"]: f["sha256"] for f in self.client.artifacts(job["request_id"], ORG)["files"]}
        points = self.client.metrics(job["request_id"], ORG)["points"]
        losses = {p["step"]: p["loss"] for p in points if p.get("loss") is not None}
        return Result(losses, files["adapter/adapter_model.safetensors"])

    def run_files(self, request_id: str) -> set[str]:
        """The names in the run's folder."""
        prefix = f"runs/{ORG}/{request_id}/"
        pages = self.s3().get_paginator("list_objects_v2").paginate(Bucket="tuneyard", Prefix=prefix)
        return {entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", [])}

    def has_begun(self, request_id: str) -> bool:
        """Whether the job's present attempt has written anything down."""
        job = self.store.get(request_id)
        return job is not None and job.heartbeat_at is not None

    def newest_checkpoint(self, request_id: str) -> int:
        """The step of the newest whole one; 0 without one."""
        return max(checkpoints(self.run_files(request_id), whole=True), default=0)

    def resumed_at(self, request_id: str) -> dict[int, int]:
        """From the checkpoint of which step each attempt went on, for those attempts that did."""
        attempt, found = 0, dict[int, int]()
        for event in self.client.events(request_id, ORG)["events"]:
            attempt += event["kind"] == "started"
            if event["kind"] == "resumed":
                found[attempt] = int(event["message"].rpartition(" ")[2])
        return found

    def retry_at_once(self, job: dict[str, Any]) -> None:
        """Spare a job between two attempts its wait, which tests/serve_app/test_retry.py tells of."""
        now = dt.datetime.now(dt.UTC)
        if job["retry_at"] is not None and job["retry_at"] > now:
            between = (jobs.c.request_id == job["request_id"]) & jobs.c.retry_at.is_not(None)
            with self.store.write() as tx:
                tx.execute(sa.update(jobs).where(between).values(retry_at=now))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No job is started meanwhile: somebody else has the dispatcher's lease."""
        hold_dispatcher(self.store)
        time.sleep(PASS_S)  # a pass that is under way still starts what it finds
        try:
            yield
        finally:
            with self.store.write() as tx:
                tx.execute(sa.update(leases).values(expires_at=dt.datetime.now(dt.UTC)))

    def ready(self) -> bool:
        """Whether /readyz says so."""
        try:
            return self._looking.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def wait_ready(self) -> None:
        """Until the whole service answers again."""
        deadline = time.monotonic() + FINISH_S
        while not self.ready():
            assert time.monotonic() < deadline, "the service doesn't come back; see " + str(self.home / "logs" / "up.log")
            time.sleep(0.2)

    # --- its processes ---

    def processes(self, named: str) -> list[psutil.Process]:
        """Those whose title, or whose program's name, begins with `named`."""
        found = []
        for process in members(self.state()["instance"]):
            title = (process.info["cmdline"] or [""])[0]
            if title.startswith(f"ray::{named}") or process.info["name"].startswith(named):
                found.append(process)
        return found

    def worker(self, rank: int) -> list[psutil.Process]:
        """The training worker of that rank, of the one job that runs on two of them.

        Ray Train says in its log which process has rank 0, early on; the other one is rank 1.
        """
        named = self.processes("RayTrainWorker")
        # Those that they forked to read rows have their name.
        workers = [p for p in named if _parent(p) not in {other.pid for other in named}]
        first = self._rank_zero() & {p.pid for p in workers}
        if len(workers) != 2 or len(first) != 1:
            return []
        return [p for p in workers if (p.pid in first) == (rank == 0)]

    def _rank_zero(self) -> set[int]:
        logs = Path(self.state()["ray_dir"], "session_latest", "logs", "train")
        entries = (json.loads(line) for path in logs.glob("*app-worker*.log") for line in path.read_text().splitlines()[:1])
        return {entry["process"] for entry in entries if "[rank=0," in entry["message"]}


def _parent(process: psutil.Process) -> int | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.ppid()
    return None


def checkpoints(names: Iterable[str], *, whole: bool) -> set[int]:
    """The steps that a run's folder has files of, or has whole checkpoints of."""
    folders = (name.removeprefix("checkpoints/step-").split("/") for name in names if name.startswith("checkpoints/step-"))
    return {int(step) for step, file in folders if file == "complete.json" or not whole}


# --- victims ---


@dataclass(frozen=True)
class Victim:
    """A process that can be killed.

    `restarts`: whether the job's attempt ends with it. `mend` comes after that: it brings back what nothing of ours would start
    again, or keeps away what would be back at once.
    """

    name: str
    find: Callable[[Service], Sequence[psutil.Process]]
    restarts: bool
    mend: Callable[[Service], None] | None = None

    def kill(self, service: Service) -> bool:
        """SIGKILL; whether there was anything to kill."""
        found = self.find(service)
        for process in found:
            process.kill()
        psutil.wait_procs(found, timeout=10)
        return bool(found)


def _titled(name: str, title: str, *, restarts: bool) -> Victim:
    return Victim(name, lambda service: service.processes(title), restarts)


INGRESS = _titled("ingress replica", "ServeReplica", restarts=False)
PROXY = _titled("Serve proxy", "ProxyActor", restarts=False)
SERVE = _titled("Serve controller", "ServeController", restarts=False)
DISPATCHER = _titled("dispatcher", "Dispatcher", restarts=False)
JOB_ACTOR = _titled("job actor", "JobActor", restarts=True)
CONTROLLER = _titled("Train controller", "TrainController", restarts=True)
DATA_TASK = _titled("Ray Data task", "MapBatches(prepare)", restarts=False)
RANK_0 = Victim("worker, rank 0", lambda service: service.worker(0), True)
RANK_1 = Victim("worker, rank 1", lambda service: service.worker(1), True)
RAYLET = _titled("raylet", "raylet", restarts=True)
GCS = _titled("GCS", "gcs_server", restarts=True)
S3 = _titled("S3", "weed", restarts=False)


def kill_s3_for(service: Service, seconds: float) -> None:
    """Keep the object storage away for so long: its supervisor starts it again each time."""
    back_at = time.monotonic() + seconds
    while time.monotonic() < back_at:
        S3.kill(service)
        time.sleep(0.1)


def slow_s3_for(service: Service, seconds: float) -> None:
    """Have the object storage stand still most of the time, as one on a disk that is much too slow for it does."""
    well_at = time.monotonic() + seconds
    while time.monotonic() < well_at:
        storage = S3.find(service)
        try:
            for process in storage:
                process.suspend()
            time.sleep(STOPPED_S)
        finally:
            for process in storage:
                process.resume()
        time.sleep(GOES_S)


S3_AWAY = Victim(f"S3 for {S3_AWAY_S} s", S3.find, False, lambda service: kill_s3_for(service, S3_AWAY_S))
S3_SLOW = Victim(
    f"S3, which then stands still {STOPPED_S:g} s of {STOPPED_S + GOES_S:g} s",
    S3.find,
    False,
    lambda service: slow_s3_for(service, S3_SLOW_S),
)


# --- what becomes of the job ---


@dataclass(frozen=True)
class Result:
    """What two runs of the same job are compared by."""

    losses: dict[int, float] = field(repr=False)  # by step
    adapter_sha256: str

    @property
    def final_loss(self) -> float:
        return self.losses[max(self.losses)]


@dataclass
class Row:
    """A line of the table."""

    victim: str
    phase: str
    outcome: str = "not reached"
    attempts: int | None = None
    seconds: float | None = None  # from the kill until the job was over
    final_loss: float | None = None
    same: bool | None = None  # every loss and every byte of the adapter as in the undisturbed run


@dataclass
class Table:
    """What all tests found, for the end of the run."""

    rows: list[Row] = field(default_factory=list)
    undisturbed: Result | None = None

    def lines(self) -> list[str]:
        """As Markdown."""
        head = "| killed | in phase | outcome | attempts | seconds until it ended | final loss | same as undisturbed |"
        made = [head, "|---|---|---|---|---|---|---|"]
        if self.undisturbed is not None:
            made.append(f"| nothing | | COMPLETED | 1 | | {self.undisturbed.final_loss:.6f} | |")
        for row in self.rows:
            loss = "" if row.final_loss is None else f"{row.final_loss:.6f}"
            same = "" if row.same is None else "yes" if row.same else "NO"
            seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
            made.append(
                f"| {row.victim} | {row.phase} | {row.outcome} | {row.attempts or ''} | {seconds} | {loss} | {same} |",
            )
        return made


@dataclass(frozen=True)
class Left:
    """What a killed attempt left behind."""

    attempt: int
    checkpoint: int  # the step of the newest whole one; 0 where the next attempt needs none


def strike(service: Service, request_id: str, phase: str, victims: Sequence[Victim]) -> Left | None:
    """Wait for the phase, kill the victims, and wait for what is restarted; what the attempt left, if it ended by that."""
    ends_the_attempt = any(victim.restarts for victim in victims)

    def there(job: dict[str, Any]) -> bool:
        late_enough = phase not in IN_TRAINING or job["step"] >= SAVED_STEP
        if job["phase"] != phase or not late_enough or not all(victim.find(service) for victim in victims):
            return False
        # Killed before its actor has said a word, an attempt is launched again, and is still the same one.
        return not ends_the_attempt or service.has_begun(request_id)

    before = service.until(request_id, there, f"phase {phase} with {', '.join(v.name for v in victims)}")
    for victim in victims:
        assert victim.kill(service), f"no {victim.name} to kill in phase {phase}"
        if victim.mend is not None:
            victim.mend(service)
    if ends_the_attempt:
        files = service.run_files(request_id)
        left = 0 if "outcome.json" in files else max(checkpoints(files, whole=True), default=0)
        assert left or phase not in IN_TRAINING or "outcome.json" in files, f"no checkpoint in phase {phase}: {sorted(files)}"

        def goes_on(job: dict[str, Any]) -> bool:
            service.retry_at_once(job)
            return job["attempt"] > before["attempt"] or (job["phase"] != phase and job["retry_at"] is None)

        service.until(request_id, goes_on, f"an attempt after the kill in {phase}")
        return Left(before["attempt"], left)
    service.wait_ready()
    return None


Strike = tuple[str, Sequence[Victim]]  # in which phase, whom


def survives(service: Service, table: Table, name: str, strikes: Sequence[Strike]) -> dict[str, Any]:
    """Run one job, strike in each of the phases, and hold its result against the undisturbed one.

    Whatever was struck after a checkpoint must go on from it, or a later one. Returns the job, which is COMPLETED.
    """
    made = [Row(" + ".join(v.name for v in victims), phase) for phase, victims in strikes]
    table.rows += made
    struck_at, left = [], list[tuple[str, Left]]()
    service.put_rows()
    queued = strikes[0][0] == "queued"
    with service.held() if queued else contextlib.nullcontext():
        request_id = service.submit(name)
        if queued:
            strike(service, request_id, *strikes[0])
            struck_at.append(time.monotonic())
    for phase, victims in strikes[queued:]:
        if (found := strike(service, request_id, phase, victims)) is not None:
            left.append((phase, found))
        struck_at.append(time.monotonic())
    job = ends_well(service, table, request_id, made, struck_at)
    resumed = service.resumed_at(request_id)
    assert all(step > 0 for step in resumed.values()), resumed
    for phase, before in left:
        first = min((attempt for attempt in resumed if attempt > before.attempt), default=None)
        if before.checkpoint and (phase != "exporting" or first):  # what is exported needs no training any more
            assert first is not None, f"after the kill in {phase} the run began anew; it had step {before.checkpoint}: {resumed}"
            assert resumed[first] >= before.checkpoint, f"the kill in {phase} lost checkpoint {before.checkpoint}: {resumed}"
    return job


def ends_well(service: Service, table: Table, request_id: str, made: Sequence[Row], struck_at: Sequence[float]) -> dict[str, Any]:
    """Wait for the job, fill in the rows of what it went through, and hold its result against the undisturbed one."""
    job = service.wait(request_id)
    ended = time.monotonic()
    result = service.result(job) if job["status"] == "COMPLETED" else None
    for row, at in zip(made, struck_at, strict=True):
        row.outcome, row.attempts, row.seconds = job["status"], job["attempt"], ended - at
        if result is not None:
            row.final_loss, row.same = result.final_loss, result == table.undisturbed
    assert job["status"] == "COMPLETED", service.describe(request_id, job)
    assert table.undisturbed is not None
    assert result is not None
    assert result.losses == table.undisturbed.losses
    assert result.adapter_sha256 == table.undisturbed.adapter_sha256
    return job
