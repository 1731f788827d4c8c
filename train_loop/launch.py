"""From a JobSpec to an adapter in object storage: Ray Data pipeline, Ray Train, manifest.

`launch` runs on Ray (the service's job actor and `python -m train_loop` both call it); `launch_local` runs the same parts
in this process.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_loop import allocator
from train_loop.context import LocalContext, Monitor, RayContext
from train_loop.data.cache import cache_key, fetch, publish
from train_loop.data.prepare import preparation_key, prepare_local, prepared_before
from train_loop.data.shards import PreparedDataset
from train_loop.data.sources import FIRST_CONTACT_S, SourceFile, find_files
from train_loop.errors import Cause, RunFault, Stopped, UserError
from train_loop.faults import classified, killed_for_memory, machines_lost
from train_loop.hang import FACTOR, FLOOR_S, StepClock, Watchdog
from train_loop.layout import ADAPTER_FOLDER, JOB, MANIFEST, MERGED_FOLDER, RECORDS
from train_loop.memory_kills import Place, any_killed, noted
from train_loop.model.source import model_folder
from train_loop.run_files import Keys, RunFiles, fetch_start
from train_loop.scratch import scratch_folder
from train_loop.spec import JobSpec
from train_loop.storage import described, list_files, outages_told, read_json, verify, write_json
from train_loop.trackers.curves import RunCard
from train_loop.trackers.reporter import reporting
from train_loop.trackers.tracker import TrackerKeys
from train_loop.worker_log import shipped

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from train_loop.data.tokenize import ChatTokenizer


OUTCOME = "outcome.json"  # how training ended; written when the adapter is in storage
WORKER_NICENESS = 15  # Ray's own default for all its workers
SESSION_NICENESS = 10  # a tenth of what others get while they want all
TELL_S = 10.0  # a worker that ends itself waits so long for the monitor to hear why
TRAINS = "TUNEYARD_TRAINS"  # set in the environment of workers on CPUs


@dataclass(frozen=True)
class Placement:
    """What one worker gets: the resolved infrastructure profile."""

    resources: Mapping[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    use_gpu: bool = False
    accelerator_type: str | None = None
    data_cpus: float = 0.5  # CPU of one Ray Data task
    num_workers: int | None = None  # of this attempt, when fewer than the job's fit; None is the job's
    room_waits: int = 10  # times that Ray Train waits for room for the workers, a minute each: nodes may be on their way
    # Silence that counts as a hang: hang_factor times a step, at least hang_floor_s.
    hang_floor_s: float = field(default_factory=lambda: float(os.environ.get("TUNEYARD_HANG_FLOOR_S", FLOOR_S)))
    hang_factor: float = field(default_factory=lambda: float(os.environ.get("TUNEYARD_HANG_FACTOR", FACTOR)))


@dataclass(frozen=True)
class ActorMonitor:
    """Finds the monitor actor by name; cheap to pickle, holds no secret."""

    name: str
    namespace: str

    @cached_property
    def handle(self) -> Any:
        import ray

        return ray.get_actor(self.name, namespace=self.namespace)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "namespace": self.namespace}

    def keys(self) -> Keys:
        """Ask the monitor for the run's credentials."""
        keys: Keys = _opened(self.handle.keys.remote())
        return keys

    def tracker(self, secret: str) -> TrackerKeys:
        """Ask the monitor for the keys of one of the job's trackers."""
        keys: TrackerKeys = _opened(self.handle.tracker.remote(secret))
        return keys


def worker_environment() -> dict[str, str]:
    """The variables that a worker on CPUs starts with."""
    return {TRAINS: "1"} | allocator.environment()


def _opened(asked: Any) -> Any:
    import ray

    try:
        return ray.get(asked)
    except UserError as error:
        # Ray raises a class of its own over ours, whose `code` is the class's and whose text is a remote traceback.
        raise getattr(error, "cause", error) from None


def _chat_tokenizer(spec: JobSpec, files: RunFiles) -> ChatTokenizer:
    from train_loop.data.image_tokens import ImageTokens
    from train_loop.data.tokenize import ChatTokenizer
    from train_loop.model.processor import load_processor
    from train_loop.model.tokenizer import load_text_tokenizer, load_tokenizer

    places = files.models(spec)
    folder = model_folder(spec.model_details, places, weights=False)
    if spec.model_details.model_type == "vlm":
        tokenizer = load_tokenizer(folder)
        return ChatTokenizer.of(spec, tokenizer, ImageTokens(load_processor(folder, tokenizer)))
    return ChatTokenizer.of(spec, load_text_tokenizer(folder, places.cache_bytes))


def launch(spec: JobSpec, request_id: str, files: RunFiles, placement: Placement, monitor: ActorMonitor) -> dict[str, Any]:
    """Make one attempt at the job on Ray; block until it ends. Returns the manifest, which is in the run's folder by then.

    Called again with the same `request_id` and folder it goes on from what is there: a manifest, an adapter, a checkpoint,
    prepared rows. When that is worth it is the caller's business.
    Raises UserError for the user's input, Stopped when the monitor asked for it, RunFault for all else.
    """
    import ray

    tell: Any = monitor.handle

    def train(prepared: PreparedDataset) -> Mapping[str, Any]:
        if ray.get(tell.stop_requested.remote()):
            raise Stopped
        tell.on_phase.remote("waiting_for_resources")
        return _train(spec, request_id, files, placement, monitor, prepared)

    def prepare(source: FileSystem, found: list[SourceFile], run_path: str) -> PreparedDataset:
        return _prepare_on_ray(spec, found, files, placement, run_path)

    try:
        with classified(spec), outages_told(lambda text: tell.on_event.remote("storage_away", text)):
            return _attempt(spec, request_id, files, tell.on_phase.remote, tell.on_event.remote, prepare, train)
    except RunFault as fault:
        if fault.cause not in (Cause.WORKER_DIED, Cause.HANG):
            raise
        places: list[Place] = ray.get(tell.places.remote())
        # Whoever trained with a machine that went without a word only sees a connection closed, or nothing at all.
        if machines_lost({place.node_id for place in places}):
            raise RunFault(Cause.NODE_LOST, f"The machine of a worker is gone. {fault.message}") from fault
        if fault.cause is Cause.WORKER_DIED and any_killed(places):
            raise killed_for_memory(spec) from fault
        raise


def launch_local(spec: JobSpec, request_id: str, files: RunFiles, monitor: Monitor) -> dict[str, Any]:
    """Run the job in this process, without Ray, as a world of one. Same result and errors as `launch`."""
    from train_loop.loop import run

    storage, run_path = files.storage()

    def prepare(source: FileSystem, found: list[SourceFile], run_path: str) -> PreparedDataset:
        return prepare_local(spec, source, found, storage, run_path, _chat_tokenizer(spec, files))

    def train(prepared: PreparedDataset) -> Mapping[str, Any]:
        with (
            scratch_folder() as scratch,
            reporting(
                spec.train_config.report_to, RunCard.of(spec, request_id), files.tracker, monitor.on_event, scratch
            ) as reporter,
        ):
            ctx = LocalContext(
                model_folder=model_folder(spec.model_details, files.models(spec)),
                storage=storage,
                run_path=run_path,
                scratch=scratch,
                start=fetch_start(spec, files, scratch),
                open_source=partial(files.source, spec),
                report=reporter.points,
                monitor=monitor,
            )
            outcome = run(spec, prepared, ctx)
            reporter.ending = "stopped" if outcome.stopped else "completed"
            return asdict(outcome)

    with classified(spec), outages_told(lambda text: monitor.on_event("storage_away", text)):
        return _attempt(spec, request_id, files, monitor.on_phase, monitor.on_event, prepare, train)


def _attempt(
    spec: JobSpec,
    request_id: str,
    files: RunFiles,
    on_phase: Callable[[str], Any],
    on_event: Callable[[str, str], Any],
    prepare: Callable[[FileSystem, list[SourceFile], str], PreparedDataset],
    train: Callable[[PreparedDataset], Mapping[str, Any]],
) -> dict[str, Any]:
    """The parts in order, each left out when an earlier attempt has finished it."""
    storage, run_path = files.storage()
    if (manifest := _finished(storage, run_path, request_id)) is not None:
        return manifest
    write_json(storage, f"{run_path}/{JOB}", spec.model_dump(mode="json"))

    on_phase("preparing_data")
    # Rows that an earlier attempt prepared were reachable: their storage is waited for like the run's own.
    been_here = "index.json" in list_files(storage, f"{run_path}/data")
    source = files.source(spec)
    found = find_files(spec, source, patience_s=None if been_here else FIRST_CONTACT_S)
    if (prepared := prepared_before(spec, found, storage, run_path)) is not None:
        on_event("prepared", f"{describe(prepared)}; prepared by an earlier attempt")
    elif (prepared := fetch(storage, run_path, key := _cache_key(spec, found, files))) is not None:
        on_event("prepared", f"{describe(prepared)}; prepared by another job")
    else:
        prepared = prepare(source, found, run_path)
        publish(storage, run_path, key, prepared)
        on_event("prepared", describe(prepared))

    outcome = read_json(storage, f"{run_path}/{OUTCOME}")
    if outcome is None or outcome["stopped"] or not _is_there(storage, run_path, outcome):
        outcome = train(prepared)
    if outcome["stopped"]:
        raise Stopped
    return _finish(spec, request_id, files, prepared, outcome, storage, run_path)


def _cache_key(spec: JobSpec, found: list[SourceFile], files: RunFiles) -> str:
    from train_loop.model.tokenizer import tokenizer_hash

    folder = model_folder(spec.model_details, files.models(spec), weights=False)
    return cache_key(preparation_key(spec, found), tokenizer_hash(folder))


def _is_there(storage: FileSystem, run_path: str, outcome: Mapping[str, Any]) -> bool:
    """Whether storage holds what training left."""
    folders = {ADAPTER_FOLDER: outcome["adapter_files"], MERGED_FOLDER: outcome["merged_files"]}
    return all(verify(storage, f"{run_path}/{name}", files) for name, files in folders.items())


def _finished(storage: FileSystem, run_path: str, request_id: str) -> dict[str, Any] | None:
    """The manifest, when an earlier attempt wrote it: it comes last, so everything else is there."""
    manifest: dict[str, Any] | None = read_json(storage, f"{run_path}/{MANIFEST}")
    return manifest if manifest is not None and manifest["request_id"] == request_id else None


def describe(prepared: PreparedDataset) -> str:
    """One sentence for the event log."""
    counts = ", ".join(f"{n} {split}" for split, n in prepared.counts.items())
    said = f"{prepared.num_rows} rows ({counts}), {prepared.num_rejected} rejected of {prepared.num_lines} lines"
    if prepared.num_preferences:
        said += f"; of {prepared.num_preferences} preference rows the preferred answers are trained on, the others are left out"
    return said


def _prepare_on_ray(
    spec: JobSpec, found: list[SourceFile], files: RunFiles, placement: Placement, run_path: str
) -> PreparedDataset:
    import ray

    from train_loop.data.pipeline import prepare_with_ray

    chat = ray.put(_chat_tokenizer(spec, files))
    return prepare_with_ray(
        spec,
        found,
        open_source=lambda: files.source(spec),
        open_storage=lambda: files.storage()[0],
        run_path=run_path,
        load_tokenizer=lambda: ray.get(chat),
        num_cpus_per_task=placement.data_cpus,
    )


def _train(
    spec: JobSpec,
    request_id: str,
    files: RunFiles,
    placement: Placement,
    monitor: ActorMonitor,
    prepared: PreparedDataset,
) -> dict[str, Any]:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

    from train_loop.trainer import ProcessGroup, Trainer

    # Checkpoints are ours; what Ray Train writes down of its own is of no use after the attempt.
    with scratch_folder() as notes:
        trainer = Trainer(
            _worker,
            train_loop_config={
                "spec": spec.model_dump_json(),
                "request_id": request_id,
                "prepared": prepared.to_json(),
                "files": files,
                "monitor": monitor,
                "clock": StepClock(placement.hang_floor_s, placement.hang_factor),
            },
            backend_config=ProcessGroup("nccl" if placement.use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=placement.num_workers or spec.infra_config.num_workers,
                use_gpu=placement.use_gpu,
                resources_per_worker=dict(placement.resources),
                accelerator_type=placement.accelerator_type,
            ),
            run_config=RunConfig(
                name=request_id,
                storage_path=str(notes),
                worker_runtime_env=None if placement.use_gpu else {"env_vars": worker_environment()},
                # An attempt ends with the first fault. Only room for the workers is waited for.
                failure_config=FailureConfig(
                    max_failures=0, max_preemption_failures=0, controller_failure_limit=placement.room_waits
                ),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError:
            # A worker that ends itself says why before it goes; Ray only sees it gone.
            told: UserError | RunFault | None = ray.get(monitor.handle.failure.remote())
            if told is not None:
                raise told from None
            raise
    storage, run_path = files.storage()
    outcome: dict[str, Any] = read_json(storage, f"{run_path}/{OUTCOME}")
    return outcome


def _give_way() -> None:
    """Let everything else on the machine go first, so that a status query needn't wait for a step.

    On Linux niceness is a thread's own and inherited by those it starts; gloo has started some by now. Where the kernel groups
    threads by session (autogroup), it counts within the session only, and whoever asks from another one is starved: so the
    worker gets a session of its own, whose niceness counts among sessions (sched(7)).
    """
    with contextlib.suppress(OSError):  # not on this system
        os.setpgid(0, os.getpgid(os.getppid()))  # Ray has made it the leader of a group, and such a one can't leave the session
        os.setsid()
        Path("/proc/self/autogroup").write_text(str(SESSION_NICENESS))
    threads = Path("/proc/self/task")
    for thread in threads.iterdir() if threads.is_dir() else [Path("0")]:
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(thread.name), WORKER_NICENESS)


def _worker(config: dict[str, Any]) -> None:
    """One Ray Train worker. Raises UserError or RunFault: torch's own errors would have to be known where `launch` runs."""
    import ray.train
    from ray.exceptions import RayError

    from train_loop.loop import run

    _give_way()
    monitor: ActorMonitor = config["monitor"]
    files: RunFiles = config["files"]
    spec = JobSpec.model_validate_json(config["spec"])
    storage, run_path = files.storage()
    rank = ray.train.get_context().get_world_rank()
    tell: Any = monitor.handle
    trackers = spec.train_config.report_to if rank == 0 else []

    def send(lines: list[tuple[float, str]]) -> None:
        # Waits for the delivery, or the last lines would be lost with the process. Without a monitor the run is over anyway.
        with contextlib.suppress(RayError):
            ray.get(monitor.handle.on_log.remote(rank, lines))

    def on_hang(message: str) -> None:
        flush()
        with contextlib.suppress(RayError):
            ray.get(tell.on_failure.remote(RunFault(Cause.HANG, message)), timeout=TELL_S)

    def on_event(kind: str, text: str) -> None:
        tell.on_event.remote(kind, text)

    def on_place(place: Place) -> None:
        tell.on_place.remote(rank, place)

    with (
        scratch_folder() as scratch,
        shipped(send, request_id=config["request_id"], rank=rank) as flush,
        noted(ray.get_runtime_context().get_node_id(), on_place),
        classified(spec),
        outages_told(partial(on_event, "storage_away")),
        Watchdog(config["clock"], on_hang) as watchdog,
        reporting(trackers, RunCard.of(spec, config["request_id"]), files.tracker, on_event, scratch) as reporter,
    ):
        ctx = RayContext(
            model_folder=model_folder(spec.model_details, files.models(spec)),
            storage=storage,
            run_path=run_path,
            scratch=scratch,
            start=fetch_start(spec, files, scratch),
            open_source=partial(files.source, spec),
            report=reporter.points,
            monitor=tell,
            watchdog=watchdog,
        )
        outcome = run(spec, PreparedDataset.from_json(config["prepared"]), ctx)
        if rank == 0:
            ctx.require_current()
            write_json(storage, f"{run_path}/{OUTCOME}", asdict(outcome))
        reporter.ending = "stopped" if outcome.stopped else "completed"


def _finish(
    spec: JobSpec,
    request_id: str,
    files: RunFiles,
    prepared: PreparedDataset,
    outcome: Mapping[str, Any],
    storage: FileSystem,
    run_path: str,
) -> dict[str, Any]:
    """Write the manifest, last: it says that everything else is there, and what it is."""
    if not _is_there(storage, run_path, outcome):
        raise RunFault(Cause.STORAGE_AWAY, "What was trained isn't in storage as it was written there.")

    manifest = {
        "request_id": request_id,
        "adapter_uri": f"{files.storage_uri}/{ADAPTER_FOLDER}" if outcome["adapter_files"] else None,
        "adapter_files": outcome["adapter_files"],
        "merged_uri": f"{files.storage_uri}/{MERGED_FOLDER}" if outcome["merged_files"] else None,
        "merged_files": outcome["merged_files"],
        "base_model": outcome["base_model"],
        "dataset": {
            "sha256": prepared.sha256,
            "files": [asdict(f) for f in prepared.files],
            "lines": prepared.num_lines,
            "rows": prepared.num_rows,
            "rejected": prepared.num_rejected,
            "split": prepared.counts,
            "eval_lines": prepared.eval_lines,
        },
        "records": described(storage, run_path, RECORDS),
        "seed": spec.train_config.hyperparameters.seed,
        "world_size": spec.infra_config.num_workers,
        "worlds": outcome["worlds"],
        "steps": outcome["step"],
        "compute_dtype": outcome["compute_dtype"],
        "metrics": outcome["metrics"],
        "versions": {"python": sys.version.split()[0]}
        | {name: version(name) for name in ("tuneyard", "ray", "torch", "transformers", "peft", "bitsandbytes")},
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(storage, f"{run_path}/{MANIFEST}", manifest)
    return manifest
