"""JSONL by newline-aligned byte ranges: one large object is read in parallel, and each line exactly once.

A range owns the lines whose first byte lies in [start, end). To know whether a line starts at `start`, a reader looks at the byte
before it; its last line may run past `end`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train_loop.data.sources import SourceFile

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

RANGE_BYTES = 16 << 20
CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ByteRange:
    """Bytes [start, end) of a file; `index` orders the ranges of a dataset."""

    index: int
    file_index: int
    file: SourceFile
    start: int
    end: int


@dataclass(frozen=True)
class Line:
    """One line without its line end. `number` counts from 1 within the range, `offset` is in bytes from the file's start.

    `data` is None for a line longer than MAX_LINE_BYTES.
    """

    number: int
    offset: int
    data: bytes | None


def plan_ranges(files: Sequence[SourceFile], target_bytes: int = RANGE_BYTES) -> list[ByteRange]:
    """Cut the files into ranges of at most `target_bytes`, in file order."""
    ranges: list[ByteRange] = []
    for file_index, file in enumerate(files):
        for start in range(0, file.size_bytes, target_bytes):
            end = min(start + target_bytes, file.size_bytes)
            ranges.append(ByteRange(len(ranges), file_index, file, start, end))
    return ranges


def read_lines(filesystem: FileSystem, part: ByteRange) -> Iterator[Line]:
    """The lines that `part` owns, in order, holding one chunk and one line at a time."""
    with filesystem.open_input_file(part.file.path) as stream:
        position = max(0, part.start - 1)
        stream.seek(position)
        pending = bytearray()
        line_start = position
        skipping = part.start > 0  # up to the first line end at or after start - 1: that line belongs to the range before
        too_long = False
        number = 0
        while True:
            chunk = stream.read(CHUNK_BYTES)
            at = 0
            while (newline := chunk.find(b"\n", at)) >= 0:
                if skipping:
                    skipping = False
                else:
                    pending += chunk[at:newline]
                    number += 1
                    yield _line(number, line_start, None if too_long else bytes(pending))
                pending.clear()
                too_long = False
                at = newline + 1
                line_start = position + at
                if line_start >= part.end:
                    return
            position += len(chunk)
            if not chunk:
                if not skipping and line_start < part.end and (pending or too_long):
                    yield _line(number + 1, line_start, None if too_long else bytes(pending))
                return
            if not skipping:
                pending += chunk[at:]
                if len(pending) > MAX_LINE_BYTES:
                    pending.clear()
                    too_long = True


def _line(number: int, offset: int, data: bytes | None) -> Line:
    if data is not None:
        data = data.removesuffix(b"\r")
        if offset == 0:
            data = data.removeprefix(BOM)
    return Line(number, offset, data)
