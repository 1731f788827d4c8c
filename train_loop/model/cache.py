"""A machine's own copies of base models: fetched once, kept while a process uses them, the least recently used removed.

Each entry is a folder with two lock files beside it: `.lock` is held while someone works at it, `.used` by every process that has
been given it, until the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

FOLDER = "TUNEYARD_MODEL_CACHE"  # of what was fetched from buckets and private repositories
DEFAULT_BYTES = 200 << 30
PART = ".part"  # an entry that isn't whole yet

_used: dict[Path, IO[str]] = {}  # by this process


def root() -> Path:
    """Where the entries are."""
    return Path(os.environ.get(FOLDER) or Path.home() / ".cache/tuneyard/models")


@contextlib.contextmanager
def entry(folder: Path, budget_bytes: int) -> Iterator[None]:
    """Inside, nobody else on this machine works at the entry; whoever comes meanwhile waits. From then on this process uses it.

    Afterwards those of others go, least recently used first, until all fit into the budget or are in use.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _beside(folder, ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if folder.is_dir():
            _use(folder)
    with contextlib.suppress(FileNotFoundError):  # another process makes room at this moment
        _trim(budget_bytes)


def _use(folder: Path) -> None:
    if folder not in _used:
        _used[folder] = _beside(folder, ".used").open("w")
        fcntl.flock(_used[folder], fcntl.LOCK_SH)
    os.utime(folder)  # the time of the last use


def _trim(budget_bytes: int) -> None:
    entries = sorted((folder.stat().st_mtime, _size(folder), folder) for folder in _entries())
    excess = sum(size for _, size, _ in entries) - budget_bytes
    for _, size, folder in entries:
        if excess > 0 and _remove(folder):
            excess -= size


def _entries() -> Iterator[Path]:
    """What this module or the hub's client has put here, whole or not."""
    for parent in (root(), *root().glob("hub/*")):
        with contextlib.suppress(FileNotFoundError):
            yield from (p for p in parent.iterdir() if p.is_dir() and p.name != "hub" and not p.name.startswith("."))


def _remove(folder: Path) -> bool:
    """Whether it is gone: not while a process works at it or uses it."""
    entry = folder.with_suffix("") if folder.suffix == PART else folder
    with _beside(entry, ".lock").open("w") as lock, _beside(entry, ".used").open("w") as used:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def _size(folder: Path) -> int:
    """Bytes of the files themselves: the hub's client names each once more by a link."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
