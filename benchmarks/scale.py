"""How training scales: measured on this machine, simulated from 8 to 1,024 GPUs: `python -m benchmarks.scale`.

Measured: 1, 2 and 4 workers of one thread each, on as many cores as the machine has for them; gloo's all-reduce; what it costs to
read a row. The same arithmetic as in the simulation predicts those runs from the speed of one worker: that is its check.
Simulated: GPUs and networks of stated speeds (simulation.py, network.py), documents as long as those of real ShareGPT rows.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow.fs import LocalFileSystem
from transformers import AutoConfig, LlamaConfig

from benchmarks.chart import Line, chart
from benchmarks.network import Cluster, Link, fit
from benchmarks.setting import SMOLLM2, machine
from benchmarks.sides import Task
from benchmarks.simulation import (
    CAUSES,
    DDP,
    DDP_4BIT,
    FREE,
    FSDP,
    FSDP_FULL,
    Base,
    Gpu,
    Way,
    cpu_step_s,
    dealt,
    losses,
    striped,
    work,
)
from benchmarks.train import CORES, Bench, Case, job_of, start, tell, write_rows
from train_loop.data.loader import Collator
from train_loop.data.prepare import prepare_local
from train_loop.data.shards import ShardSet
from train_loop.data.sources import find_files
from train_loop.data.tokenize import IGNORE_INDEX, ChatTokenizer
from train_loop.model.tokenizer import load_tokenizer
from train_loop.spec import Hyperparameters, JobSpec

WORKERS = (1, 2, 4)
WARM_UP = 1  # steps
MEASURED_LENGTH = 512
STRONG_DOCUMENTS, WEAK_DOCUMENTS = 8, 4  # a step, of all workers and of each
SIMULATED_LENGTH, SIMULATED_ROWS = 2048, 1000
GPUS = [8 * 2**k for k in range(8)]
SHOWN = (8, 64, 1024)
BATCH_SIZE, GLOBAL_BATCH = 8, 1024  # documents of a micro-batch, and of a step on however many GPUs
BATCHES = 16  # drawn, for each count of GPUs
BENDS_BELOW = 0.9

LLAMA = {"head_dim": None, "num_key_value_heads": 8, "vocab_size": 128256}
LLAMAS = {  # config.json of Llama 3.2 1B, 3.1 8B and 3.1 70B
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
# Of each GPU in one direction. H100's data sheet: 450 GB/s of NVLink; a ConnectX-7 sends 400 Gb/s. Four fifths of it get through.
# Latencies of a step: NCCL's table (src/graph/tuning.cc at 01afd20, ring, "simple"); of TCP an assumption.
NVLINK = Link(3.4e-6, 0.8 * 450e9)
NETWORKS = {
    "InfiniBand, 400 Gb/s a GPU": Cluster(NVLINK, Link(9.6e-6, 0.8 * 50e9)),
    "Ethernet, 100 Gb/s a node": Cluster(NVLINK, Link(30e-6, 0.8 * 12.5e9 / 8)),
}
DEALS = {"as drawn": striped, "by length": dealt}


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Have what is started inside run on so many cores."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def measure_network(folder: Path, workers: int, limit_s: float) -> dict[str, Any]:
    """Times of gloo's all-reduce between processes of this machine, by bytes, and the link that they fit."""
    task = Task("network", "", "", {}, Path(), Path(tempfile.mkdtemp(dir=folder)))
    said, ended = start(task, workers, limit_s)
    if ended:
        raise SystemExit(f"all-reduces of {workers} workers took more than {limit_s:.0f} s: raise --limit-s")
    # All have to wait for the last.
    timed = [(line[0]["bytes"], max(rank["seconds"] for rank in line)) for line in zip(*said, strict=True) if "bytes" in line[0]]
    link = fit(timed, workers)
    return {"workers": workers, "timed": timed, "alpha_s": link.alpha_s, "bytes_per_s": link.bytes_per_s}


class Scaling:
    """A number of workers with work of one size: its rows, and what is run on them."""

    def __init__(self, mode: str, workers: int, folder: Path, options: argparse.Namespace) -> None:
        self.mode, self.workers, self.cores = mode, workers, min(workers, CORES)
        documents = STRONG_DOCUMENTS if mode == "strong" else WEAK_DOCUMENTS * workers
        folder = Path(tempfile.mkdtemp(dir=folder))
        write_rows(folder / "rows.jsonl")
        model = Path(options.mirror, SMOLLM2)
        sized = argparse.Namespace(**vars(options), batch_tokens=documents * MEASURED_LENGTH, warm_up=WARM_UP, model=model)
        self.bench = Bench(Case("bf16", MEASURED_LENGTH, False, workers), folder, sized)
        self.runs: list[dict[str, Any]] = []

    def run(self, steps: int, limit_s: float) -> None:
        """Train once more."""
        with on_cores(self.cores):
            self.runs.append(self.bench.run(self.bench.side("ours", self.bench.picked, "packed"), steps, limit_s))
        if self.runs[-1]["at_most"]:
            raise SystemExit(f"{self.workers} workers took more than {limit_s:.0f} s: raise --limit-s")
        tell(f"{self.mode} {self.workers} workers on {self.cores} cores: {self.runs[-1]['tokens_per_s']:.1f} tokens/s")

    def predicted_s(self, flops: float, link: Link, steps: int) -> float:
        """Seconds of the measured steps, were a core to do `flops` a second."""
        counted = self.bench.documents[WARM_UP : WARM_UP + steps]
        base = Base.of(AutoConfig.from_pretrained(self.bench.model))
        return sum(cpu_step_s(base, step, self.workers, self.cores, flops, link) for step in counted)


def measure_workers(folder: Path, options: argparse.Namespace, links: dict[int, Link]) -> list[dict[str, Any]]:
    """All numbers of workers in turns, with the same work in all and the same in each."""
    scalings = [Scaling(mode, workers, folder, options) for mode in ("strong", "weak") for workers in WORKERS]
    for _ in range(options.repetitions):
        for scaling in scalings:
            scaling.run(options.steps, options.limit_s)
    found = []
    for scaling in scalings:
        alone = next(s for s in scalings if s.mode == scaling.mode)
        pairs = list(zip(scaling.runs, alone.runs, strict=True))
        predicted = [
            scaling.predicted_s(one["useful_flops_per_s"], links.get(scaling.workers, FREE), options.steps) for _, one in pairs
        ]
        found.append(
            {
                "mode": scaling.mode,
                "workers": scaling.workers,
                "cores": scaling.cores,
                "tokens_per_s": statistics.median(run["tokens_per_s"] for run in scaling.runs),
                "efficiency": statistics.median(r["tokens_per_s"] / one["tokens_per_s"] for r, one in pairs) / scaling.cores,
                "measured_over_predicted_s": statistics.median(
                    run["seconds"] / seconds for run, seconds in zip(scaling.runs, predicted, strict=True)
                ),
                "runs": scaling.runs,
            }
        )
    return found


def measure_rows(folder: Path, model: Path) -> dict[str, Any]:
    """(tokens, supervised tokens) of real rows, and the seconds in which a loader's process makes a document of one."""
    write_rows(folder / "rows.jsonl", SIMULATED_ROWS)
    job = job_of(Case("bf16", SIMULATED_LENGTH, False, 1), folder / "rows.jsonl", SIMULATED_LENGTH, 1)
    job["dataset_config"]["preprocessing"]["lazy_tokenize"] = True
    spec, local = JobSpec.model_validate(job), LocalFileSystem()
    chat = ChatTokenizer.of(spec, tokenizer := load_tokenizer(model))
    prepared = prepare_local(spec, local, find_files(spec, local), local, str(folder), chat)
    shards = ShardSet(prepared, folder / "data")
    collator, documents = Collator(chat, SIMULATED_LENGTH, None, tokenizer.pad_token_id), []
    started = time.process_time()
    for row in shards.ids("train"):
        batch = collator.micro_batch(shards, [int(row)])
        documents.append((batch.num_tokens, int((batch.labels != IGNORE_INDEX).sum())) if batch else (0, 0))
    return {"documents": documents, "loading_s": (time.process_time() - started) / len(documents)}


def bases(mirror: str) -> dict[str, Base]:
    """What is simulated."""
    configs = {"135M": AutoConfig.from_pretrained(Path(mirror, SMOLLM2))}
    configs |= {name: LlamaConfig(**LLAMA | sizes) for name, sizes in LLAMAS.items()}
    return {name: Base.of(config) for name, config in configs.items()}


def ways(base: Base, gpu: Gpu, tokens: float) -> list[Way]:
    """How it may be trained: with a 4-bit base where equal copies don't fit otherwise."""
    return [DDP if DDP.resident_bytes(base, 1, tokens) < gpu.memory_bytes else DDP_4BIT, FSDP, FSDP_FULL]


def simulate(rows: dict[str, Any], gpu: Gpu, mirror: str) -> list[dict[str, Any]]:
    """Every base, way, network, number of GPUs, size of the global batch and order of its documents."""
    lengths = rows["documents"]
    tokens = BATCH_SIZE * statistics.fmean(length for length, _ in lengths)
    # The same documents for all. Drawn anew each time: a step of many GPUs has more than were looked at.
    draw = np.random.default_rng(0)
    drawn = {
        (mode, gpus): draw.integers(len(lengths), size=(BATCHES, BATCH_SIZE * gpus if mode == "weak" else GLOBAL_BATCH))
        for mode, gpus in itertools.product(("weak", "strong"), GPUS)
    }
    found = []
    for name, base in bases(mirror).items():
        for way in ways(base, gpu, tokens):
            flops = work(base, way, lengths)
            for ((mode, gpus), batches), (order, deal) in itertools.product(drawn.items(), DEALS.items()):
                if way.resident_bytes(base, gpus, tokens) > gpu.memory_bytes:
                    continue
                shared = [deal(flops[batch], gpus, BATCH_SIZE) for batch in batches]
                loading_s = rows["loading_s"] * batches.shape[1] / gpus / Hyperparameters().dataloader_num_workers
                for network, cluster in NETWORKS.items():
                    case = {"base": name, "way": way.name, "network": network, "mode": mode, "order": order, "gpus": gpus}
                    found.append(case | losses(base, way, gpu, cluster, shared, loading_s))
    return found


def bend(curve: list[dict[str, Any]]) -> str:
    """From how many GPUs on the efficiency is too low, and what takes most of it there."""
    low = next((point for point in curve if point["efficiency"] < BENDS_BELOW), None)
    return f"{low['gpus']:,}: {max(CAUSES, key=lambda cause: low[cause])}" if low else "-"


def curves(simulated: list[dict[str, Any]], **of: str) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Points by GPUs, of each (base, way, order), of those cases that are `of` that kind."""
    found = dict[tuple[str, str, str], list[dict[str, Any]]]()
    for point in simulated:
        if all(point[field] == value for field, value in of.items()):
            found.setdefault((point["base"], point["way"], point["order"]), []).append(point)
    return found


def lines_of(header: str, rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join([f"| {header} |", "|---" * (header.count("|") + 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)])


def tables(found: dict[str, Any]) -> Iterator[str]:
    """What was found, as Markdown."""
    if "workers" in found:
        yield lines_of(
            "work | workers | cores | tokens/s | efficiency a core | measured / predicted time",
            [
                [
                    f"{s['mode']}",
                    f"{s['workers']}",
                    f"{s['cores']}",
                    f"{s['tokens_per_s']:.1f}",
                    f"{s['efficiency']:.0%}",
                    f"{s['measured_over_predicted_s']:.2f}",
                ]
                for s in found["workers"]
            ],
        )
        sizes = [
            f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB" if size >> 10 else f"{size} B"
            for size, _ in found["networks"][0]["timed"]
        ]
        yield lines_of(
            f"workers | {' | '.join(sizes)} | alpha, us | GB/s",
            [
                [
                    f"{n['workers']}",
                    *(f"{s * 1e3:.3g} ms" for _, s in n["timed"]),
                    f"{n['alpha_s'] * 1e6:.0f}",
                    f"{n['bytes_per_s'] / 1e9:.2f}",
                ]
                for n in found["networks"]
            ],
        )
    for mode, network in itertools.product(("weak", "strong"), NETWORKS):
        of = curves(found["simulated"], mode=mode, network=network)
        rows = []
        for base, way in dict.fromkeys((base, way) for base, way, _ in of):
            cells = [base, way]
            for order in DEALS:
                at = {point["gpus"]: f"{point['efficiency']:.0%}" for point in of[base, way, order]}
                cells += [*(at.get(gpus, "too large") for gpus in SHOWN), bend(of[base, way, order])]
            rows.append(cells)
        shown = " | ".join(f"{gpus:,}" for gpus in SHOWN)
        by_length = " | ".join(f"{gpus:,} by length" for gpus in SHOWN)
        below = f"< {BENDS_BELOW:.0%} from"
        yield f"{mode}, {network}\n\n" + lines_of(f"base | way | {shown} | {below} | {by_length} | {below}", rows)


def plot(simulated: list[dict[str, Any]]) -> str:
    """SVG: what lengths alone cost, then each network with documents dealt by length."""
    panels = []
    lengths = [
        Line(
            f"{mode}, documents {order}",
            [(p["gpus"], 1 - p["imbalance"] / (p["imbalance"] + p["efficiency"])) for p in points],
            True,
        )
        for mode in ("weak", "strong")
        for (base, way, order), points in curves(simulated, mode=mode, network=next(iter(NETWORKS))).items()
        if (base, way) == ("8B", DDP.name)
    ]
    panels.append(("Lengths of documents alone, 8B", lengths))
    for network in NETWORKS:
        of = curves(simulated, mode="weak", network=network, order="by length")
        chosen = {k: v for k, v in of.items() if k[1] != FSDP_FULL.name and k[0] != "1B"}
        lines = [
            Line(f"{base} {way}", [(p["gpus"], p["efficiency"]) for p in points]) for (base, way, _), points in chosen.items()
        ]
        panels.append((f"{network}, weak, by length", lines))
    return chart(panels, "GPUs", BENDS_BELOW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps measured, after one of warm-up")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=240, help="of a run")
    parser.add_argument("--gpu-flops", type=float, default=Gpu.flops, help="that a GPU sustains; default %(default).3g")
    parser.add_argument("--simulate", action="store_true", help="measure nothing: take what --out has of an earlier run")
    parser.add_argument("--mirror", default=str(Path.home() / ".tuneyard/models"))
    parser.add_argument("--out", type=Path, default=Path(".bench/scale.json"))
    parser.add_argument("--plot", type=Path, help="SVG to write")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(options.out.read_text()) if options.simulate and options.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if "rows" not in found:
            found["rows"] = measure_rows(Path(folder), Path(options.mirror, SMOLLM2))
        if not options.simulate:
            found |= machine()
            found["networks"] = [measure_network(Path(folder), workers, options.limit_s) for workers in WORKERS if workers > 1]
            links = {n["workers"]: Link(n["alpha_s"], n["bytes_per_s"]) for n in found["networks"]}
            options.out.write_text(json.dumps(found, indent=1))  # the rest takes a quarter of an hour
            found["workers"] = measure_workers(Path(folder), options, links)
    found["simulated"] = simulate(found["rows"], Gpu(options.gpu_flops), options.mirror)
    lengths = [length for length, _ in found["rows"]["documents"]]
    print(
        f"{len(lengths)} documents of {statistics.fmean(lengths):.0f} +- {statistics.stdev(lengths):.0f} tokens, "
        f"{found['rows']['loading_s'] * 1e3:.1f} ms each to make of a row\n"
    )
    print("\n\n".join(tables(found)))
    options.out.write_text(json.dumps(found, indent=1))
    if options.plot:
        options.plot.write_text(plot(found["simulated"]))


if __name__ == "__main__":
    main()
