"""A control group for processes that the kernel is to end for want of memory; a test is skipped where none can be made."""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    """Either version's; what is in it stays in it with all that it starts."""

    folder: Path
    limit_file: str
    used_file: str

    def enter(self, pid: int | None = None) -> None:
        """Put a process in; by default the one that calls."""
        (self.folder / "cgroup.procs").write_text(str(pid or os.getpid()))

    def limit(self, size_bytes: int) -> None:
        """Allow all processes together so much."""
        (self.folder / self.limit_file).write_text(str(size_bytes))

    @property
    def used(self) -> int:
        """What they take, in bytes."""
        return int((self.folder / self.used_file).read_text())


@contextlib.contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    name = f"tuneyard-test-{uuid.uuid4().hex}"
    kinds = [
        MemoryGroup(GROUPS / "memory" / name, "memory.limit_in_bytes", "memory.usage_in_bytes"),
        MemoryGroup(GROUPS / name, "memory.max", "memory.current"),
    ]
    group = next((kind for kind in kinds if _made(kind)), None)
    if group is None:
        pytest.skip("no memory control group can be made here")
    try:
        yield group
    finally:
        deadline = time.monotonic() + 10
        while group.folder.exists() and time.monotonic() < deadline:  # a process that was killed is in it until it is reaped
            with contextlib.suppress(OSError):
                group.folder.rmdir()
            time.sleep(0.1)


def _made(group: MemoryGroup) -> bool:
    if not group.folder.parent.is_dir():
        return False
    try:
        group.folder.mkdir()
    except OSError:
        return False
    if (group.folder / group.limit_file).exists() and (group.folder / "cgroup.procs").exists():
        return True
    group.folder.rmdir()
    return False
