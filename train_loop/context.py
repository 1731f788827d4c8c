"""What the loop needs from around it: who am I, talk to the others, report, save, stop. Ray's version and a local one."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from pyarrow.fs import FileSystem

log = logging.getLogger(__name__)


class RunContext(Protocol):
    """One worker's view of a run."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    model_folder: Path
    storage: FileSystem
    run_path: str  # the run's folder inside `storage`
    scratch: Path  # local, removed after the run

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

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Make a checkpoint: every rank fills the folder it is given; collective."""
        ...

    def resume(self) -> Path | None:
        """The newest checkpoint as a local folder, or None for a fresh run."""
        ...


class Monitor(Protocol):
    """Who listens to a run: the job actor in the service, a console without it. Called on an actor handle in Ray."""

    def on_phase(self, name: str) -> None: ...
    def on_event(self, kind: str, message: str) -> None: ...
    def on_progress(self, progress: dict[str, Any]) -> None: ...
    def on_log(self, rank: int, lines: list[tuple[float, str]]) -> None: ...
    def stop_requested(self) -> bool: ...


def _local_device() -> torch.device:
    import torch  # here, so that the service's own processes, which only pass contexts' code on, start without it

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class LocalContext:
    """One process, no Ray: the whole world is rank 0."""

    model_folder: Path
    storage: FileSystem
    run_path: str
    scratch: Path
    monitor: Monitor
    keep: int = 2
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = field(default_factory=_local_device)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def phase(self, name: str) -> None:
        self.monitor.on_phase(name)

    def event(self, kind: str, message: str) -> None:
        self.monitor.on_event(kind, message)

    def log(self, progress: dict[str, Any]) -> None:
        self.monitor.on_progress(progress)

    def stop_requested(self) -> bool:
        return self.monitor.stop_requested()

    def _checkpoints(self) -> list[str]:
        from pyarrow.fs import FileSelector

        found = self.storage.get_file_info(FileSelector(f"{self.run_path}/checkpoints", recursive=True, allow_not_found=True))
        return sorted(info.path.removesuffix("/complete") for info in found if info.path.endswith("/complete"))

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        from pyarrow.fs import LocalFileSystem, copy_files

        from train_loop.data.sources import make_folder

        target = f"{self.run_path}/checkpoints/step-{step:08d}"
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            write(Path(folder))
            make_folder(self.storage, target)
            copy_files(folder, target, source_filesystem=LocalFileSystem(), destination_filesystem=self.storage)
        # The marker goes last: a checkpoint without it was cut off and is never picked up.
        with self.storage.open_output_stream(f"{target}/complete") as marker:
            marker.write(b"")
        for old in self._checkpoints()[: -self.keep]:
            self.storage.delete_dir(old)

    def resume(self) -> Path | None:
        from pyarrow.fs import LocalFileSystem, copy_files

        found = self._checkpoints()
        if not found:
            return None
        folder = self.scratch / "resume"
        folder.mkdir(parents=True, exist_ok=True)
        copy_files(found[-1], str(folder), source_filesystem=self.storage, destination_filesystem=LocalFileSystem())
        return folder


class RayContext:
    """A Ray Train worker. Metrics go straight to the monitor actor: Ray's own report queue drains once in 2 s, so only
    checkpoints go through it."""

    def __init__(self, *, model_folder: Path, storage: FileSystem, run_path: str, scratch: Path, monitor: Any) -> None:
        import ray.train
        import ray.train.torch

        train = ray.train.get_context()
        self.rank = train.get_world_rank()
        self.world_size = train.get_world_size()
        self.local_world_size = train.get_local_world_size()
        self.device = ray.train.torch.get_device()
        self.model_folder = model_folder
        self.storage = storage
        self.run_path = run_path
        self.scratch = scratch
        self._monitor = monitor
        self._asked: Any = None
        self._stop = False

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            import torch.distributed

            torch.distributed.all_reduce(tensor)
        return tensor

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

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        import ray.train

        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            write(Path(folder))
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"step-{step:08d}",
            )

    def resume(self) -> Path | None:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        return Path(checkpoint.to_directory(str(self.scratch / f"resume-{self.rank}")))


def write_json(storage: FileSystem, path: str, value: Any) -> None:
    """Write `value` as JSON to object storage."""
    write_text(storage, path, json.dumps(value, indent=2, sort_keys=True))


def write_text(storage: FileSystem, path: str, text: str) -> None:
    """Write UTF-8 text to object storage."""
    with storage.open_output_stream(path) as out:
        out.write(text.encode())
