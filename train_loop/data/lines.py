"""One row's text, whatever kind of file it came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
EXCERPT_BYTES = 800
BLOCK_ROWS = 20_000
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """A line without its end, an element of a JSON array, or a Parquet row as JSON.

    `offset` is where it starts in its file's bytes (of a compressed file: the decompressed ones), of Parquet the row's number
    from 0.
    `fault` says why there is nothing to parse; `data` is then at most how it begins. `lost` is the share of the file's bytes that
    aren't read for it: from here on to the end.
    """

    offset: int
    data: bytes
    fault: str | None = None
    lost: float = 0.0


class Damaged(Exception):
    """The rest of this file can't be read; `reason` says why, in a few words, `lost` which share of its bytes that is."""

    def __init__(self, reason: str, lost: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lost = lost

    def lost_from(self, begin: int, end: int) -> float:
        """The share of the file that isn't read, when of its text up to `end`, where it breaks off, rows end at `begin`."""
        return 1 - (1 - self.lost) * begin / max(1, end)


class WrongType(Exception):
    """This file isn't of the type that was said; `reason` says how it is seen."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def too_long(offset: int) -> Line:
    """What stands for a row that would fill the memory."""
    return Line(offset, b"", f"the row is longer than {MAX_LINE_BYTES >> 20} MiB")


def blocks(lines: Iterable[Line], max_bytes: int, max_rows: int = BLOCK_ROWS) -> Iterator[list[Line]]:
    """The lines in lists of about `max_bytes` and at most `max_rows`: what is held in memory at a time."""
    block: list[Line] = []
    size = 0
    for line in lines:
        block.append(line)
        size += len(line.data)
        if size >= max_bytes or len(block) >= max_rows:
            yield block
            block, size = [], 0
    if block:
        yield block
