"""Rows of a streamed dataset, read from where it is when they are needed: no copy of them is kept anywhere.

The preparation reads the dataset once, sets bad rows aside and keeps each good row's place, 36 bytes. So a streamed run takes the
same rows in the same order as any other, shuffled over the whole dataset, and resumes at any step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from train_loop.data.formats import Conversation, RowRejected, to_conversation
from train_loop.data.lines import BOM, Line
from train_loop.data.prepare import decode_row
from train_loop.data.sources import SourceFile, explain
from train_loop.errors import DatasetError
from train_loop.storage import ANSWERS, is_away, patiently

if TYPE_CHECKING:
    from pyarrow import NativeFile
    from pyarrow.fs import FileSystem

MAX_OPEN_FILES = 64


class RowReader:
    """Reads single rows by byte range; threads share it.

    `open_source` gives the dataset's file system with keys that are good at that moment.
    """

    def __init__(self, open_source: Callable[[], FileSystem], dataset_format: str) -> None:
        self._open_source = open_source
        self._dataset_format = dataset_format
        self._source: FileSystem | None = None
        self._open: dict[str, NativeFile] = {}

    def read(self, file: SourceFile, offset: int, size: int) -> Conversation:
        """The row of `size` bytes at `offset`. Raises DatasetError, and RunFault while the storage is away for too long."""
        try:
            data = patiently(lambda: self._bytes(file, offset, size), f"reading {file.uri}")
        except OSError as error:
            raise explain(error, file.uri) from None
        try:
            return to_conversation(decode_row(Line(offset, data)), self._dataset_format)
        except RowRejected as error:
            raise DatasetError(
                f"{file.uri} was changed while it was trained on: where a row was at byte {offset}, now {error.reason}.",
                field="dataset_details.dataset_path",
                code="dataset_changed",
            ) from None

    def _bytes(self, file: SourceFile, offset: int, size: int) -> bytes:
        known = self._source is not None
        try:
            return self._read(file, offset, size)
        except OSError as error:
            # Keys of a role are good for an hour, and a file's name may be another file's by now.
            self._source, self._open = None, {}
            if not known or is_away(error) or (isinstance(error, ANSWERS) and not isinstance(error, PermissionError)):
                raise
        return self._read(file, offset, size)

    def _read(self, file: SourceFile, offset: int, size: int) -> bytes:
        stream = self._open.get(file.path)
        if stream is None:
            if len(self._open) >= MAX_OPEN_FILES:
                self._open = {}  # a thread that still reads from one holds it
            source = self._source = self._source or self._open_source()
            stream = self._open[file.path] = source.open_input_file(file.path)
        # A byte order mark isn't part of the first row.
        data = bytes(stream.read_at(size + len(BOM), offset))
        return data[len(BOM) :] if offset == 0 and data.startswith(BOM) else data[:size]
