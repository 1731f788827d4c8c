"""Parquet by row groups: each is read on its own, a batch of rows at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from train_loop.data import lines
from train_loop.data.lines import Line, WrongType
from train_loop.data.stored_file import StoredFile
from train_loop.errors import first_line

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

BATCH_ROWS = 256
BUFFER_BYTES = 1 << 20


def row_groups(filesystem: FileSystem, path: str) -> list[int]:
    """Rows of each row group. Raises OSError of the storage, WrongType."""
    with _opened(filesystem, path) as source:
        metadata = pq.ParquetFile(source).metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def read_rows(filesystem: FileSystem, path: str, row_group: int, first: int) -> Iterator[Line]:
    """The rows of a row group as JSON, the first of which is the file's row number `first`, from 0.

    Raises OSError of the storage, WrongType when what is there isn't sound.
    """
    number = first
    with _opened(filesystem, path) as source:
        # Not a whole column at a time: a row group can be gigabytes.
        file = pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[row_group], use_threads=False):
            for row in _rows(batch):
                yield row if isinstance(row, Line) else _line(number, row)
                number += 1


def _rows(batch: pa.RecordBatch) -> Iterator[Any]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for i in range(batch.num_rows):  # text columns needn't hold text
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield None


def _line(number: int, row: Any) -> Line:
    if row is None:
        return Line(number, b"", "not UTF-8")
    # Bytes, times and decimals are nothing that a conversation holds.
    data = json.dumps(row, ensure_ascii=False, default=lambda value: None).encode()
    return lines.too_long(number) if len(data) > lines.MAX_LINE_BYTES else Line(number, data)


@contextlib.contextmanager
def _opened(filesystem: FileSystem, path: str) -> Iterator[StoredFile]:
    """The file. Inside, an error that isn't the storage's is raised as WrongType."""
    with StoredFile(filesystem, path) as source:
        try:
            yield source
        except (OSError, pa.ArrowException) as error:
            if source.error is not None:
                raise source.error from None
            raise WrongType(f"it isn't sound Parquet: {first_line(error, type(error).__name__)}") from None
