"""JSONL by newline-aligned byte ranges: one large object is read in parallel, and each line exactly once.

A range owns the lines whose first byte lies in [start, end). To know whether a line starts at `start`, a reader looks at the byte
before it; its last line may run past `end`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from train_loop.data import lines
from train_loop.data.lines import BOM, EXCERPT_BYTES, Damaged, Line


def split_lines(chunks: Iterable[bytes], start: int = 0, end: int | None = None) -> Iterator[Line]:
    """The lines of the range [start, end), in order, holding one chunk and one line at a time.

    `chunks` are the file's bytes from max(0, start - 1) on. What follows a damaged place counts as one line.
    """
    position = line_start = max(0, start - 1)
    pending = bytearray()
    skipping = start > 0  # up to the first line end at or after start - 1: that line belongs to the range before
    oversized = False
    fault: Damaged | None = None
    try:
        for chunk in chunks:
            at = 0
            while (newline := chunk.find(b"\n", at)) >= 0:
                if skipping:
                    skipping = False
                else:
                    pending += chunk[at:newline]
                    oversized = oversized or len(pending) > lines.MAX_LINE_BYTES
                    yield lines.too_long(line_start) if oversized else _line(line_start, bytes(pending))
                pending.clear()
                oversized = False
                at = newline + 1
                line_start = position + at
                if end is not None and line_start >= end:
                    return
            position += len(chunk)
            if not skipping:
                pending += chunk[at:]
                if len(pending) > lines.MAX_LINE_BYTES:
                    pending.clear()
                    oversized = True
    except Damaged as damage:
        fault = damage
    if fault is not None:
        yield Line(line_start, bytes(pending[:EXCERPT_BYTES]), fault.reason, fault.lost_from(line_start, position))
    elif not skipping and (end is None or line_start < end) and (pending or oversized):
        yield lines.too_long(line_start) if oversized else _line(line_start, bytes(pending))


def _line(offset: int, data: bytes) -> Line:
    data = data.removesuffix(b"\r")
    return Line(offset, data.removeprefix(BOM) if offset == 0 else data)
