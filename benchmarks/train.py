"""Training speed and memory of our loop against its peers on this machine: `python -m benchmarks.train`.

Sides take turns, each time in fresh processes, one a worker: SmolLM2-135M-Instruct, LoRA on all linears, real ShareGPT rows, the
same documents in every step. TRL runs at the setting that a short probe of each finds fastest (packed rows, padded batches or
single documents; fp32 or bf16) and, where bf16 is asked for, as its own defaults have it (padded, bf16). The naive loop computes
in what our capability check picks. The limit is how fast this machine multiplies matrices; shares of it count useful work alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pyarrow.fs import LocalFileSystem

from benchmarks.flops import Shape, useful_flops
from benchmarks.setting import SMOLLM2, conversations, machine
from benchmarks.sides import DEVICE, LAYOUTS, Task, documents
from train_loop.allocator import environment
from train_loop.data.prepare import prepare_local
from train_loop.data.sources import find_files
from train_loop.data.tokenize import IGNORE_INDEX, ChatTokenizer
from train_loop.model.load import compute_dtype
from train_loop.model.tokenizer import load_tokenizer
from train_loop.spec import JobSpec

NUM_ROWS = 200
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Case:
    """What a user asks for."""

    precision: str
    seq: int
    checkpointing: bool
    workers: int

    def __str__(self) -> str:
        return f"{self.precision}-{self.seq}{'-ckpt' * self.checkpointing}{f'-{self.workers}w' * (self.workers > 1)}"


CASES = {
    str(case): case
    for case in itertools.starmap(Case, itertools.product(("bf16", "fp32", "nf4"), (512, 1024, 2048), (False, True), (1, 2)))
}
DEFAULT = ["bf16-1024"]
NAMES = ("ours", "TRL, best", "TRL, as asked", "naive loop", "ours, not quantised")


def job_of(case: Case, data: Path, batch_tokens: int, num_steps: int) -> dict[str, Any]:
    """The job: batches of so many documents that they have about `batch_tokens`, were all of them long."""
    return {
        "org": "0bf00b43-430a-4ca3-a8b3-b13cc8dc6d4f",
        "experiment_name": "train",
        "dataset_config": {
            # Tokenised before: so are the rows of the others.
            "preprocessing": {"prompt": {"max_length": case.seq}, "lazy_tokenize": False, "max_reject_ratio": 0.5},
            "split": {"type": "none"},
        },
        "model_details": {"base_model": SMOLLM2, "quantization": {"quant_bits": 4} if case.precision == "nf4" else None},
        "train_config": {
            "torch_dtype": "float32" if case.precision == "fp32" else "bfloat16",
            "hyperparameters": {
                "max_steps": num_steps,
                "per_device_train_batch_size": max(1, batch_tokens // case.seq // case.workers),
                "gradient_checkpointing": case.checkpointing,
            },
        },
        "dataset_details": {"dataset_path": str(data), "source_type": "local", "ownership": "public"},
        "infra_config": {"gpu_type": "cpu", "gpu_count": case.workers},
    }


def random_model(folder: Path, tokenizer: Path) -> Path:
    """A model of Llama 3.2 1B's shape with random weights, made in `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128_256,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with DEVICE:
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    return folder


def write_rows(path: Path, num_rows: int = NUM_ROWS) -> None:
    """The first real conversations."""
    with path.open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in itertools.islice(conversations(), num_rows))


def prepare(job: dict[str, Any], model: Path, folder: Path) -> None:
    """The rows as our preparation makes them, in `folder`/data."""
    spec, local = JobSpec.model_validate(job), LocalFileSystem()
    prepare_local(spec, local, find_files(spec, local), local, str(folder), ChatTokenizer.of(spec, load_tokenizer(model)))


def start(task: Task, workers: int, limit_s: float) -> tuple[list[list[dict[str, Any]]], float | None]:
    """Run a side: what each of its processes said; and when they were ended, if they took longer than `limit_s`."""
    threads = {"OMP_NUM_THREADS": str(max(1, CORES // workers)), "TOKENIZERS_PARALLELISM": "false"}
    ours = environment() if task.side == "ours" and DEVICE.type == "cpu" else {}  # as a worker is started
    ranks = [os.environ | threads | ours | {"HF_HUB_OFFLINE": "1"} for _ in range(workers)]
    if workers > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(workers)}
        ranks = [env | group | {"RANK": str(r), "LOCAL_RANK": str(r)} for r, env in enumerate(ranks)]
    log, deadline = task.folder / "log", time.monotonic() + limit_s
    command = [sys.executable, "-m", "benchmarks.sides", task.to_json()]
    with log.open("w") as err:
        running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=err, text=True) for env in ranks]
        try:
            # One that fails leaves the others waiting for it.
            while any(p.poll() is None for p in running) and not any(p.poll() for p in running) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            ended_at = time.monotonic()
            unfinished = [p for p in running if p.poll() is None]
            for process in unfinished:
                process.kill()
        said = [process.communicate()[0].splitlines() for process in running]
    if any(p.returncode for p in running if p not in unfinished):
        raise SystemExit(f"{task.side} failed:\n{log.read_text()[-4000:]}")
    # Trainers print on stdout too, but no JSON.
    return [[json.loads(line) for line in lines if line.startswith('{"')] for lines in said], ended_at if unfinished else None


class Bench:
    """One case: its rows, and what is run on them."""

    def __init__(self, case: Case, folder: Path, options: argparse.Namespace) -> None:
        self.case, self.options = case, options
        self.model = options.model
        self.shape = Shape.of(self.model)
        self.job = job_of(case, folder / "rows.jsonl", options.batch_tokens, options.warm_up + options.steps)
        self.folder = folder / str(case)
        prepare(self.job, self.model, self.folder)
        spec = JobSpec.model_validate(self.job)
        # The first token of a document is nobody's target.
        self.documents = [
            [(len(s.labels), int((s.labels[1:] != IGNORE_INDEX).sum())) for s in step] for step in documents(spec, self.folder)
        ]
        self.adapter_rank = spec.train_config.adapter_config.r
        self.picked = "bf16" if compute_dtype(spec.train_config.torch_dtype, DEVICE)[0] is torch.bfloat16 else "fp32"
        either = ["fp32", "bf16"] if DEVICE.type == "cpu" else ["bf16"]  # a GPU's fp32 is a tenth of that
        self.dtypes = ["fp32"] if case.precision == "fp32" else either

    def measure(self) -> dict[str, Any]:
        """Probe TRL's settings, if there are several, then let the sides take turns."""
        settings = [{"dtype": dtype, "layout": layout} for dtype, layout in itertools.product(self.dtypes, self.options.layouts)]
        probes = self.probe(settings) if len(settings) > 1 else []
        best = max(probes, key=lambda p: (not p["at_most"], p["tokens_per_s"]), default=settings[0])
        sides = {
            "ours": self.side("ours", self.picked, "packed"),
            "TRL, best": self.side("trl", best["dtype"], best["layout"]),
            "TRL, as asked": self.side("trl", "bf16", "padded"),
            "naive loop": self.side("naive", self.picked, "padded"),
        }
        if self.case.precision == "fp32" or sides["TRL, as asked"] == sides["TRL, best"]:
            del sides["TRL, as asked"]
        if self.case.precision == "nf4":
            plain = self.job | {"model_details": self.job["model_details"] | {"quantization": None}}
            sides["ours, not quantised"] = replace(sides["ours"], job=plain)
        sides = {name: side for name, side in sides.items() if name in ("ours", *self.options.sides)}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        limits = []
        for _ in range(self.options.repetitions):
            limits.append(self.limit())
            for name, side in sides.items():
                ended = next((run for run in runs[name] if run["at_most"]), None)  # would be again
                runs[name].append(ended or self.run(side, self.options.steps, self.options.limit_s))
                tell(f"{self.case} {name}: {shown(runs[name][-1])}")
        return {"case": asdict(self.case), "probes": probes, "limits": limits, "runs": runs}

    def probe(self, settings: list[dict[str, str]]) -> list[dict[str, Any]]:
        """A step or a few of each of TRL's settings. One that takes thrice as long as another is ended, and so is its dtype."""
        probes, limit_s = list[dict[str, Any]](), self.options.limit_s
        for setting in settings:
            if any(p["at_most"] and p["dtype"] == setting["dtype"] for p in probes):
                continue
            started = time.monotonic()
            probes.append(self.run(self.side("trl", **setting), -(-self.options.steps // 4), limit_s))
            limit_s = min(limit_s, 3 * (time.monotonic() - started))
            tell(f"{self.case} probe of TRL {setting['dtype']} {setting['layout']}: {shown(probes[-1])}")
        return probes

    def side(self, name: str, dtype: str = "", layout: str = "") -> Task:
        """What trains, but for the folder."""
        tokens = sum(length for step in self.documents for length, _ in step) // len(self.documents) // self.case.workers
        return Task(name, dtype, layout, self.job, self.model, micro_tokens=tokens)

    def run(self, side: Task, num_steps: int, limit_s: float) -> dict[str, Any]:
        """Train so many steps after the warm-up."""
        warm_up = self.options.warm_up
        last = warm_up + num_steps
        said, killed_at = self._start(side, last, limit_s)
        at = {line["step"]: line["at"] for line in said[0] if "step" in line}
        if 0 not in at:
            raise SystemExit(f"{side.side} didn't begin to train within {limit_s:.0f} s: raise --limit-s")
        peaks = [line["peak_bytes"] for lines in said for line in lines if "peak_bytes" in line]
        first = warm_up if warm_up in at else 0
        at_most = killed_at is not None and last not in at
        # What was ended is counted with the step that was under way: it isn't faster than that.
        end, through = (killed_at or 0.0, max(at) + 1) if at_most else (at[last], last)
        counted, seconds = [d for step in range(first, through) for d in self.documents[step]], end - at[first]
        return {
            "side": side.side,
            "dtype": side.dtype,
            "layout": side.layout,
            "seconds": seconds,
            "tokens_per_s": sum(length for length, _ in counted) / seconds,
            "supervised_per_s": sum(supervised for _, supervised in counted) / seconds,
            "useful_flops_per_s": sum(useful_flops(self.shape, counted, self.adapter_rank).values()) / seconds,
            "peak_bytes": max(peaks, default=None),  # of its largest process
            "at_most": at_most,
        }

    def limit(self) -> dict[str, float]:
        """FLOP/s of the machine by dtype, all workers together."""
        said, _ = self._start(self.side("gemm"), 1, self.options.limit_s)
        rates = [line["flops"] for lines in said for line in lines if "flops" in line]
        return {dtype: sum(rate[dtype] for rate in rates) for dtype in self.dtypes}

    def _start(self, side: Task, last: int, limit_s: float) -> tuple[list[list[dict[str, Any]]], float | None]:
        train = side.job["train_config"]
        job = side.job | {"train_config": train | {"hyperparameters": train["hyperparameters"] | {"max_steps": last}}}
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            shutil.copytree(self.folder / "data", Path(folder, "data"))
            return start(replace(side, job=job, folder=Path(folder)), self.case.workers, limit_s)


def shown(run: dict[str, Any]) -> str:
    """A run in a few words."""
    return f"{'<' * run['at_most']}{run['supervised_per_s']:.1f} supervised tokens/s of {run['tokens_per_s']:.1f}"


def tell(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def table(found: dict[str, Any]) -> str:
    """Medians of a case as Markdown. Ratios are those of the runs after each other."""
    name, lines = str(Case(**found["case"])), list[str]()
    limits = [max(limit.values()) for limit in found["limits"]]
    for side, runs in found["runs"].items():
        at_most = any(run["at_most"] for run in runs)
        peak = statistics.median(run["peak_bytes"] or 0 for run in runs) / 2**20
        ratio = statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(found["runs"]["ours"], runs, strict=True))
        useful = statistics.median(run["useful_flops_per_s"] for run in runs) / 1e12
        share = statistics.median(run["useful_flops_per_s"] / limit for run, limit in zip(runs, limits, strict=True))
        speeds = (statistics.median(run[field] for run in runs) for field in ("supervised_per_s", "tokens_per_s"))
        cells = [name, side, f"{runs[0]['dtype']} {runs[0]['layout']}", *(f"{'< ' * at_most}{speed:.1f}" for speed in speeds)]
        cells += [f"{peak:.0f}" if peak else "-", f"{'> ' * at_most}{ratio:.2f}"]
        cells += [f"{'< ' * at_most}{useful:.3g}", f"{'< ' * at_most}{share:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    rates = (f"{dtype} {statistics.median(limit[dtype] for limit in found['limits']) / 1e9:.0f}" for dtype in found["limits"][0])
    return "\n".join([*lines, f"| {name} | limit, GFLOP/s | {', '.join(rates)} |" + " |" * 6])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", choices=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--all", action="store_true", help=f"every case: hours; default {' '.join(DEFAULT)}")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps measured, after the warm-up")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before; kernels are compiled in a GPU's first ones")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="of TRL's that are probed")
    parser.add_argument("--sides", nargs="+", choices=NAMES, default=NAMES, metavar="SIDE", help=f"of {'; '.join(NAMES)}")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of a step, were all documents max_length long")
    parser.add_argument("--limit-s", type=float, default=240, help="a run that takes longer is ended: an upper bound is shown")
    parser.add_argument("--model", type=Path, default=Path.home() / ".tuneyard/models" / SMOLLM2, help="its folder")
    parser.add_argument("--random-1b", action="store_true", help="a model of Llama 3.2 1B's shape instead, with random weights")
    parser.add_argument("--rows", type=Path, help="JSONL of conversations instead of ShareGPT's first ones")
    parser.add_argument("--out", type=Path, default=Path(".bench/train.json"))
    options = parser.parse_args()
    names = list(CASES) if options.all else options.case or DEFAULT
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        if options.rows:
            shutil.copy(options.rows, Path(folder, "rows.jsonl"))
        else:
            write_rows(Path(folder, "rows.jsonl"))
        if options.random_1b:
            options.model = random_model(Path(folder, "model"), options.model)
        columns = ["case", "side", "computes in", "supervised tokens/s", "tokens/s", "peak MiB", "ours / it"]
        columns += ["useful TFLOP/s", "share of the limit"]
        print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
        for name in names:
            found.append(Bench(CASES[name], Path(folder), options).measure())
            print(table(found[-1]), flush=True)
            options.out.write_text(json.dumps({**machine(), "versions": versions, "cases": found}, indent=1))


if __name__ == "__main__":
    main()
