"""Speed and memory of our preparation against its peer on this machine: `python -m benchmarks.prepare`.

From real ShareGPT conversations in one JSONL file to what training reads. Ours is the job's own preparation on Ray Data, and then
the packed micro-batches of an epoch, which the workers of a job make beside training. The peer is `datasets`, whose batched map
tokenises under the same chat template, and TRL's packing; on several cores at whichever setting a short probe finds faster.
Sides take turns, each time in fresh processes that may use so many cores, and have prepared some rows on each of them before the
clock starts: what is imported by then isn't counted. Memory is that of all processes of a side, what they share once, and CPU
time what all of them have used since the clock started. Memory is looked at once a second: to add up the pages of processes holds
them up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pyarrow.fs import LocalFileSystem

from benchmarks.setting import SMOLLM2, conversations, machine
from train_loop.data.formats.chat import ROLES
from train_loop.data.prepare import prepare_local
from train_loop.data.shards import PreparedDataset
from train_loop.data.sources import SourceFile, find_files
from train_loop.data.tokenize import IGNORE_INDEX, ChatTokenizer
from train_loop.model.tokenizer import TextTokenizer, load_tokenizer
from train_loop.spec import JobSpec

MAX_LENGTH = 1024
CORES = sorted(os.sched_getaffinity(0))
WARM_UP_ROWS = 200
PROBED = 0.1  # of the rows
SAMPLE_S = 1.0
TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
# The same text with the marks that transformers needs to tell the assistant's tokens.
MARKED_TURN = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}{{'\n'}}"
)


@dataclass(frozen=True)
class Task:
    """What the process of a side is told."""

    side: str  # ours, or datasets + TRL
    cores: int
    rows: str  # JSONL file
    warm_up: str  # folder of JSONL files
    model: str  # folder of the base
    num_proc: int | None = None  # of the peer's maps; None is in its own process
    rayon: bool = False  # whether its tokenizer uses several threads
    ray: bool = True  # ours: or in its own process


def write_rows(path: Path, num_bytes: float) -> None:
    """Real conversations until they are `num_bytes`."""
    with path.open("w") as out:
        for row in conversations():
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            if out.tell() >= num_bytes:
                return


def job_of(rows: str) -> JobSpec:
    """The job that trains on the rows, packed."""
    return JobSpec.model_validate(
        {
            "org": "0bf00b43-430a-4ca3-a8b3-b13cc8dc6d4f",
            "experiment_name": "prepare",
            "dataset_config": {
                "preprocessing": {"prompt": {"max_length": MAX_LENGTH}, "lazy_tokenize": False, "max_reject_ratio": 0.5},
                "split": {"type": "none"},
            },
            "model_details": {"base_model": SMOLLM2},
            "dataset_details": {"dataset_path": rows, "source_type": "local", "ownership": "public"},
            "infra_config": {"gpu_type": "cpu"},
        }
    )


Stages = dict[str, float]  # seconds by name


@contextlib.contextmanager
def timed(stages: Stages, name: str) -> Iterator[None]:
    """Note how long it takes."""
    started = time.monotonic()
    yield
    stages[name] = time.monotonic() - started


def on_ray_with(task: Task, chat: ChatTokenizer) -> Callable[[JobSpec, Sequence[SourceFile], str], PreparedDataset]:
    """The job's own preparation on Ray, which is started if it isn't yet."""
    import ray

    from train_loop.data.pipeline import prepare_with_ray

    if not ray.is_initialized():
        ray.init("local", num_cpus=task.cores, include_dashboard=False, log_to_driver=False, logging_level="error")
    shared = ray.put(chat)
    return lambda spec, files, folder: prepare_with_ray(
        spec,
        files,
        open_source=LocalFileSystem,
        open_storage=LocalFileSystem,
        run_path=folder,
        load_tokenizer=lambda: ray.get(shared),
        num_cpus_per_task=1,
    )


def ours(task: Task, rows: str, folder: str) -> tuple[Stages, dict[str, int]]:
    """What a job does before its first step, and what its workers do with the result."""
    from train_loop.data.loader import Collator, step_batches
    from train_loop.data.sampler import BatchPlan
    from train_loop.data.shards import ShardSet

    spec, stages, local = job_of(rows), Stages(), LocalFileSystem()
    tokenizer = load_tokenizer(Path(task.model))
    chat = ChatTokenizer.of(spec, TextTokenizer.of(tokenizer))
    on_ray = on_ray_with(task, chat) if task.ray else None
    with timed(stages, "tokens"):
        files = find_files(spec, local)
        prepared = on_ray(spec, files, folder) if on_ray else prepare_local(spec, local, files, local, folder, chat)
    tokens = supervised = sequences = 0
    with timed(stages, "packing"):
        shards, hp = ShardSet(prepared, Path(folder, "data")), spec.train_config.hyperparameters
        ids, collator = shards.ids("train"), Collator(None, MAX_LENGTH, MAX_LENGTH, tokenizer.pad_token_id)
        plan = BatchPlan(len(ids), hp.per_device_train_batch_size, 1, 1, 1, None, hp.seed)
        for _, batches in step_batches(shards, ids, plan, 0, 1, collator, num_workers=0, start_step=1):
            for batch in batches:
                tokens += batch.num_tokens
                supervised += batch.num_supervised
                sequences += len(batch.input_ids)
    return stages, {"rows": prepared.num_rows, "tokens": tokens, "supervised": supervised, "sequences": sequences}


def messages_of(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """A conversation by the rules of our preparation, as far as these rows need them; empty where it isn't used."""
    said = [(ROLES[turn["from"]], turn["value"]) for turn in turns]
    asked = next((i for i, (role, _) in enumerate(said) if role == "user"), len(said))
    said = [turn for i, turn in enumerate(said) if i >= asked or turn[0] == "system"]
    if any(role == "assistant" and not text.strip() for role, text in said):
        return []
    messages = [
        {"role": role, "content": "\n\n".join(text for _, text in group if text)}
        for role, group in groupby(said, lambda turn: turn[0])
    ]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return [] if any(m["role"] == "system" for m in messages[1:]) else messages


def peer(task: Task, rows: str, folder: str) -> tuple[Stages, dict[str, int]]:
    """What users of `datasets` write, at its best: batches, arrays instead of lists, no token that packing would cut off."""
    import pyarrow.compute as pc
    from datasets import load_dataset
    from trl import pack_dataset

    tokenizer = load_tokenizer(Path(task.model))
    template = tokenizer.chat_template.replace(TURN, MARKED_TURN)

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[np.ndarray]]:
        encoded = tokenizer.apply_chat_template(
            [messages for turns in batch["conversations"] if (messages := messages_of(turns))],
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            truncation=True,
            max_length=MAX_LENGTH,
        )
        found = [
            (np.array(ids, np.int32), np.array(spoken, bool))
            for ids, spoken in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
            if any(spoken[1:])
        ]
        labels = [np.where(spoken, ids, IGNORE_INDEX).astype(np.int32) for ids, spoken in found]
        return {"input_ids": [ids for ids, _ in found], "labels": labels}

    stages = Stages()
    with timed(stages, "reading"):
        files = [str(path) for path in Path(rows).glob("*.jsonl")] if Path(rows).is_dir() else rows
        dataset = load_dataset("json", data_files=files, split="train", cache_dir=folder)
    with timed(stages, "tokens"):
        dataset = dataset.map(tokenise, batched=True, remove_columns=dataset.column_names, num_proc=task.num_proc)
    with timed(stages, "packing"):
        packed = pack_dataset(dataset, MAX_LENGTH, "bfd", {"num_proc": task.num_proc})
    labels = pc.list_flatten(packed.data.column("labels"))
    return stages, {
        "rows": len(dataset),
        "tokens": len(labels),
        "supervised": pc.sum(pc.not_equal(labels, IGNORE_INDEX)).as_py(),
        "sequences": len(packed),
    }


SIDES: dict[str, Callable[[Task, str, str], tuple[Stages, dict[str, int]]]] = {"ours": ours, "datasets + TRL": peer}


def be(task: Task) -> None:
    """Be a side: warm up, say when the clock starts, say what was done."""
    os.sched_setaffinity(0, CORES[: task.cores])
    side, root = SIDES[task.side], psutil.Process()
    with tempfile.TemporaryDirectory(dir=Path(task.rows).parent) as folder:
        side(task, task.warm_up, f"{folder}/before")
        used = cpu_s(root)
        print(json.dumps({"began": time.monotonic()}), flush=True)
        stages, done = side(task, task.rows, f"{folder}/run")
        print(json.dumps({"ended": time.monotonic(), "cpu_s": cpu_s(root) - used, "stages": stages, **done}), flush=True)


def members(root: psutil.Process) -> list[psutil.Process]:
    """A process and its descendants."""
    return [root, *root.children(recursive=True)]


def cpu_s(root: psutil.Process) -> float:
    """What a process and its descendants have used, those that have ended too."""
    used = 0.0
    for process in members(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            used += sum(process.cpu_times()[:4])
    return used


def held_bytes(root: psutil.Process) -> int:
    """What they hold, what they share once."""
    held = 0
    for process in members(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            held += process.memory_full_info().pss
    return held


def run(task: Task) -> dict[str, Any]:
    """One turn of a side."""
    threads = {"OMP_NUM_THREADS": str(task.cores), "RAYON_NUM_THREADS": str(task.cores)}
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": str(task.rayon).lower()}
    command = [sys.executable, "-m", "benchmarks.prepare", "--side", json.dumps(asdict(task))]
    samples: list[tuple[float, int]] = []
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=os.environ | threads | quiet, stdout=subprocess.PIPE, stderr=log, text=True) as running,
    ):
        assert running.stdout is not None
        over = threading.Event()

        def watch() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(running.pid)
                while not over.wait(SAMPLE_S):
                    samples.append((time.monotonic(), held_bytes(root)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        # Libraries print on stdout too, but no JSON.
        said = [json.loads(line) for line in running.stdout if line.startswith('{"')]
        over.set()
        watcher.join()
        if running.wait():
            log.seek(0)
            raise SystemExit(f"{task.side} failed:\n{log.read()[-4000:]}")
    began, done = said[0]["began"], said[1]
    seconds = sum(done["stages"].values())
    return {
        **asdict(task),
        **done,
        "seconds": seconds,
        "mb_per_s": Path(task.rows).stat().st_size / 1e6 / seconds,
        "before_bytes": max((held for at, held in samples if at <= began), default=0),
        "peak_bytes": max((held for at, held in samples if began < at <= done["ended"]), default=0),
    }


def best_of_peer(task: Task, probed: str) -> Task:
    """The faster of the peer's ways to use the cores: processes, or threads in its tokenizer."""
    if task.cores == 1:
        return task
    ways = [replace(task, num_proc=task.cores), replace(task, rayon=True)]
    return max(ways, key=lambda way: told(run(replace(way, rows=probed)))["mb_per_s"])


def told(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn, told apart from the results."""
    how = f" ({turn['num_proc'] or 'no'} processes, {'several threads' if turn['rayon'] else 'one thread'})"
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in turn["stages"].items())
    speed = f"{turn['mb_per_s']:.2f} MB/s, {turn['cpu_s']:.1f} s of CPU"
    print(f"{turn['side']}{how * (turn['side'] != 'ours')}: {speed}; {stages}", file=sys.stderr, flush=True)
    return turn


def table(found: dict[int, dict[str, list[dict[str, Any]]]]) -> str:
    """Medians as Markdown. Ratios are those of the turns after each other."""
    lines = [
        "| cores | side | MB/s | times its speed on one core | CPU s | peak MiB | before MiB | rows | tokens | supervised | "
        "ours / it | CPU: it / ours |"
    ]
    lines.append("|---" * 12 + "|")
    for cores, sides in found.items():
        for side, turns in sides.items():

            def median(field: str, turns: list[dict[str, Any]] = turns) -> float:
                return statistics.median(turn[field] for turn in turns)

            ratio = statistics.median(a["mb_per_s"] / b["mb_per_s"] for a, b in zip(sides["ours"], turns, strict=True))
            gain = f"{median('mb_per_s') / median('mb_per_s', found[1][side]):.2f}" if 1 in found else "-"
            spent = statistics.median(b["cpu_s"] / a["cpu_s"] for a, b in zip(sides["ours"], turns, strict=True) if a["cpu_s"])
            cells = [cores, side, f"{median('mb_per_s'):.2f}", gain, f"{median('cpu_s'):.1f}"]
            cells += [f"{median(field) / 2**20:.0f}" for field in ("peak_bytes", "before_bytes")]
            cells += [f"{turns[0][field]:,}" for field in ("rows", "tokens", "supervised")]
            lines.append(f"| {' | '.join(map(str, cells))} | {ratio:.2f} | {spent:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=float("inf"), help="of rows, at most; default all, 125 MB")
    parser.add_argument("--cores", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--without-ray", action="store_true", help="ours in one process, as runs without Ray prepare")
    parser.add_argument("--mirror", default=str(Path.home() / ".tuneyard/models"))
    parser.add_argument("--out", type=Path, default=Path(".bench/prepare.json"))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        be(Task(**json.loads(options.side)))
        return
    versions = {name: version(name) for name in ("ray", "transformers", "tokenizers", "datasets", "trl", "pyarrow")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole, probed, warm_up = Path(folder, "rows.jsonl"), Path(folder, "probed.jsonl"), Path(folder, "first")
        write_rows(whole, options.mb * 1e6)
        warm_up.mkdir()
        for core in range(max(options.cores)):
            write_first(whole, warm_up / f"{core}.jsonl", WARM_UP_ROWS)
        write_first(whole, probed, int(PROBED * sum(1 for _ in whole.open("rb"))))
        for cores in (n for n in options.cores if n <= len(CORES)):
            mine, its = (Task(name, cores, str(whole), str(warm_up), str(Path(options.mirror, SMOLLM2))) for name in SIDES)
            sides = [replace(mine, ray=not options.without_ray), best_of_peer(its, str(probed))]
            turns = [[told(run(side)) for side in sides] for _ in range(options.repetitions)]
            found[cores] = {side.side: list(its) for side, its in zip(sides, zip(*turns, strict=True), strict=True)}
            size = whole.stat().st_size
            options.out.write_text(json.dumps({**machine(), "versions": versions, "bytes": size, "turns": found}, indent=1))
    print(table(found))


def write_first(source: Path, path: Path, num_rows: int) -> None:
    """The first rows of a file."""
    with source.open("rb") as rows, path.open("wb") as out:
        out.writelines(islice(rows, num_rows))


if __name__ == "__main__":
    main()
