"""The images of a block's rows, each content once, as an Arrow file beside the block's shard.

Columns: `sha256`, `width`, `height` and `data`; rows name them by their number. Written in batches, so that not all of them are
held at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from train_loop.data.formats import RowRejected
from train_loop.data.images import Picture

if TYPE_CHECKING:
    from train_loop.data.image_source import ImageSource

SCHEMA = pa.schema([("sha256", pa.binary(32)), ("width", pa.int32()), ("height", pa.int32()), ("data", pa.large_binary())])
BATCH_BYTES = 8 << 20
MAX_ROW_BYTES = 256 << 20


class Gallery:
    """Takes the images of rows, one row at a time, and writes them to a local file. Close it before the file is used."""

    def __init__(self, source: ImageSource, file: Path) -> None:
        self._source, self.file = source, file
        self._looked_at: dict[bytes, Picture] = {}  # of the last row, and not written yet
        self._written: dict[bytes, tuple[int, int, int]] = {}  # by reference: number, width, height
        self._numbers: dict[bytes, int] = {}  # by content
        self._batch: list[tuple[bytes, Picture]] = []
        self._batch_bytes = 0
        self._writer: pa.RecordBatchFileWriter | None = None

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def sha256(self) -> bytes:
        """Of the contents of all of them."""
        return hashlib.sha256(b"".join(self._numbers)).digest()

    def sizes(self, references: Sequence[str]) -> list[tuple[int, int]]:
        """(width, height) of a row's images. Raises as ImageSource.picture does, RowRejected."""
        self._looked_at = {}
        sizes = []
        for reference in references:
            key = _key(reference)
            if (known := self._written.get(key)) is not None:
                sizes.append(known[1:])
                continue
            if key not in self._looked_at:
                self._looked_at[key] = self._source.picture(reference)
                if sum(len(picture.data) for picture in self._looked_at.values()) > MAX_ROW_BYTES:
                    raise RowRejected(f"its images are larger than {MAX_ROW_BYTES >> 20} MiB together")
            picture = self._looked_at[key]
            sizes.append((picture.width, picture.height))
        return sizes

    def add(self, references: Sequence[str]) -> list[int]:
        """Keep these images of the row whose sizes were asked for last; their numbers."""
        for reference in references:
            key = _key(reference)
            if key not in self._written:
                picture = self._looked_at[key]
                self._written[key] = (self._number(picture), picture.width, picture.height)
        return [self._written[_key(reference)][0] for reference in references]

    def close(self) -> None:
        """Finish the file; there is none when no image was kept."""
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def _number(self, picture: Picture) -> int:
        sha256 = hashlib.sha256(picture.data).digest()
        if sha256 not in self._numbers:
            self._numbers[sha256] = len(self._numbers)
            self._batch.append((sha256, picture))
            self._batch_bytes += len(picture.data)
            if self._batch_bytes >= BATCH_BYTES:
                self._flush()
        return self._numbers[sha256]

    def _flush(self) -> None:
        if not self._batch:
            return
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self.file), SCHEMA)
        columns = zip(*((sha256, p.width, p.height, p.data) for sha256, p in self._batch), strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        self._batch, self._batch_bytes = [], 0


def _key(reference: str) -> bytes:
    """Of a fixed length: the reference may be the image itself."""
    return hashlib.sha256(reference.encode()).digest()
