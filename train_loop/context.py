"""What the loop needs from around it: who am I, talk to the others, report, stop. Ray's version and a local one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pyarrow.fs import FileSystem, LocalFileSystem

from train_loop.errors import Cause, RunFault
from train_loop.hang import Beat, Watchdog

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
CAUSE_FIRST_S = 5.0  # longer than Ray Train takes to notice that a worker is gone


class RunContext(Protocol):
    """One worker's view of a run."""

    rank: int
    world_size: int
    local_rank: int  # among the workers of this machine
    local_world_size: int
    node_rank: int  # this machine, among the run's
    device: torch.device
    model_folder: Path
    storage: FileSystem
    run_path: str  # the run's folder inside `storage`
    scratch: Path  # local, removed after the run
    start: Path | None  # the folder of the adapter that training continues from

    @property
    def open_source(self) -> Callable[[], FileSystem]:
        """Opens the dataset's file system, with keys that are good at that moment."""
        ...

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over ranks, in place."""
        ...

    def phase(self, name: str) -> None:
        """Say where the run is. Rank 0 counts."""
        ...

    def event(self, kind: str, message: str) -> None:
        """Append to the job's event log. Rank 0 counts."""
        ...

    def log(self, progress: dict[str, Any]) -> None:
        """Report progress; never blocks. Rank 0 counts."""
        ...

    def stop_requested(self) -> bool:
        """Whether the run should save and stop at this step boundary. Never blocks; may differ between ranks."""
        ...

    def require_current(self) -> None:
        """Raise RunFault(superseded) where another attempt may have begun: then nothing may be written that it counts on."""
        ...

    def beat(self, kind: Beat = "other") -> None:
        """Say that the run goes on: a step is done, or something else is, or something slow is to follow."""
        ...

    def preemption(self) -> str | None:
        """A notice that a machine of the run will be taken back, as a sentence. Never blocks; may differ between ranks."""
        ...


class Monitor(Protocol):
    """Who listens to a run: the job actor in the service, a console without it. Called on an actor handle in Ray."""

    def on_phase(self, name: str) -> None: ...
    def on_event(self, kind: str, message: str) -> None: ...
    def on_progress(self, progress: dict[str, Any]) -> None: ...
    def on_log(self, rank: int, lines: list[tuple[float, str]]) -> None: ...
    def stop_requested(self) -> bool: ...
    def is_current(self) -> bool: ...


Report = Callable[[list[dict[str, Any]]], None]  # sends points to the job's trackers; never blocks


def _nobody(points: list[dict[str, Any]]) -> None:
    """No tracker is to hear of them."""


def _local_device() -> torch.device:
    import torch  # here, so that the service's own processes, which only pass contexts' code on, start without it

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class LocalContext:
    """No Ray: this process is the whole world, or one of a group that torch.distributed has been told of."""

    model_folder: Path
    storage: FileSystem
    run_path: str
    scratch: Path
    monitor: Monitor
    start: Path | None = None
    open_source: Callable[[], FileSystem] = LocalFileSystem
    report: Report = _nobody
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    device: torch.device = field(default_factory=_local_device)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return _all_reduce_sum(tensor, self.world_size)

    def phase(self, name: str) -> None:
        self.monitor.on_phase(name)

    def event(self, kind: str, message: str) -> None:
        self.monitor.on_event(kind, message)

    def log(self, progress: dict[str, Any]) -> None:
        self.report(progress["points"])
        self.monitor.on_progress(progress)

    def stop_requested(self) -> bool:
        return self.monitor.stop_requested()

    def require_current(self) -> None:
        _require(self.monitor.is_current())

    def beat(self, kind: Beat = "other") -> None:
        """Who started the process sees for themselves whether it hangs."""

    def preemption(self) -> str | None:
        return None


def _require(current: bool) -> None:
    if not current:
        raise RunFault(Cause.SUPERSEDED, "Another attempt at the job has begun, or this one's own actor is gone.")


def _all_reduce_sum(tensor: torch.Tensor, world_size: int) -> torch.Tensor:
    if world_size > 1:
        import torch.distributed

        torch.distributed.all_reduce(tensor)
    return tensor


class RayContext:
    """A Ray Train worker. What it reports goes straight to the monitor actor: Ray Train's own queue takes one report in 2 s."""

    def __init__(
        self,
        *,
        model_folder: Path,
        storage: FileSystem,
        run_path: str,
        scratch: Path,
        start: Path | None,
        open_source: Callable[[], FileSystem],
        report: Report,
        monitor: Any,
        watchdog: Watchdog,
    ) -> None:
        import ray.train
        import ray.train.torch

        train = ray.train.get_context()
        self.rank = train.get_world_rank()
        self.world_size = train.get_world_size()
        self.local_rank = train.get_local_rank()
        self.local_world_size = train.get_local_world_size()
        self.node_rank = train.get_node_rank()
        self.device = ray.train.torch.get_device()
        self.model_folder = model_folder
        self.storage = storage
        self.run_path = run_path
        self.scratch = scratch
        self.start = start
        self.open_source = open_source
        self._report = report
        self._monitor = monitor
        self._watchdog = watchdog
        self._asked: Any = None
        self._stop = False

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        try:
            return _all_reduce_sum(tensor, self.world_size)
        except RuntimeError:
            # Another worker is gone. Ray is to see that one's end first: it is the cause, and this only follows from it.
            time.sleep(CAUSE_FIRST_S)
            raise

    def phase(self, name: str) -> None:
        log.info("phase %s", name)
        if self.rank == 0:
            self._monitor.on_phase.remote(name)

    def event(self, kind: str, message: str) -> None:
        if self.rank == 0:
            log.info("%s: %s", kind, message)
            self._monitor.on_event.remote(kind, message)

    def log(self, progress: dict[str, Any]) -> None:
        if self.rank == 0:
            self._report(progress["points"])
            self._monitor.on_progress.remote(progress)

    def stop_requested(self) -> bool:
        if self.rank != 0:
            return False
        import ray

        # One question is always under way; a step boundary only looks whether its answer has come.
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            self._stop = self._stop or bool(ray.get(self._asked))
            self._asked = None
        if self._asked is None:
            self._asked = self._monitor.stop_requested.remote()
        return self._stop

    def require_current(self) -> None:
        import ray
        from ray.exceptions import RayError

        try:
            current = ray.get(self._monitor.is_current.remote())
        except RayError:  # it is gone, or the way to it: the dispatcher may see that too, and start another one
            current = False
        _require(current)

    def beat(self, kind: Beat = "other") -> None:
        self._watchdog.beat(kind)

    def preemption(self) -> str | None:
        # Ray's public get_preemption_info is a collective through an actor: milliseconds a step, and a hang if ranks differ.
        from ray.train.v2._internal.execution.context import get_train_context

        info = get_train_context().preemption_context.preemption_info
        if info is None:
            return None
        when = "soon" if not info.deadline_ms else time.strftime("by %H:%M:%S UTC", time.gmtime(info.deadline_ms / 1000))
        return f"the machine of worker {', '.join(map(str, info.preempted_ranks))} will be taken back {when}"
