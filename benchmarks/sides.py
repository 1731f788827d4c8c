"""The sides of benchmarks/train.py and scale.py: each a process of its own that trains on the same rows.

It prints JSON lines: when each step ended, then its peak memory.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.flops import DTYPES, Shape, gemm_limit
from train_loop.__main__ import Console
from train_loop.data.packing import pack
from train_loop.data.shards import PreparedDataset, ShardSet
from train_loop.data.tokenize import IGNORE_INDEX, Sample
from train_loop.loop import batch_plan, run
from train_loop.model.load import quantised_by, quieten
from train_loop.model.tokenizer import load_tokenizer
from train_loop.spec import JobSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of TRL's micro-batches: rows of several documents, all documents padded, or one document each; on a GPU also with Liger's
# kernels, which aren't in the lock.
LAYOUTS = ("packed", "padded", "single") if DEVICE.type == "cpu" else ("packed liger", "padded liger", "packed", "padded")
MESSAGES = [4 * 16**k for k in range(7)]  # bytes: to 64 MiB, which is a bucket of gradients
SENT = 21  # times each


@dataclass(frozen=True)
class Task:
    """What a process of a side is told."""

    side: str  # ours, trl, naive; gemm and network: the machine's limits
    dtype: str  # what peers compute in; ours picks its own
    layout: str  # of LAYOUTS
    job: dict[str, Any]
    model: Path  # folder of the base
    folder: Path = Path()  # of the run, its rows prepared in data/
    micro_tokens: int = 0  # rows of the products whose limit is measured

    @property
    def spec(self) -> JobSpec:
        """The job."""
        return JobSpec.model_validate(self.job)

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Read the command line."""
        told = json.loads(text)
        return cls(**told | {"model": Path(told["model"]), "folder": Path(told["folder"])})


def ended(step: int) -> None:
    """Say that a step is done; step 0 is the start. All processes of a machine share this clock."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print(json.dumps({"step": step, "at": time.monotonic()}), flush=True)


def rank_and_world() -> tuple[int, int]:
    """As torchrun tells it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def documents(spec: JobSpec, folder: Path, rank: int = 0, world_size: int = 1) -> list[list[Sample]]:
    """This rank's documents of each step, in the order of our loop."""
    shards = ShardSet(PreparedDataset.from_json((folder / "data/index.json").read_text()), folder / "data")
    ids = shards.ids("train")
    plan = batch_plan(spec, len(ids))
    sizes = shards.sizes(ids)
    steps = (plan.micro_batches(step, rank, world_size, sizes) for step in range(1, plan.total_steps + 1))
    return [[shards.sample(int(ids[i])) for i in np.concatenate(step)] for step in steps]


class Clock(Console):
    """Listens to our run."""

    held_bytes = 0  # at its peak: the run counts a GPU's anew from each of its points to the next

    def on_progress(self, progress: dict[str, Any]) -> None:
        ended(progress["step"])
        self.held_bytes = max(self.held_bytes, *(point.get("memory_bytes", 0) for point in progress["points"]), 0)


def ours(task: Task) -> int:
    """What `python -m train_loop --local` does once the rows are prepared; as one of several ranks, too.

    Returns the bytes that it held on a GPU at its peak.
    """
    clock = Clock()
    trained(task, clock)
    return clock.held_bytes


def trained(task: Task, monitor: Console) -> None:
    """Our run, with someone who listens."""
    from pyarrow.fs import LocalFileSystem

    from train_loop.context import LocalContext

    rank, world_size = rank_and_world()
    with tempfile.TemporaryDirectory() as scratch:
        ctx = LocalContext(
            model_folder=task.model,
            storage=LocalFileSystem(),
            run_path=str(task.folder),
            scratch=Path(scratch),
            monitor=monitor,
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            local_world_size=world_size,
        )
        run(task.spec, PreparedDataset.from_json((task.folder / "data/index.json").read_text()), ctx)


def peers_model(task: Task) -> tuple[Any, Any]:
    """The base and a configuration of the same adapter, for those who aren't us."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    quieten()
    dtype, spec = DTYPES[task.dtype], task.spec
    base = AutoModelForCausalLM.from_pretrained(
        task.model, dtype=dtype, device_map={"": DEVICE}, **quantised_by(spec.model_details.quantization, dtype)
    )
    adapter = spec.train_config.adapter_config
    return base, LoraConfig(
        r=adapter.r,
        lora_alpha=int(adapter.alpha),
        lora_dropout=adapter.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def naive(task: Task) -> None:
    """The loop of a tutorial: padded batches, the model's own loss over all logits, AdamW."""
    from peft import get_peft_model
    from torch.nn.utils.rnn import pad_sequence

    spec = task.spec
    hp = spec.train_config.hyperparameters
    base, adapter = peers_model(task)
    model: Any = get_peft_model(base, adapter)
    if hp.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=hp.learning_rate)
    if rank_and_world()[1] > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    ended(0)
    for step, samples in enumerate(documents(spec, task.folder, *rank_and_world()), 1):
        ids, labels = (
            pad_sequence([torch.tensor(getattr(s, field)).long() for s in samples], True, fill).to(DEVICE)
            for field, fill in (("input_ids", 0), ("labels", IGNORE_INDEX))
        )
        mask = pad_sequence([torch.ones(len(s.input_ids), dtype=torch.long) for s in samples], True, 0).to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=task.dtype == "bf16"):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learns, hp.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ended(step)


def trl(task: Task) -> None:
    """SFTTrainer on rows that are tokenised before, the same documents in each step."""
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    spec = task.spec
    hp = spec.train_config.hyperparameters
    rank, world_size = rank_and_world()
    steps = laid_out([documents(spec, task.folder, r, world_size) for r in range(world_size)], task.layout, spec)[rank]
    micro_batches = [micro for step in steps for micro in step]

    class Fed(SFTTrainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(micro_batches, batch_size=None, collate_fn=self.data_collator)

    class Stamps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ended(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ended(state.global_step)

    base, adapter = peers_model(task)
    arguments = SFTConfig(
        output_dir=str(task.folder),
        max_steps=len(steps),
        gradient_accumulation_steps=len(steps[0]),
        gradient_checkpointing=hp.gradient_checkpointing,
        learning_rate=hp.learning_rate,
        max_length=spec.dataset_config.preprocessing.prompt.max_length,
        packing=task.layout.startswith("packed"),
        use_liger_kernel=task.layout.endswith("liger"),
        bf16=task.dtype == "bf16",
        use_cpu=DEVICE.type == "cpu",
        ddp_backend="gloo" if world_size > 1 else None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    Fed(
        base,
        arguments,
        train_dataset=Dataset.from_list([row for micro in micro_batches for row in micro]),
        processing_class=load_tokenizer(task.model),
        peft_config=adapter,
        callbacks=[Stamps()],
    ).train()


Rows = list[dict[str, Any]]


def laid_out(ranks: list[list[list[Sample]]], layout: str, spec: JobSpec) -> list[list[list[Rows]]]:
    """Of each rank and step its micro-batches, as many everywhere: the Trainer accumulates a fixed number."""
    if not layout.startswith("packed"):
        groups = [[[_row([sample]) for sample in step] for step in steps] for steps in ranks]
        return [[[[row] for row in step] if layout == "single" else [step] for step in steps] for steps in groups]
    limit = spec.dataset_config.preprocessing.prompt.max_length
    bins = [[pack([len(s.input_ids) for s in step], limit) for step in steps] for steps in ranks]
    count = max(len(step) for steps in bins for step in steps)
    # TRL joins the rows of a micro-batch to one sequence, under one mask: best is a row each.
    return [
        [[[_row([step[i] for i in group])] for group in spread(groups, count)] for step, groups in zip(*both, strict=True)]
        for both in zip(ranks, bins, strict=True)
    ]


def spread(groups: list[list[int]], count: int) -> list[list[int]]:
    """The same documents in `count` groups: without padding, a group that is cut in two costs nothing."""
    while len(groups) < count:
        largest = max(groups, key=len)
        groups = [g for g in groups if g is not largest] + [largest[::2], largest[1::2]]
    return groups


def _row(samples: list[Sample]) -> dict[str, Any]:
    return {
        "input_ids": [int(i) for s in samples for i in s.input_ids],
        "labels": [int(i) for s in samples for i in s.labels],
        "seq_lengths": [len(s.input_ids) for s in samples],
    }


def gemm(task: Task) -> None:
    """How fast the machine multiplies what the model does, all ranks at once."""
    if rank_and_world()[1] > 1:
        torch.distributed.barrier()
    print(json.dumps({"flops": gemm_limit(Shape.of(task.model), task.micro_tokens, DEVICE)}), flush=True)


def network(task: Task) -> None:
    """How long the group's all-reduce takes, by the bytes of its message."""
    del task
    for size in MESSAGES:
        message, times = torch.zeros(size // 4), []
        for _ in range(SENT):
            torch.distributed.barrier()
            started = time.perf_counter()
            torch.distributed.all_reduce(message)
            times.append(time.perf_counter() - started)
        print(json.dumps({"bytes": size, "seconds": statistics.median(times)}), flush=True)


SIDES: dict[str, Callable[[Task], int | None]] = {"ours": ours, "trl": trl, "naive": naive, "gemm": gemm, "network": network}


def main() -> None:
    """Be one of them."""
    task = Task.from_json(sys.argv[1])
    several = rank_and_world()[1] > 1 and task.side != "trl"  # which makes a group of its own
    if several:
        torch.distributed.init_process_group("gloo")
    held_bytes = SIDES[task.side](task) or 0
    if several:
        torch.distributed.destroy_process_group()
    # Of this process alone: ru_maxrss begins with its parent's.
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10
    if DEVICE.type == "cuda":
        peak = max(held_bytes, torch.cuda.max_memory_allocated())
    print(json.dumps({"peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
