"""What is read in parallel: byte ranges of JSONL, also of a zip's, row groups of Parquet, whole files of what can't be cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train_loop.data.archive import Archive
from train_loop.data.compressed import is_compressed, read_chunks
from train_loop.data.json_array import split_array
from train_loop.data.jsonl import split_lines
from train_loop.data.lines import Line, WrongType
from train_loop.data.parquet import read_rows, row_groups
from train_loop.data.sources import SourceFile, explain
from train_loop.errors import DatasetError
from train_loop.storage import is_away, patiently

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

RANGE_BYTES = 16 << 20
MANY_RANGES = 32
LONGEST_RANGES = 8  # times RANGE_BYTES, which is what is held in memory of them at a time
# Of a zip's rows, of which each brings images of a hundred times its size; every part unpacks the rows before its own.
ZIPPED_RANGE_BYTES = 1 << 20
MAX_ZIPPED_PARTS = 64


@dataclass(frozen=True)
class Part:
    """One task's share of a dataset; `index` orders them.

    `start` and `end` are bytes of the file, of a zip those of its train.jsonl, of Parquet row numbers from 0; `row_group` is
    Parquet's.
    """

    index: int
    file_index: int
    file: SourceFile
    dataset_type: str
    start: int
    end: int
    row_group: int | None = None
    block_bytes: int = RANGE_BYTES  # held in memory at a time


def plan_parts(filesystem: FileSystem, files: Sequence[SourceFile], dataset_type: str) -> list[Part]:
    """The parts of the files, in file order; JSONL in ranges. Raises DatasetError."""
    parts: list[Part] = []
    for file_index, file in enumerate(files):

        def add(start: int, end: int, row_group: int | None = None, at: int = file_index) -> None:
            block_bytes = ZIPPED_RANGE_BYTES if dataset_type == "zip" else RANGE_BYTES
            parts.append(Part(len(parts), at, files[at], dataset_type, start, end, row_group, block_bytes))

        if dataset_type == "parquet":
            first = 0
            for group, rows in enumerate(groups_of(filesystem, file)):
                add(first, first + rows, group)
                first += rows
        elif dataset_type == "zip":
            size = zipped_rows_bytes(filesystem, file)
            step = max(ZIPPED_RANGE_BYTES, -(-size // MAX_ZIPPED_PARTS))
            for start in range(0, max(1, size), step):
                add(start, min(start + step, size))
        elif can_be_cut(file, dataset_type):
            step = range_bytes(file.size_bytes)
            for start in range(0, file.size_bytes, step):
                add(start, min(start + step, file.size_bytes))
        else:
            add(0, file.size_bytes)
    return parts


def range_bytes(size: int) -> int:
    """How long the ranges of a file of so many bytes are: alike, and longer where there are many, for a task of Ray Data's waits
    some 0.15 s to be followed by the next one."""
    longest = min(max(RANGE_BYTES, size // MANY_RANGES), LONGEST_RANGES * RANGE_BYTES)
    number = max(1, -(-size // longest))
    return max(1, -(-size // number))


def can_be_cut(file: SourceFile, dataset_type: str) -> bool:
    """Whether reading can begin anywhere in the file."""
    return dataset_type == "jsonl" and not is_compressed(file.path)


def groups_of(filesystem: FileSystem, file: SourceFile) -> list[int]:
    """Rows of each of a Parquet file's row groups. Raises DatasetError."""
    try:
        return patiently(lambda: row_groups(filesystem, file.path), f"reading {file.uri}")
    except WrongType as wrong:
        raise _wrong_type(file, "parquet", wrong) from None
    except OSError as error:
        raise explain(error, file.uri) from None


def zipped_rows_bytes(filesystem: FileSystem, file: SourceFile) -> int:
    """Length of a zip's train.jsonl, uncompressed. Raises DatasetError."""

    def look() -> int:
        with open_archive(filesystem, file) as archive:
            return archive.rows_bytes

    return patiently(look, f"reading {file.uri}")


def open_archive(filesystem: FileSystem, file: SourceFile) -> Archive:
    """The zip that the file is. Raises OSError while the storage is away, DatasetError."""
    try:
        return Archive(filesystem, file.path)
    except WrongType as wrong:
        raise _wrong_type(file, "zip", wrong) from None
    except OSError as error:
        if is_away(error):
            raise
        raise explain(error, file.uri) from None


def read_part(filesystem: FileSystem, part: Part, limit: int | None = None, archive: Archive | None = None) -> Iterator[Line]:
    """The rows of a part, in order, a few at a time; a file that can't be cut is read as if it ended after `limit` bytes.

    `archive` is the part's zip, where it is open. Raises OSError while the storage is away, DatasetError for all else.
    """
    file, path = part.file, part.file.path
    if part.dataset_type == "zip" and archive is None:
        with open_archive(filesystem, file) as opened:
            yield from read_part(filesystem, part, limit, opened)
        return
    try:
        if archive is not None:
            yield from split_lines(archive.row_chunks(max(0, part.start - 1)), part.start, part.end)
            return
        if part.row_group is not None:
            yield from read_rows(filesystem, path, part.row_group, part.start)
        elif part.dataset_type == "json":
            yield from split_array(read_chunks(filesystem, path, limit=limit))
        elif can_be_cut(file, part.dataset_type):
            yield from split_lines(read_chunks(filesystem, path, max(0, part.start - 1)), part.start, part.end)
        else:
            yield from split_lines(read_chunks(filesystem, path, limit=limit))
    except WrongType as wrong:
        raise _wrong_type(file, part.dataset_type, wrong) from None
    except OSError as error:
        if is_away(error):
            raise
        raise explain(error, file.uri) from None


def _wrong_type(file: SourceFile, dataset_type: str, wrong: WrongType) -> DatasetError:
    what = {
        "json": "a JSON array of rows",
        "parquet": "a Parquet file",
        "zip": "a zip of images with train.jsonl at its root",
    }.get(dataset_type, "a JSONL file")
    mend = " (rows one a line are dataset_type jsonl)" if dataset_type == "json" else ""
    return DatasetError(
        f"{file.uri} can't be read as {what}: {wrong.reason.rstrip('.')}. Mend the file, or correct dataset_type{mend}.",
        field="dataset_details.dataset_type",
        code="wrong_dataset_type",
    )
