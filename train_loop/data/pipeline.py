"""The same preparation on Ray Data: a task for each part reads it, parses it and writes its shards.

What came of it, pickled, is all that Ray moves; rows go straight to storage.

Tasks are given functions that open storage, not storage itself, so that no credential is part of a plan.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import ray.data
from ray import cloudpickle
from ray.util.annotations import RayDeprecationWarning

from train_loop.allocator import keep_freed
from train_loop.data.parts import MANY_RANGES, RANGE_BYTES, plan_parts
from train_loop.data.prepare import BlockSummary, finish, prepare_part
from train_loop.data.shards import PreparedDataset
from train_loop.data.sources import SourceFile
from train_loop.spec import JobSpec

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from train_loop.data.tokenize import ChatTokenizer

SUMMARIES = pa.schema([("summaries", pa.large_binary())])
SHORT_BYTES = MANY_RANGES * RANGE_BYTES


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
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    def prepare(block: pa.Table) -> pa.Table:
        keep_freed()
        part, tokenizer = cloudpickle.loads(block["item"][0].as_py()), _tokenizer_of(run_path, load_tokenizer)
        found: list[BlockSummary] = prepare_part(spec, open_source(), part, tokenizer, open_storage(), run_path)
        return pa.table({"summaries": [cloudpickle.dumps(found)]}, schema=SUMMARIES)

    parts = plan_parts(open_source(), files, spec.dataset_details.dataset_type)
    # Ray Data starts as many tasks as there are CPUs, and hears up to 0.2 s late that one has ended (Ray 2.60). Where it believes
    # that tasks take none, all of them wait at Ray, which does count their CPUs and starts the next at once. But as long as tasks
    # wait there, no placement group gets a CPU, so a long preparation must not do that to the jobs beside it.
    counted = 0.0 if sum(file.size_bytes for file in files) <= SHORT_BYTES else num_cpus_per_task
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # of ray_remote_args_fn, which Ray 2.64 won't have
        done = ray.data.from_items(
            [cloudpickle.dumps(part) for part in parts], override_num_blocks=max(1, len(parts))
        ).map_batches(
            prepare,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=counted,
            ray_remote_args_fn=lambda: {"num_cpus": num_cpus_per_task},
        )
    found = (summary for row in done.iter_rows() for summary in cloudpickle.loads(row["summaries"]))
    return finish(spec, files, found, open_storage(), run_path)


def _tokenizer_of(run_path: str, load: Callable[[], ChatTokenizer]) -> ChatTokenizer:
    """The run's tokenizer, loaded by the first of its parts that this process prepares."""
    if run_path not in _tokenizers:
        _tokenizers.clear()
        _tokenizers[run_path] = load()
    return _tokenizers[run_path]


_tokenizers: dict[str, ChatTokenizer] = {}
