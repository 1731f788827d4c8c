"""Prepared rows as Arrow IPC files in the run's `data/` folder, memory-mapped by workers.

Columns: `file`, `offset` and `line` (which line this was; `line` counts from 1 within the shard's block), `u` in [0, 1) (its
place in the split), and `conversation` (JSON; tokenised by the workers), `input_ids` and `labels` (tokenised already), or of a
streamed dataset `size`, in bytes: what the row holds is read from there. Rows of a zip have `images` besides: numbers of those
that they show among the images of their block (`gallery.py`).
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from train_loop.data.formats import Conversation
from train_loop.data.images import Picture
from train_loop.data.sources import SourceFile
from train_loop.data.tokenize import Sample
from train_loop.storage import download_file, write_bytes

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from train_loop.data.streaming import RowReader

SPLITS = ("train", "eval", "test")
BYTES_PER_IMAGE = 1024  # about: models make from 64 to 1000 tokens of one
PLACE = [("file", pa.int32()), ("offset", pa.int64()), ("line", pa.int64()), ("u", pa.float64())]
LAZY = pa.schema([*PLACE, ("conversation", pa.string())])
TOKENS = ("input_ids", "labels")
EAGER = pa.schema([*PLACE, *((name, pa.large_list(pa.int32())) for name in TOKENS)])
IMAGES = pa.field("images", pa.list_(pa.int32()))
STREAMED = pa.schema([*PLACE, ("size", pa.int64())])


def split_place(seed: int, file: str, offset: int) -> float:
    """A row's place in [0, 1): a hash of seed and position, so that rows and files added later move nothing.

    `file` is its name in the dataset ("" where that is one file), `offset` the row's as `Line` has it.
    """
    digest = hashlib.blake2b(f"{seed}:{file}:{offset}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_bounds(ratios: Sequence[float], places: np.ndarray) -> list[float]:
    """Upper bounds on `u` for each split. A split with a share but no row gets the nearest one, if there are rows enough.

    `places` are the rows' `u`, in any order.
    """
    wanted = [int(r > 0) for r in ratios]
    if len(places) < sum(wanted):
        return [1.0] * len(ratios)  # too few to share: all are trained on
    ordered = np.sort(places)
    bounds = np.cumsum(ratios)
    bounds[-1] = 1.0
    cuts = np.searchsorted(ordered, bounds, side="left")
    cuts[-1] = len(ordered)
    for i in range(len(cuts) - 1):
        low = (cuts[i - 1] if i else 0) + wanted[i]
        cuts[i] = min(max(cuts[i], low), len(ordered) - sum(wanted[i + 1 :]))
    return [float(ordered[c]) if c < len(ordered) else 1.0 for c in cuts[:-1]] + [1.0]


@dataclass(frozen=True)
class ShardInfo:
    """One Arrow file, and that of its rows' images where they have some; the paths are relative to the data folder."""

    path: str
    num_rows: int
    lines_before: int = 0  # lines of the file before its first one
    images: str | None = None


@dataclass(frozen=True)
class PreparedDataset:
    """The index of a prepared dataset."""

    key: str  # of what it was prepared from
    shards: list[ShardInfo]
    bounds: list[float]  # upper bound on u per split, in the order of SPLITS
    counts: dict[str, int]  # rows per split
    num_lines: int  # lines that aren't blank
    num_rows: int
    num_rejected: int
    sha256: str  # of the rows' bytes and their images', block by block
    files: list[SourceFile]
    eager: bool
    eval_lines: list[int]  # 1-based numbers of the eval rows' lines, the first 10,000
    num_preferences: int  # rows with a rejected answer, which is left out

    @property
    def paths(self) -> list[str]:
        """All its files, relative to the data folder."""
        return [path for shard in self.shards for path in (shard.path, shard.images) if path is not None]

    def to_json(self) -> str:
        """For index.json."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PreparedDataset:
        """Read index.json."""
        data: dict[str, Any] = json.loads(text)
        data["shards"] = [ShardInfo(**s) for s in data["shards"]]
        data["files"] = [SourceFile(**f) for f in data["files"]]
        return cls(**data)


def token_lists(rows: Sequence[np.ndarray]) -> pa.LargeListArray:
    """A column of EAGER: of each row `[n]`, int32."""
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return pa.LargeListArray.from_arrays(np.append(0, ends), np.concatenate([np.empty(0, np.int32), *rows]))


def write_shard(storage: FileSystem, path: str, table: pa.Table) -> None:
    """Write `table` as one Arrow IPC file."""
    whole = pa.BufferOutputStream()
    with pa.ipc.new_file(whole, table.schema) as writer:
        writer.write_table(table)
    write_bytes(storage, path, whole.getvalue())


def fetch_shards(prepared: PreparedDataset, storage: FileSystem, data_path: str, cache: Path) -> Path:
    """The local folder with the shards under `data_path`: `cache`, into which they are copied, unless they are on this machine's
    disk."""
    from pyarrow.fs import LocalFileSystem

    if isinstance(storage, LocalFileSystem):
        return Path(data_path)
    cache.mkdir(parents=True, exist_ok=True)
    for path in prepared.paths:
        download_file(storage, f"{data_path}/{path}", cache / path)
    return cache


class ShardSet:
    """Random access to prepared rows by row number, in shard order.

    `folder` has the shards; `rows` reads what those of a streamed dataset only point to.
    """

    def __init__(self, prepared: PreparedDataset, folder: Path, rows: RowReader | None = None) -> None:
        self._prepared = prepared
        self._rows = rows
        self._tables = [_mapped(folder / s.path) for s in prepared.shards]
        self._images = [None if s.images is None else _mapped(folder / s.images) for s in prepared.shards]
        self._ends = list(accumulate(s.num_rows for s in prepared.shards))
        u = [t.column("u").to_numpy() for t in self._tables]
        self._split = np.searchsorted(prepared.bounds, np.concatenate(u) if u else np.empty(0), side="right")

    @property
    def streamed(self) -> bool:
        """Whether the rows are read from the dataset."""
        return self._rows is not None

    def ids(self, split: str) -> np.ndarray:
        """Row numbers of a split, ascending."""
        return np.flatnonzero(self._split == SPLITS.index(split))

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """How long each of these rows is: tokens where they were made before, else bytes of its JSON, and about as many for each
        of its images as its tokens' text would have."""
        if not self._tables:
            return np.zeros(len(rows), dtype=np.int64)
        sizes: np.ndarray = np.concatenate([_lengths(table) for table in self._tables])[rows]
        return sizes.astype(np.int64)

    def _place(self, row: int) -> tuple[int, int]:
        shard = bisect_right(self._ends, row)
        return shard, int(row) - (self._ends[shard - 1] if shard else 0)

    def _row(self, row: int) -> tuple[pa.Table, int]:
        shard, at = self._place(row)
        return self._tables[shard], at

    def source(self, row: int) -> tuple[str, int]:
        """Where the row came from: the file's URI and the line's number, from 1."""
        shard, at = self._place(row)
        table = self._tables[shard]
        line = self._prepared.shards[shard].lines_before + table.column("line")[at].as_py()
        return self._prepared.files[table.column("file")[at].as_py()].uri, line

    def conversation(self, row: int) -> Conversation:
        """The row's messages (lazy shards, and streamed ones). Raises DatasetError when a streamed row isn't there any more."""
        table, at = self._row(row)
        if self._rows is not None:
            file, offset, size = (table.column(c)[at].as_py() for c in ("file", "offset", "size"))
            return self._rows.read(self._prepared.files[file], offset, size)
        conversation: Conversation = json.loads(table.column("conversation")[at].as_py())
        return conversation

    def sample(self, row: int) -> Sample:
        """The row's tokens (eager shards)."""
        shard, at = self._place(row)
        ids, labels = (values[ends[at] : ends[at + 1]] for ends, values in self._token_lists[shard])
        num_images = 0 if self._images[shard] is None else len(self._tables[shard].column("images")[at])
        return Sample(ids, labels, tuple(range(num_images)))

    @cached_property
    def _token_lists(self) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Of each (eager) shard, of each of TOKENS: where a row's list ends and the next one's begins, and all of them."""
        # A shard is written whole, so that a column is one array.
        columns = [[table.column(name).chunk(0) for name in TOKENS] for table in self._tables]
        return [[(column.offsets.to_numpy(), column.values.to_numpy()) for column in its] for its in columns]

    def pictures(self, row: int) -> list[Picture]:
        """The row's images, in order; of one that was tokenised before, those that are left."""
        shard, at = self._place(row)
        images, table = self._images[shard], self._tables[shard]
        if images is None:
            return []
        return [
            Picture(**{name: images.column(name)[i].as_py() for name in ("data", "width", "height")})
            for i in table.column("images")[at].as_py()
        ]


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _lengths(table: pa.Table) -> Any:
    if "size" in table.column_names:
        lengths = table.column("size")
    elif "input_ids" in table.column_names:
        lengths = pc.list_value_length(table.column("input_ids"))
    else:
        lengths = pc.binary_length(table.column("conversation"))
        if "images" in table.column_names:
            lengths = pc.add(lengths, pc.multiply(pc.list_value_length(table.column("images")), BYTES_PER_IMAGE))
    return lengths.to_numpy()
