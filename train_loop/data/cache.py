"""Prepared rows that the runs of one org share: `<storage>/<org>/data-cache/<key>/`, the key being of all that they depend on.

A run takes a copy (in a folder a second name, in S3 a copy made there), so that an entry may go at any time. Two runs may write
one at once: they write the same bytes, and the index last. A run that finds an entry without all its shards prepares the rows.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from train_loop.data.prepare import INDEX
from train_loop.data.shards import PreparedDataset
from train_loop.layout import REJECTED
from train_loop.storage import copy_object, delete_file, delete_folder, patiently, read_bytes, write_bytes

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

FOLDER = "data-cache"
USED = "used"  # written again by every run that takes the entry: its time is the last use
COPIES_AT_ONCE = 16


def cache_key(preparation_key: str, tokenizer_hash: str) -> str:
    """The entry's name. The second is of the files of the tokenizer that judged the rows."""
    return hashlib.sha256(f"{preparation_key} {tokenizer_hash}".encode()).hexdigest()


def publish(storage: FileSystem, run_path: str, key: str, prepared: PreparedDataset) -> None:
    """Let the org's other runs have what this one prepared."""
    entry = _entry(run_path, key)
    with contextlib.suppress(OSError):  # removed while it is written: this run has its rows
        _copy(storage, [(f"{run_path}/data/{path}", f"{entry}/{path}") for path in prepared.paths])
        copy_object(storage, f"{run_path}/{REJECTED}", f"{entry}/{REJECTED}")
        write_bytes(storage, f"{entry}/{INDEX}", prepared.to_json().encode())


def fetch(storage: FileSystem, run_path: str, key: str) -> PreparedDataset | None:
    """Put what another run prepared into this one's folder; None when there is nothing, or not all of it any more."""
    entry = _entry(run_path, key)
    try:
        prepared = PreparedDataset.from_json(read_bytes(storage, f"{entry}/{INDEX}").decode())
        _copy(storage, [(f"{entry}/{path}", f"{run_path}/data/{path}") for path in prepared.paths])
        copy_object(storage, f"{entry}/{REJECTED}", f"{run_path}/{REJECTED}")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    write_bytes(storage, f"{run_path}/data/{INDEX}", prepared.to_json().encode())
    with contextlib.suppress(OSError):
        write_bytes(storage, f"{entry}/{USED}", b"")
    return prepared


def trim(storage: FileSystem, root: str, budget_bytes: int, *, dry_run: bool = False) -> int:
    """Remove the entries of all orgs below `root` that were used longest ago, until the rest fits; how many."""
    from pyarrow.fs import FileSelector, FileType

    found: list[tuple[float, int, str]] = []
    for org in patiently(lambda: storage.get_file_info(FileSelector(root, allow_not_found=True)), f"listing {root}"):
        if org.type != FileType.Directory:
            continue
        folder = f"{org.path}/{FOLDER}"
        below = FileSelector(folder, recursive=True, allow_not_found=True)
        files = [i for i in storage.get_file_info(below) if i.type == FileType.File]
        for key in {i.path[len(folder) + 1 :].partition("/")[0] for i in files}:
            mine = [i for i in files if i.path.startswith(f"{folder}/{key}/")]
            found.append((max(i.mtime.timestamp() for i in mine), sum(i.size for i in mine), f"{folder}/{key}"))
    excess, removed = sum(size for _, size, _ in found) - budget_bytes, 0
    for _, size, entry in sorted(found):
        if excess <= 0:
            break
        if not dry_run:
            delete_file(storage, f"{entry}/{INDEX}")  # first: from now on nobody begins to copy it
            delete_folder(storage, entry)
        excess, removed = excess - size, removed + 1
    return removed


def _entry(run_path: str, key: str) -> str:
    return f"{run_path.rpartition('/')[0]}/{FOLDER}/{key}"


def _copy(storage: FileSystem, pairs: Iterable[tuple[str, str]]) -> None:
    with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
        for _ in pool.map(lambda pair: copy_object(storage, *pair), pairs):
            pass
