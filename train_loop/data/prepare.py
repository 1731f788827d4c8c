"""Prepare a dataset: rows parsed, bad ones set aside with their number, the split, the index.

Each part is read in blocks, and each block is parsed, written as a shard and summed up (`prepare_part`); `finish` makes a whole
of the sums. Ray Data does the parts in parallel (`pipeline.py`), `prepare_local` one by one.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from heapq import heappop, heappush
from importlib.metadata import version
from itertools import compress, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from train_loop.data.bounds import bounded_memory
from train_loop.data.formats import Conversation, Preference, RowRejected, each, parse, preferred
from train_loop.data.gallery import Gallery
from train_loop.data.image_source import image_source, shortened
from train_loop.data.lines import Line, blocks
from train_loop.data.mistaken import mistaken_for
from train_loop.data.parts import Part, plan_parts, read_part
from train_loop.data.shards import (
    EAGER,
    IMAGES,
    LAZY,
    SPLITS,
    STREAMED,
    TOKENS,
    PreparedDataset,
    ShardInfo,
    split_bounds,
    split_place,
    token_lists,
    write_shard,
)
from train_loop.data.sources import SourceFile
from train_loop.errors import DatasetError
from train_loop.layout import REJECTED
from train_loop.scratch import scratch_folder
from train_loop.spec import FileSplit, JobSpec, RandomSplit
from train_loop.storage import list_files, patiently, read_bytes, upload_file, write_bytes

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from train_loop.data.tokenize import ChatTokenizer, Sizes

INDEX = "index.json"  # written last
EXCERPT_CHARS = 200
BATCH_BYTES = 2 << 20  # of rows that are judged together
MAX_EVAL_LINES = 10_000
NEW_OBJECTS = 20_000  # after so many garbage is looked for, Python's own number being 700
MAX_ROWS_WITH_IMAGES = 2_000  # of a block, whose images are one file
MAX_VALUES = 4_000_000  # of a row; prose of MAX_LINE_BYTES has fewer commas
# Rejected rows that are listed, of a block and in all: files that are all wrong mustn't fill the memory.
MAX_LISTED = 1_000
MAX_LISTED_IN_ALL = 100_000
LAYOUT = 3  # of shards and index; part of the key
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
TRAIN_PLACE, EVAL_PLACE = 0.25, 0.75  # of rows whose file says which split they are of


@dataclass(frozen=True)
class Reject:
    """A row that isn't used; `line` counts from 1 within its block."""

    line: int
    reason: str
    excerpt: str


@dataclass(frozen=True)
class BlockSummary:
    """What came of one block of a part. `lines` and `places` describe the good rows, in order."""

    part: int
    block: int
    file_index: int
    num_lines: int  # with blank ones: what line numbers count
    num_blank: int
    num_rejected: int
    lines: np.ndarray
    places: np.ndarray
    rejects: list[Reject]  # the first ones
    sha256: bytes
    lost: float = 0.0  # share of the file from here on, where it breaks off
    shard: ShardInfo | None = None
    num_preferences: int = 0  # good rows with a rejected answer, which is left out


def parse_block(
    lines: Sequence[Line], part: Part, block: int, spec: JobSpec, chat: ChatTokenizer, gallery: Gallery | None = None
) -> tuple[pa.Table, BlockSummary]:
    """Parse a block's lines into a table of good rows and a summary without shard.

    `chat` judges which are good, the same ones whether it makes their tokens now or leaves that to the workers. Of a streamed
    dataset the table says only where the rows are. `gallery` is given the rows' images, where they may have some; then this may
    raise OSError while the storage is away.
    """
    pre = spec.dataset_config.preprocessing
    schema = STREAMED if pre.streaming else LAZY if pre.lazy_tokenize else EAGER
    if gallery is not None:
        schema = schema.append(IMAGES)
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    rejects: list[Reject] = []
    digest = hashlib.sha256()
    number = blank = rejected = preferences = 0
    # Of the images one row's are held at a time.
    for some in blocks(lines, BATCH_BYTES) if gallery is None else blocks(lines, BATCH_BYTES, 1):
        for line, row in zip(some, _judged(some, spec, chat, gallery), strict=True):
            number += 1
            digest.update(line.data)
            digest.update(b"\n")
            if row is None:
                blank += 1
            elif isinstance(row, RowRejected):
                rejected += 1
                if rejected <= MAX_LISTED:
                    excerpt = line.data[: 4 * EXCERPT_CHARS].decode(errors="replace")[:EXCERPT_CHARS]
                    rejects.append(Reject(number, row.reason, excerpt))
            else:
                preferences += row.is_preference
                columns["file"].append(part.file_index)
                columns["offset"].append(line.offset)
                columns["line"].append(number)
                columns["u"].append(place_of(spec, part.file, line.offset))
                for name, value in row.columns.items():
                    columns[name].append(value)
    if gallery is not None:
        digest.update(gallery.sha256)
    # Arrow would make an object of Python of each token.
    tokens = {name: token_lists(columns[name]) for name in TOKENS if name in columns}
    table = pa.table(columns | tokens, schema=schema)
    return table, BlockSummary(
        part=part.index,
        block=block,
        file_index=part.file_index,
        num_lines=len(lines),
        num_blank=blank,
        num_rejected=rejected,
        lines=np.array(columns["line"], np.int64),
        places=np.array(columns["u"], np.float64),
        rejects=rejects,
        sha256=digest.digest(),
        lost=max((line.lost for line in lines), default=0.0),
        num_preferences=preferences,
    )


def _stored(conversation: Conversation) -> str:
    """As JSON, without the bytes of images."""
    if "images" in conversation:
        conversation = conversation | {"images": [shortened(reference) for reference in conversation["images"]]}
    return json.dumps(conversation, ensure_ascii=False)


@dataclass(frozen=True)
class _Good:
    """A row to train on: what the shard says of it besides its place."""

    columns: dict[str, Any]
    is_preference: bool


def _judged(
    lines: Sequence[Line], spec: JobSpec, chat: ChatTokenizer, gallery: Gallery | None
) -> Iterator[_Good | RowRejected | None]:
    """Of each line, the row or why it is rejected; None where there is none."""
    pre, dataset_format = spec.dataset_config.preprocessing, spec.dataset_details.dataset_format
    there = [line.fault is not None or bool(line.data.strip()) for line in lines]

    def parsed_from(line: Line) -> Conversation | Preference:
        return parse(decode_row(line), dataset_format, vision=gallery is not None)

    def sized_from(row: Any) -> tuple[Conversation, Sizes]:
        conversation = preferred(row)
        return conversation, gallery.sizes(conversation.get("images", [])) if gallery is not None else []

    parsed = each(parsed_from, compress(lines, there))
    sized = each(sized_from, parsed)
    verdicts: list[Any] = each(lambda row: chat.check(*row), sized) if pre.lazy_tokenize else chat.encode_each(sized)
    rows = zip(parsed, sized, verdicts, strict=True)
    for line, is_there in zip(lines, there, strict=True):
        if not is_there:
            yield None
            continue
        row, asked, verdict = next(rows)
        if isinstance(verdict, RowRejected) or isinstance(asked, RowRejected):
            yield verdict
            continue
        conversation, _ = asked
        images = conversation.get("images", [])
        columns: dict[str, Any]
        if pre.streaming:
            columns = {"size": len(line.data)}
        elif pre.lazy_tokenize:
            columns = {"conversation": _stored(conversation)}
        else:
            columns = {"input_ids": verdict.input_ids, "labels": verdict.labels}
            images = [images[i] for i in verdict.images]
        if gallery is not None:
            columns["images"] = gallery.add(images)
        yield _Good(columns, isinstance(row, Preference))


def place_of(spec: JobSpec, file: SourceFile, offset: int) -> float:
    """Where in [0, 1) the split finds the row."""
    if isinstance(spec.dataset_config.split, FileSplit):
        return EVAL_PLACE if file.is_eval else TRAIN_PLACE
    return split_place(spec.train_config.hyperparameters.seed, file.name, offset)


def decode_row(line: Line) -> Any:
    """One row's JSON. Raises RowRejected."""
    if line.fault is not None:
        raise RowRejected(line.fault)
    # Each becomes an object of Python: 64 MiB of empty lists would be 1.5 GB.
    if len(line.data) > MAX_VALUES and sum(line.data.count(sign) for sign in (b",", b"[", b"{")) > MAX_VALUES:
        raise RowRejected(f"more than {MAX_VALUES:,} values")
    try:
        row = json.loads(line.data.decode())
        if SURROGATE.search(line.data):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise RowRejected("not UTF-8") from None
    except UnicodeEncodeError:
        raise RowRejected("a \\u escape is half of a character (an unpaired surrogate)") from None
    except json.JSONDecodeError as error:
        raise RowRejected(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RowRejected("nested too deeply") from None
    except ValueError:  # Python's limit, against the quadratic time of reading them
        raise RowRejected("a number of more than 4300 digits") from None
    return row


def _first_lines(ordered: Sequence[BlockSummary]) -> list[int]:
    """Lines of the same file before each block."""
    seen: dict[int, int] = {}
    starts = []
    for s in ordered:
        starts.append(seen.get(s.file_index, 0))
        seen[s.file_index] = starts[-1] + s.num_lines
    return starts


def with_first_rejects(summaries: Iterable[BlockSummary]) -> list[BlockSummary]:
    """The summaries in order, with the first MAX_LISTED_IN_ALL rejects of all; never more of them are held, however they come."""
    kept: dict[tuple[int, int], BlockSummary] = {}
    last_first: list[tuple[int, int]] = []  # blocks with rejects
    listed = 0
    for summary in summaries:
        kept[summary.part, summary.block] = summary
        if summary.rejects:
            heappush(last_first, (-summary.part, -summary.block))
        listed += len(summary.rejects)
        while listed > MAX_LISTED_IN_ALL:
            part, block = last_first[0]
            last = kept[-part, -block]
            left = last.rejects[: max(0, len(last.rejects) - (listed - MAX_LISTED_IN_ALL))]
            listed -= len(last.rejects) - len(left)
            kept[-part, -block] = replace(last, rejects=left)
            if not left:
                heappop(last_first)
    return [kept[key] for key in sorted(kept)]


def rejected_lines(files: Sequence[SourceFile], ordered: Sequence[BlockSummary]) -> list[dict[str, Any]]:
    """The rejected lines with their 1-based numbers in the file."""
    return [
        {"file": files[s.file_index].uri, "line": start + r.line, "reason": r.reason, "excerpt": r.excerpt}
        for s, start in zip(ordered, _first_lines(ordered), strict=True)
        for r in s.rejects
    ]


def assemble(
    spec: JobSpec, files: Sequence[SourceFile], ordered: Sequence[BlockSummary], rejected: list[dict[str, Any]]
) -> PreparedDataset:
    """The index of the whole, from the summaries in order.

    Raises DatasetError when no row is usable or more than max_reject_ratio are not.
    """
    _check_rejects(spec, files, ordered, rejected)
    starts = _first_lines(ordered)
    line_numbers = [start + s.lines for s, start in zip(ordered, starts, strict=True)]
    digest = hashlib.sha256(b"".join(s.sha256 for s in ordered))

    split = spec.dataset_config.split
    places = np.concatenate([s.places for s in ordered])
    ratios = split.ratios if isinstance(split, RandomSplit) else [0.5, 0.5] if isinstance(split, FileSplit) else [1.0]
    bounds = split_bounds(ratios, places) if isinstance(split, RandomSplit) else list(np.cumsum(ratios))
    which = np.searchsorted(bounds, places, side="right")
    eval_lines = np.concatenate(line_numbers)[which == SPLITS.index("eval")]
    return PreparedDataset(
        key=preparation_key(spec, files),
        shards=[replace(s.shard, lines_before=start) for s, start in zip(ordered, starts, strict=True) if s.shard is not None],
        bounds=bounds,
        counts={name: int((which == i).sum()) for i, name in enumerate(SPLITS[: len(ratios)])},
        num_lines=sum(s.num_lines - s.num_blank for s in ordered),
        num_rows=len(places),
        num_rejected=sum(s.num_rejected for s in ordered),
        sha256=digest.hexdigest(),
        files=list(files),
        eager=not spec.dataset_config.preprocessing.lazy_tokenize,
        eval_lines=eval_lines[:MAX_EVAL_LINES].tolist(),
        num_preferences=sum(s.num_preferences for s in ordered),
    )


def _check_rejects(
    spec: JobSpec, files: Sequence[SourceFile], ordered: Sequence[BlockSummary], rejected: list[dict[str, Any]]
) -> None:
    """Raise DatasetError when the files to train on, or those to evaluate on, have no usable row, or all have too many others."""
    kind = "line" if spec.dataset_details.dataset_type in ("jsonl", "zip") else "row"
    for is_eval in sorted({f.is_eval for f in files}):
        mine = [s for s in ordered if files[s.file_index].is_eval is is_eval]
        split, field = spec.dataset_config.split, "dataset_details.dataset_path"
        uri = spec.dataset_details.dataset_path
        if is_eval and isinstance(split, FileSplit):
            uri, field = split.eval_path, "dataset_config.split.eval_path"
        if not any(s.num_lines - s.num_blank for s in mine):
            raise DatasetError(f"{uri} has no rows, only blank lines.", field=field, code="dataset_empty")
        if not any(len(s.lines) for s in mine):
            details, named = spec.dataset_details, {f.uri for f in files if f.is_eval is is_eval}
            bad = [r for r in rejected if r["file"] in named]
            wrong = mistaken_for(bad[0]["excerpt"], bad[0]["reason"], details.dataset_type) if bad else None
            hint, blamed = wrong or ("", "dataset_details.dataset_format")
            raise DatasetError(
                f"no usable row in {uri} (dataset_format {details.dataset_format}): {_first_reasons(bad, kind)}. {hint}".rstrip(),
                field=field if is_eval and wrong else blamed,
                code="no_usable_rows",
            )
    num_rejected, num_rows = sum(s.num_rejected for s in ordered), sum(s.num_lines - s.num_blank for s in ordered)
    limit, lost = spec.dataset_config.preprocessing.max_reject_ratio, sum(_rows_lost(ordered).values())
    if num_rejected + lost > limit * (num_rows + lost):
        tail = f", and about {lost} more are lost" if lost else ""
        raise DatasetError(
            f"{num_rejected} of {num_rows} rows of {spec.dataset_details.dataset_path} can't be used "
            f"({_first_reasons(rejected, kind)}){tail}, more than "
            f"dataset_config.preprocessing.max_reject_ratio = {limit:g} allows: mend the rows or raise it.",
            field="dataset_config.preprocessing.max_reject_ratio",
            code="too_many_rejects",
        )


def _rows_lost(ordered: Sequence[BlockSummary]) -> dict[int, int]:
    """By file, about how many rows are lost where it breaks off, besides the one that is rejected for it: as many to a byte as
    before."""
    rows: Counter[int] = Counter()
    for s in ordered:
        rows[s.file_index] += s.num_lines - s.num_blank
    return {s.file_index: max(0, round((rows[s.file_index] - 1) * s.lost / (1 - s.lost)) - 1) for s in ordered if 0 < s.lost < 1}


def _first_reasons(rejected: list[dict[str, Any]], kind: str) -> str:
    several = len({r["file"] for r in rejected}) > 1
    shown = [(f"{kind} {r['line']}" + (f" of {r['file']}" if several else ""), r["reason"]) for r in rejected[:3]]
    return "; ".join(f"{where}: {reason}" for where, reason in shown)


def prepare_part(
    spec: JobSpec, source: FileSystem, part: Part, chat: ChatTokenizer, storage: FileSystem, run_path: str
) -> list[BlockSummary]:
    """Write a part's rows as shards, one a block, and their images; the summaries name them. Again is the same.

    Raises DatasetError, and RunFault while the storage is away for too long.
    """
    done: list[BlockSummary] = []

    def go_on() -> None:
        # After an outage the part is read again, up to where it was.
        if part.dataset_type == "zip":
            with image_source(spec, source, part.file) as images, scratch_folder() as scratch:
                rows = read_part(source, part, archive=images.archive)
                for lines in islice(blocks(rows, part.block_bytes, MAX_ROWS_WITH_IMAGES), len(done), None):
                    gallery = Gallery(images, scratch / "images.arrow")
                    table, summary = parse_block(lines, part, len(done), spec, chat, gallery)
                    done.append(_save(storage, run_path, table, summary, gallery))
            return
        for lines in islice(blocks(read_part(source, part), part.block_bytes), len(done), None):
            table, summary = parse_block(lines, part, len(done), spec, chat)
            done.append(_save(storage, run_path, table, summary))

    with bounded_memory(), _left_alone():
        patiently(go_on, f"reading {part.file.uri}")
    return done


@contextlib.contextmanager
def _left_alone() -> Iterator[None]:
    """Inside, Python seldom looks for garbage, and only in what was made inside: of a process with torch it takes a sixth of the
    time."""
    thresholds = gc.get_threshold()
    if gc.get_freeze_count():  # for good
        yield
        return
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.collect()
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _save(
    storage: FileSystem, run_path: str, table: pa.Table, summary: BlockSummary, gallery: Gallery | None = None
) -> BlockSummary:
    if table.num_rows == 0:
        return summary
    place = f"{summary.part:05d}-{summary.block:05d}.arrow"
    info = ShardInfo(f"shard-{place}", table.num_rows)
    if gallery is not None and len(gallery):
        gallery.close()
        info = replace(info, images=f"images-{place}")
        upload_file(gallery.file, storage, f"{run_path}/data/{info.images}")
    write_shard(storage, f"{run_path}/data/{info.path}", table)
    return replace(summary, shard=info)


def finish(
    spec: JobSpec, files: Sequence[SourceFile], summaries: Iterable[BlockSummary], storage: FileSystem, run_path: str
) -> PreparedDataset:
    """Write rejected.jsonl, assemble, and write data/index.json into the run's folder. Raises DatasetError."""
    ordered = with_first_rejects(summaries)
    rejected = rejected_lines(files, ordered)
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected)
    if more := sum(s.num_rejected for s in ordered) - len(rejected):
        lines += json.dumps({"more": more}) + "\n"
    write_bytes(storage, f"{run_path}/{REJECTED}", lines.encode(errors="replace"))
    prepared = assemble(spec, files, ordered, rejected)
    write_bytes(storage, f"{run_path}/data/{INDEX}", prepared.to_json().encode())
    return prepared


def preparation_key(spec: JobSpec, files: Sequence[SourceFile]) -> str:
    """What a prepared dataset depends on: the rows, how they are read and judged, and this code's version."""
    depends_on = {
        "dataset_config": spec.dataset_config.model_dump(mode="json"),
        "layout": LAYOUT,
        "dataset_type": spec.dataset_details.dataset_type,
        "dataset_format": spec.dataset_details.dataset_format,
        "base_model": [spec.model_details.base_model, spec.model_details.revision],
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
    whole = prepared.key == preparation_key(spec, files) and all(path in there for path in prepared.paths)
    return prepared if whole else None


def prepare_local(
    spec: JobSpec,
    source: FileSystem,
    files: Sequence[SourceFile],
    storage: FileSystem,
    run_path: str,
    chat: ChatTokenizer,
) -> PreparedDataset:
    """Prepare part by part in this process. Raises DatasetError."""
    summaries: list[BlockSummary] = []
    for part in plan_parts(source, files, spec.dataset_details.dataset_type):
        summaries += prepare_part(spec, source, part, chat, storage, run_path)
    return finish(spec, files, summaries, storage, run_path)
