"""The same preparation on Ray Data: byte ranges are read, parsed and written as shards by parallel tasks.

Tasks are given functions that open storage, not storage itself, so that no credential is part of a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray import cloudpickle
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from train_loop.data.jsonl import ByteRange, Line, plan_ranges, read_lines
from train_loop.data.prepare import finish, parse_lines, save_range
from train_loop.data.shards import PreparedDataset
from train_loop.data.sources import SourceFile, explain
from train_loop.spec import JobSpec
from train_loop.storage import patiently

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from train_loop.data.tokenize import ChatTokenizer

LINES = pa.schema([("range", pa.int32()), ("number", pa.int64()), ("offset", pa.int64()), ("data", pa.large_binary())])


class JsonlDatasource(Datasource):
    """The lines of JSONL objects, one read task a byte range."""

    def __init__(self, ranges: Sequence[ByteRange], open_source: Callable[[], FileSystem]) -> None:
        super().__init__()
        self._ranges = list(ranges)
        self._open_source = open_source

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all ranges."""
        return sum(part.end - part.start for part in self._ranges)

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One task a range, whatever parallelism is asked for: a range is what a shard is made of."""
        open_source = self._open_source

        def read(part: ByteRange) -> Iterable[pa.Table]:
            try:
                lines = patiently(lambda: list(read_lines(open_source(), part)), f"reading {part.file.uri}")
            except OSError as error:
                raise explain(error, part.file.uri) from None
            rows = {
                "range": [part.index] * len(lines),
                "number": [line.number for line in lines],
                "offset": [line.offset for line in lines],
                "data": [line.data for line in lines],
            }
            yield pa.table(rows, schema=LINES)

        return [
            ReadTask(
                lambda part=part: read(part),
                BlockMetadata(num_rows=None, size_bytes=part.end - part.start, input_files=[part.file.path], exec_stats=None),
                schema=LINES,
            )
            for part in self._ranges
        ]


def prepare_with_ray(
    spec: JobSpec,
    files: Sequence[SourceFile],
    *,
    open_source: Callable[[], FileSystem],
    open_storage: Callable[[], FileSystem],
    run_path: str,
    load_tokenizer: Callable[[], ChatTokenizer] | None,
    num_cpus_per_task: float,
) -> PreparedDataset:
    """Prepare in parallel; same result as `prepare_local`. Errors inside tasks, DatasetError too, come in Ray's wrappers."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    ranges = plan_ranges(files)

    def parse(table: pa.Table) -> Iterator[pa.Table]:
        if table.num_rows == 0:
            return
        part = ranges[table.column("range")[0].as_py()]
        lines = (Line(r["number"], r["offset"], r["data"]) for batch in table.to_batches() for r in batch.to_pylist())
        rows, summary = parse_lines(lines, part, spec, load_tokenizer() if load_tokenizer else None)
        summary = save_range(open_storage(), run_path, rows, summary)
        yield pa.table({"summary": pa.array([cloudpickle.dumps(summary)], pa.large_binary())})

    lines = ray.data.read_datasource(
        JsonlDatasource(ranges, open_source),
        override_num_blocks=len(ranges),
        ray_remote_args={"num_cpus": num_cpus_per_task},
    )
    # batch_size=None hands over whole blocks: one range, one shard.
    summaries = lines.map_batches(
        parse, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=num_cpus_per_task
    )
    found = [cloudpickle.loads(row["summary"]) for row in summaries.iter_rows()]
    return finish(spec, files, found, open_storage(), run_path)
