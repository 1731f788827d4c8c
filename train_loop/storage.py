"""Object storage that may be away for a while: whole objects are read and written, and an outage is waited out.

Each of these operations has the same effect when done twice, so waiting is just trying again. A reader never sees half an object:
object storage has none, and a local file gets its name when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from train_loop.errors import Cause, RunFault, first_line

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_S = "TUNEYARD_STORAGE_PATIENCE_S"  # how long an outage is waited out
DEFAULT_PATIENCE_S = 300.0
LONGEST_PAUSE_S = 10.0
BLOCK_BYTES = 1 << 20
PART = ".part"
# How what is told of an outage begins, and of its end.
AWAY = "the storage is away"
BACK = "the storage is back"

DENIED = (
    "ACCESS_DENIED",
    "AccessDenied",
    "INVALID_ACCESS_KEY",
    "SIGNATURE",
    "Signature",
    "INVALID_CLIENT_TOKEN",
    "HTTP status 403",
    # Google's
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
)
NO_BUCKET = ("NO_SUCH_BUCKET", "NoSuchBucket", "bucket does not exist")
NO_OBJECT = ("NO_SUCH_KEY", "HTTP status 404")
ANSWERS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)

MAX_LATE = 20  # threads that wait for a storage when whoever asked has gone

_late = threading.BoundedSemaphore(MAX_LATE)
_tell: Callable[[str], None] = log.warning


@contextlib.contextmanager
def outages_told(tell: Callable[[str], None]) -> Iterator[None]:
    """Inside, `tell` hears of an outage that this process waits for, and of its end. Any thread may call it."""
    global _tell
    before, _tell = _tell, tell
    try:
        yield
    finally:
        _tell = before


def is_away(error: BaseException) -> bool:
    """Whether the storage didn't answer, or has no room now; a refusal is an answer."""
    text = str(error)
    return (
        isinstance(error, OSError)
        and not isinstance(error, ANSWERS)
        and not any(sign in text for signs in (DENIED, NO_BUCKET, NO_OBJECT) for sign in signs)
    )


def answers_later(status: int) -> bool:
    """Whether an HTTP status is no answer yet: the same request is worth another try."""
    return status in (408, 425, 429) or status >= 500


def patiently(action: Callable[[], T], what: str, patience_s: float | None = None) -> T:
    """Do `action`, again and again while the storage is away. Raises RunFault(storage_away) when that takes too long."""
    limit = float(os.environ.get(PATIENCE_S, DEFAULT_PATIENCE_S)) if patience_s is None else patience_s

    def say(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            _tell(f"{AWAY} ({what}: {first_line(state.outcome.exception())}); waiting for up to {limit:.0f} s")

    retrying = Retrying(
        retry=retry_if_exception(is_away),
        wait=wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE_S),
        stop=stop_after_delay(limit),
        before_sleep=say,
        reraise=True,
    )
    try:
        result = retrying(action)
    except OSError as error:
        if is_away(error):
            raise RunFault(Cause.STORAGE_AWAY, f"The storage was away for {limit:.0f} s ({what}): {first_line(error)}") from error
        raise
    if retrying.statistics["attempt_number"] > 1:
        _tell(f"{BACK} after {retrying.statistics['delay_since_first_attempt']:.0f} s")
    return result


def within(limit_s: float, action: Callable[[], T], what: str) -> T:
    """Do `action`, for as long as `limit_s`: for a client whose own limits are minutes. Raises RunFault(storage_away) after it.

    What is late goes on in a thread that nobody waits for. While too many do, nothing is begun.
    """
    away = RunFault(Cause.STORAGE_AWAY, f"The storage is away: no answer within {limit_s:g} s ({what}).")
    if not _late.acquire(blocking=False):
        raise away
    done: Future[T] = Future()

    def act() -> None:
        try:
            done.set_result(action())
        except Exception as error:  # noqa: BLE001 - whoever waits raises it
            done.set_exception(error)
        finally:
            _late.release()

    threading.Thread(target=act, name="within", daemon=True).start()
    wait([done], limit_s)
    if not done.done():
        raise away
    return done.result()


def read_bytes(storage: FileSystem, path: str) -> bytes:
    """A whole object. Raises FileNotFoundError."""

    def read() -> bytes:
        with storage.open_input_stream(path) as stream:
            data: bytes = stream.read()
        return data

    return patiently(read, f"reading {path}")


def write_bytes(storage: FileSystem, path: str, data: bytes) -> None:
    """Make or replace an object."""

    def write(to: str) -> None:
        with storage.open_output_stream(to) as out:
            out.write(data)

    patiently(lambda: _whole(storage, path, write), f"writing {path}")


def write_json(storage: FileSystem, path: str, value: Any) -> None:
    """Write `value` as JSON."""
    write_bytes(storage, path, json.dumps(value, indent=2, sort_keys=True).encode())


def read_json(storage: FileSystem, path: str) -> Any:
    """Read JSON; None when there is no such object."""
    try:
        return json.loads(read_bytes(storage, path))
    except FileNotFoundError:
        return None


def upload_file(local: Path, storage: FileSystem, path: str) -> None:
    """Copy a local file to `path`, replacing what is there."""

    def copy(to: str) -> None:
        with local.open("rb") as source, storage.open_output_stream(to) as out:
            shutil.copyfileobj(source, out, BLOCK_BYTES)

    patiently(lambda: _whole(storage, path, copy), f"writing {path}")


def download_file(storage: FileSystem, path: str, local: Path) -> None:
    """Copy an object to a local file. Raises FileNotFoundError."""

    def copy() -> None:
        with storage.open_input_stream(path) as source, local.open("wb") as out:
            shutil.copyfileobj(source, out, BLOCK_BYTES)

    patiently(copy, f"reading {path}")


def copy_object(storage: FileSystem, source: str, path: str) -> None:
    """Make or replace an object by a copy of another one (a file by a second name of it). Raises OSError when there is none."""
    from pyarrow.fs import LocalFileSystem

    # Files are replaced and never changed, so that two names can share one.
    copy = os.link if isinstance(storage, LocalFileSystem) else storage.copy_file
    patiently(lambda: _whole(storage, path, lambda to: copy(source, to)), f"writing {path}")


def hash_of(storage: FileSystem, path: str) -> str:
    """sha256 of an object, of which one block is held at a time. Raises FileNotFoundError."""

    def read() -> str:
        digest = hashlib.sha256()
        with storage.open_input_stream(path) as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    return patiently(read, f"reading {path}")


def upload_folder(folder: Path, storage: FileSystem, path: str) -> list[dict[str, Any]]:
    """Copy the files of a local folder under `path`; return their name, size_bytes and sha256, by name."""
    files = []
    for local in sorted(folder.iterdir()):
        with local.open("rb") as stream:
            sha = hashlib.file_digest(stream, "sha256").hexdigest()
        files.append({"name": local.name, "size_bytes": local.stat().st_size, "sha256": sha})
        upload_file(local, storage, f"{path}/{local.name}")
    return files


def described(storage: FileSystem, path: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Name, size_bytes and sha256 of those of these objects that are under `path`."""
    from pyarrow.fs import FileType

    infos = patiently(lambda: storage.get_file_info([f"{path}/{name}" for name in names]), f"looking into {path}")
    return [
        {"name": name, "size_bytes": info.size, "sha256": hash_of(storage, info.path)}
        for name, info in zip(names, infos, strict=True)
        if info.type == FileType.File
    ]


def verify(storage: FileSystem, path: str, files: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the `files` (name, size_bytes, sha256) are under `path`, read back from storage: what is really there."""
    sizes = list_files(storage, path) if files else {}
    return all(sizes.get(f["name"]) == f["size_bytes"] for f in files) and all(
        hash_of(storage, f"{path}/{f['name']}") == f["sha256"] for f in files
    )


def list_files(storage: FileSystem, path: str) -> dict[str, int]:
    """Size in bytes of every object under `path`, by its name relative to it; empty when there is none."""
    from pyarrow.fs import FileSelector, FileType

    def listing() -> Any:
        return storage.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))

    found = patiently(listing, f"listing {path}")
    return {i.path.removeprefix(f"{path}/"): i.size for i in found if i.type == FileType.File and not i.path.endswith(PART)}


def delete_file(storage: FileSystem, path: str) -> None:
    """Remove an object, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        patiently(lambda: storage.delete_file(path), f"removing {path}")


def delete_folder(storage: FileSystem, path: str) -> None:
    """Remove everything under `path`, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        patiently(lambda: storage.delete_dir(path), f"removing {path}")


def _whole(storage: FileSystem, path: str, write: Callable[[str], None]) -> None:
    from pyarrow.fs import LocalFileSystem

    if not isinstance(storage, LocalFileSystem):
        write(path)  # its object appears when the stream is closed
        return
    storage.create_dir(path.rpartition("/")[0], recursive=True)
    part = f"{path}.{os.getpid()}{PART}"
    try:
        write(part)
        storage.move(part, path)
    finally:
        Path(part).unlink(missing_ok=True)
