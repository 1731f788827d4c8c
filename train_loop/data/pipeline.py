"""The same preparation on Ray Data: a read task for each part reads it, parses it and writes its shards.

Tasks are given functions that open storage, not storage itself, so that no credential is part of a plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray.data
from ray import cloudpickle
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from train_loop.data.parts import Part, plan_parts
from train_loop.data.prepare import BlockSummary, finish, prepare_part
from train_loop.data.shards import PreparedDataset
from train_loop.data.sources import SourceFile
from train_loop.spec import JobSpec

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from train_loop.data.tokenize import ChatTokenizer

LOOK_S = 0.1
SUMMARIES = pa.schema([("summaries", pa.large_binary())])


class PreparedParts(Datasource):
    """What came of each part, pickled; its rows go straight to storage and not through Ray's."""

    def __init__(self, parts: Sequence[Part], prepare: Callable[[Part], list[BlockSummary]]) -> None:
        super().__init__()
        self._parts = list(parts)
        self._prepare = prepare

    def estimate_inmemory_data_size(self) -> None:
        """Summaries are small, and how small isn't known."""

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One task a part, whatever parallelism is asked for."""
        prepare = self._prepare

        def read(part: Part) -> Iterable[pa.Table]:
            yield pa.table({"summaries": [cloudpickle.dumps(prepare(part))]}, schema=SUMMARIES)

        return [
            ReadTask(
                lambda part=part: read(part),
                BlockMetadata(num_rows=1, size_bytes=None, input_files=[part.file.path], exec_stats=None),
                schema=SUMMARIES,
            )
            for part in self._parts
        ]


def prepare_with_ray(
    spec: JobSpec,
    files: Sequence[SourceFile],
    *,
    open_source: Callable[[], FileSystem],
    open_storage: Callable[[], FileSystem],
    run_path: str,
    load_tokenizer: Callable[[], ChatTokenizer],
    num_cpus_per_task: float,
) -> PreparedDataset:
    """Prepare in parallel; same result as `prepare_local`. Errors inside tasks, DatasetError too, come in Ray's wrappers."""
    _look_again_soon()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    def prepare(part: Part) -> list[BlockSummary]:
        return prepare_part(spec, open_source(), part, _tokenizer_of(run_path, load_tokenizer), open_storage(), run_path)

    parts = plan_parts(open_source(), files, spec.dataset_details.dataset_type)
    done = ray.data.read_datasource(
        PreparedParts(parts, prepare), override_num_blocks=len(parts), ray_remote_args={"num_cpus": num_cpus_per_task}
    )
    found = (summary for row in done.iter_rows() for summary in cloudpickle.loads(row["summaries"]))
    return finish(spec, files, found, open_storage(), run_path)


def _look_again_soon() -> None:
    """Have Ray Data ask again soon what the cluster has.

    It doesn't wait for the first answer, and until it asks again, a second later, it runs one task at a time (Ray 2.60, where
    that is no setting).
    """
    with contextlib.suppress(ImportError):
        from ray.data._internal.execution.resource_manager import ResourceManager

        ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = LOOK_S


def _tokenizer_of(run_path: str, load: Callable[[], ChatTokenizer]) -> ChatTokenizer:
    """The run's tokenizer, loaded by the first of its parts that this process prepares."""
    if run_path not in _tokenizers:
        _tokenizers.clear()
        _tokenizers[run_path] = load()
    return _tokenizers[run_path]


_tokenizers: dict[str, ChatTokenizer] = {}
