"""Prepare a dataset: lines to rows, bad lines set aside with their number, the split, the index.

Each byte range is parsed on its own (`parse_range`) and summed up (`assemble`); Ray Data does the first part in parallel
(`pipeline.py`), `prepare_local` one by one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from train_loop.data.formats import RowRejected, to_conversation
from train_loop.data.jsonl import MAX_LINE_BYTES, ByteRange, Line, plan_ranges, read_lines
from train_loop.data.shards import (
    EAGER,
    LAZY,
    SPLITS,
    PreparedDataset,
    ShardInfo,
    split_bounds,
    split_place,
    write_shard,
)
from train_loop.data.sources import SourceFile, explain
from train_loop.errors import DatasetError
from train_loop.spec import JobSpec, RandomSplit
from train_loop.storage import list_files, patiently, read_bytes, write_bytes

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from train_loop.data.tokenize import ChatTokenizer

INDEX = "index.json"  # written last
EXCERPT_CHARS = 200
MAX_EVAL_LINES = 10_000


@dataclass(frozen=True)
class Reject:
    """A line that isn't used; `line` counts from 1 within its range."""

    line: int
    reason: str
    excerpt: str


@dataclass(frozen=True)
class RangeSummary:
    """What came of one byte range. `lines` and `places` describe the good rows, in order."""

    index: int
    file_index: int
    num_lines: int  # with blank ones: what line numbers count
    num_blank: int
    lines: np.ndarray
    places: np.ndarray
    rejects: list[Reject]
    sha256: bytes
    shard: ShardInfo | None


def shard_name(index: int) -> str:
    """The file of a range's rows."""
    return f"shard-{index:05d}.arrow"


def parse_lines(
    lines: Iterable[Line], part: ByteRange, spec: JobSpec, chat: ChatTokenizer | None
) -> tuple[pa.Table, RangeSummary]:
    """Parse a range's lines into a table of good rows and a summary without shard. `chat` tokenises now; None leaves that
    to the workers."""
    seed = spec.train_config.hyperparameters.seed
    columns: dict[str, list[Any]] = {name: [] for name in (LAZY if chat is None else EAGER).names}
    numbers: list[int] = []
    rejects: list[Reject] = []
    digest = hashlib.sha256()
    total = blank = 0
    for line in lines:
        total += 1
        digest.update((line.data or b"") + b"\n")
        if line.data is not None and not line.data.strip():
            blank += 1
            continue
        try:
            conversation = to_conversation(decode_row(line.data), spec.dataset_details.dataset_format)
            if chat is None:
                columns["conversation"].append(json.dumps(conversation, ensure_ascii=False))
            else:
                sample = chat.encode(conversation)
                columns["input_ids"].append(sample.input_ids)
                columns["labels"].append(sample.labels)
        except RowRejected as error:
            excerpt = (line.data or b"")[: 4 * EXCERPT_CHARS].decode(errors="replace")[:EXCERPT_CHARS]
            rejects.append(Reject(line.number, error.reason, excerpt))
            continue
        columns["file"].append(part.file_index)
        columns["offset"].append(line.offset)
        columns["line"].append(line.number)
        columns["u"].append(split_place(seed, part.file_index, line.offset))
        numbers.append(line.number)
    table = pa.table(columns, schema=LAZY if chat is None else EAGER)
    places = np.array(columns["u"], dtype=np.float64)
    summary = RangeSummary(
        part.index, part.file_index, total, blank, np.array(numbers, np.int64), places, rejects, digest.digest(), None
    )
    return table, summary


def decode_row(data: bytes | None) -> Any:
    """One line's JSON. Raises RowRejected."""
    if data is None:
        raise RowRejected(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        return json.loads(data)
    except UnicodeDecodeError:
        raise RowRejected("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise RowRejected(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise RowRejected(f"not usable JSON: {type(error).__name__}") from None


def _first_lines(ordered: Sequence[RangeSummary]) -> list[int]:
    """Lines of the same file before each range."""
    seen: dict[int, int] = {}
    starts = []
    for s in ordered:
        starts.append(seen.get(s.file_index, 0))
        seen[s.file_index] = starts[-1] + s.num_lines
    return starts


def rejected_lines(files: Sequence[SourceFile], ordered: Sequence[RangeSummary]) -> list[dict[str, Any]]:
    """The rejected lines with their 1-based numbers in the file."""
    return [
        {"file": files[s.file_index].uri, "line": start + r.line, "reason": r.reason, "excerpt": r.excerpt}
        for s, start in zip(ordered, _first_lines(ordered), strict=True)
        for r in s.rejects
    ]


def assemble(
    spec: JobSpec, files: Sequence[SourceFile], ordered: Sequence[RangeSummary], rejected: list[dict[str, Any]]
) -> PreparedDataset:
    """The index of the whole, from the summaries in range order.

    Raises DatasetError when no row is usable or more than max_reject_ratio are not.
    """
    num_lines = sum(s.num_lines - s.num_blank for s in ordered)
    _check_rejects(spec, num_lines, rejected)
    starts = _first_lines(ordered)
    line_numbers = [start + s.lines for s, start in zip(ordered, starts, strict=True)]
    digest = hashlib.sha256(b"".join(s.sha256 for s in ordered))

    split = spec.dataset_config.split
    ratios = split.ratios if isinstance(split, RandomSplit) else [1.0]
    places = np.concatenate([s.places for s in ordered])
    bounds = split_bounds(ratios, places)
    which = np.searchsorted(bounds, places, side="right")
    eval_lines = np.concatenate(line_numbers)[which == SPLITS.index("eval")]
    return PreparedDataset(
        key=preparation_key(spec, files),
        shards=[replace(s.shard, lines_before=start) for s, start in zip(ordered, starts, strict=True) if s.shard is not None],
        bounds=bounds,
        counts={name: int((which == i).sum()) for i, name in enumerate(SPLITS[: len(ratios)])},
        num_lines=num_lines,
        num_rows=len(places),
        num_rejected=len(rejected),
        sha256=digest.hexdigest(),
        files=list(files),
        eager=not spec.dataset_config.preprocessing.lazy_tokenize,
        eval_lines=eval_lines[:MAX_EVAL_LINES].tolist(),
    )


def _check_rejects(spec: JobSpec, num_lines: int, rejected: list[dict[str, Any]]) -> None:
    uri = spec.dataset_details.dataset_path
    first = "; ".join(f"line {r['line']}: {r['reason']}" for r in rejected[:3])
    if num_lines == 0:
        raise DatasetError(f"{uri} has no rows, only blank lines.", field="dataset_details.dataset_path", code="dataset_empty")
    if len(rejected) == num_lines:
        raise DatasetError(
            f"no usable row in {uri} (dataset_format {spec.dataset_details.dataset_format}): {first}.",
            field="dataset_details.dataset_format",
            code="no_usable_rows",
        )
    limit = spec.dataset_config.preprocessing.max_reject_ratio
    if len(rejected) > limit * num_lines:
        raise DatasetError(
            f"{len(rejected)} of {num_lines} rows of {uri} can't be used ({first}), more than "
            f"dataset_config.preprocessing.max_reject_ratio = {limit:g} allows: mend the rows or raise it.",
            field="dataset_config.preprocessing.max_reject_ratio",
            code="too_many_rejects",
        )


def save_range(storage: FileSystem, run_path: str, table: pa.Table, summary: RangeSummary) -> RangeSummary:
    """Write a range's rows as a shard; the summary then names it. Writing it again replaces it."""
    if table.num_rows == 0:
        return summary
    info = ShardInfo(shard_name(summary.index), table.num_rows)
    write_shard(storage, f"{run_path}/data/{info.path}", table)
    return replace(summary, shard=info)


def finish(
    spec: JobSpec, files: Sequence[SourceFile], summaries: Iterable[RangeSummary], storage: FileSystem, run_path: str
) -> PreparedDataset:
    """Write rejected.jsonl, assemble, and write data/index.json into the run's folder. Raises DatasetError."""
    ordered = sorted(summaries, key=lambda s: s.index)
    rejected = rejected_lines(files, ordered)
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected)
    write_bytes(storage, f"{run_path}/rejected.jsonl", lines.encode(errors="replace"))
    prepared = assemble(spec, files, ordered, rejected)
    write_bytes(storage, f"{run_path}/data/{INDEX}", prepared.to_json().encode())
    return prepared


def preparation_key(spec: JobSpec, files: Sequence[SourceFile]) -> str:
    """What a prepared dataset depends on: the rows, how they are read, and this code's version."""
    depends_on = {
        "dataset_config": spec.dataset_config.model_dump(mode="json"),
        "dataset_format": spec.dataset_details.dataset_format,
        "base_model": spec.model_details.base_model,
        "seed": spec.train_config.hyperparameters.seed,
        "files": [asdict(f) for f in files],
        "version": version("tuneyard"),
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def prepared_before(spec: JobSpec, files: Sequence[SourceFile], storage: FileSystem, run_path: str) -> PreparedDataset | None:
    """What an earlier attempt prepared from the same rows, when all of it is there."""
    try:
        prepared = PreparedDataset.from_json(read_bytes(storage, f"{run_path}/data/{INDEX}").decode())
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or of another version
        return None
    there = list_files(storage, f"{run_path}/data")
    whole = prepared.key == preparation_key(spec, files) and all(s.path in there for s in prepared.shards)
    return prepared if whole else None


def _parse_range(source: FileSystem, part: ByteRange, spec: JobSpec, chat: ChatTokenizer | None) -> tuple[pa.Table, RangeSummary]:
    return parse_lines(read_lines(source, part), part, spec, chat)


def prepare_local(
    spec: JobSpec,
    source: FileSystem,
    files: Sequence[SourceFile],
    storage: FileSystem,
    run_path: str,
    chat: ChatTokenizer | None,
) -> PreparedDataset:
    """Prepare range by range in this process. Raises DatasetError."""
    summaries = []
    for part in plan_ranges(files):
        try:
            read = partial(_parse_range, source, part, spec, chat)
            table, summary = patiently(read, f"reading {part.file.uri}")
        except OSError as error:
            raise explain(error, part.file.uri) from None
        summaries.append(save_range(storage, run_path, table, summary))
    return finish(spec, files, summaries, storage, run_path)
