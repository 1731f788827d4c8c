"""A look at a dataset that costs the same however large it is: the head and a few places drawn at random."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from train_loop.data.lines import MAX_LINE_BYTES, Line
from train_loop.data.parts import Part, can_be_cut, groups_of, plan_parts, read_part
from train_loop.data.sources import SourceFile, explain

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

PLACES = 9  # the head and eight drawn
PLACE_BYTES = 64 << 10
ROWS_PER_PLACE = 32
SMALL_FILES = 64
MAX_COUNTED = 50_000  # rows of the beginning of a compressed file


@dataclass(frozen=True)
class Glance:
    """Some rows, blank ones left out, and how many there are in all files: estimated unless `exact`."""

    lines: list[Line]
    num_read: int
    num_rows: int
    exact: bool
    archive: SourceFile | None = None  # the zip that has all of these rows


def glance(filesystem: FileSystem, files: Sequence[SourceFile], dataset_type: str) -> Glance:
    """Look at the files; the same ones give the same rows. Raises DatasetError."""
    if dataset_type == "zip":
        return _glance_at_archives(filesystem, files)
    total = sum(f.size_bytes for f in files)
    if total <= PLACES * PLACE_BYTES and len(files) <= SMALL_FILES:
        lines, count = list[Line](), 0
        for part in plan_parts(filesystem, files, dataset_type):
            for line in _rows(filesystem, part):
                count += 1
                if len(lines) < PLACES * ROWS_PER_PLACE:
                    lines.append(line)
        return Glance(lines, count, count, True)
    drawn = random.Random(total)
    places = [0, *sorted(drawn.randrange(total) for _ in range(PLACES - 1))]
    lines, rows_seen, bytes_seen = [], 0, 0
    where = list(_found(files, places))
    heads = Counter(file for file, _ in where)  # places in a file that can't be cut are all its head
    for file, at in where:
        if dataset_type == "parquet":
            groups = groups_of(filesystem, file)
            group = len(groups) * at // file.size_bytes
            part = Part(0, 0, file, dataset_type, sum(groups[:group]), sum(groups[: group + 1]), group)
            found = list(islice(_rows(filesystem, part), ROWS_PER_PLACE)) if groups else []
            num_rows, num_bytes = sum(groups), file.size_bytes
        elif can_be_cut(file, dataset_type):
            part = Part(0, 0, file, dataset_type, at, min(at + PLACE_BYTES, file.size_bytes))
            found = list(islice(_rows(filesystem, part), ROWS_PER_PLACE))
            num_rows, num_bytes = len(found), sum(len(line.data) + 1 for line in found)
        elif (wanted := ROWS_PER_PLACE * heads.pop(file, 0)) == 0:
            continue
        else:
            found, num_rows, num_bytes = _head(filesystem, Part(0, 0, file, dataset_type, 0, file.size_bytes), wanted)
        lines += found
        rows_seen, bytes_seen = rows_seen + num_rows, bytes_seen + num_bytes
    return Glance(lines, len(lines), round(total * rows_seen / max(1, bytes_seen)), False)


def _glance_at_archives(filesystem: FileSystem, files: Sequence[SourceFile]) -> Glance:
    """The beginning of the first zip's rows: its images are at hand where it is open."""
    parts = plan_parts(filesystem, files, "zip")
    total = sum(part.end - part.start for part in parts)
    head = replace(parts[0], end=min(parts[0].end, PLACES * PLACE_BYTES))
    found = list(_rows(filesystem, head))
    exact = head.end == total
    bytes_seen = sum(len(line.data) + 1 for line in found)
    count = len(found) if exact else round(total * len(found) / max(1, bytes_seen))
    lines = found[: PLACES * ROWS_PER_PLACE]
    return Glance(lines, len(found) if exact else len(lines), count, exact, files[0])


def _found(files: Sequence[SourceFile], places: Sequence[int]) -> Iterator[tuple[SourceFile, int]]:
    """The file that each place among all bytes is in, and where in it."""
    before, at = 0, 0
    for place in places:
        while place >= before + files[at].size_bytes:
            before += files[at].size_bytes
            at += 1
        yield files[at], place - before


def _head(filesystem: FileSystem, part: Part, wanted: int) -> tuple[list[Line], int, int]:
    """`wanted` rows of the beginning of a file that can't be cut; how many it holds, in how many of the file's bytes."""
    limit = PLACE_BYTES
    while True:
        found = list(islice(_rows(filesystem, part, limit), MAX_COUNTED))
        whole = limit >= part.file.size_bytes
        if not whole and found:
            found.pop()  # cut
        if found or whole or limit > MAX_LINE_BYTES:
            return found[:wanted], len(found), min(limit, part.file.size_bytes)
        limit *= 8


def _rows(filesystem: FileSystem, part: Part, limit: int | None = None) -> Iterator[Line]:
    try:
        for line in read_part(filesystem, part, limit):
            if line.fault is not None or line.data.strip():
                yield line
    except OSError as error:
        raise explain(error, part.file.uri) from None
