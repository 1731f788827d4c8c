"""A checkpoint: everything a run needs to go on as if it had never stopped.

Rank 0 writes the adapter (PEFT layout, so a checkpoint is also usable as it is), optimizer, position and metrics;
every rank writes its random state.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from train_loop.context import RunContext
from train_loop.metrics import MetricLog

STATE = "state.json"


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rng-{rank:05d}.pt"


def write(folder: Path, ctx: RunContext, step: int, model: Any, optimizer: torch.optim.Optimizer, log: MetricLog) -> None:
    """Fill `folder` with this rank's part of the checkpoint after `step` steps."""
    random_state = {"cpu": torch.get_rng_state()}
    if ctx.device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(ctx.device)
    torch.save(random_state, _rank_file(folder, ctx.rank))
    if ctx.rank == 0:
        model.save_pretrained(folder, save_embedding_layers=False)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        (folder / STATE).write_text(json.dumps({"step": step, "world_size": ctx.world_size, "log": log.state()}))


def read(folder: Path, ctx: RunContext, model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, MetricLog]:
    """Restore model, optimizer and random state from `folder`; return the step reached and the metrics so far.

    On another world size each rank draws fresh dropout; samples and their order stay the same.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = json.loads((folder / STATE).read_text())
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=ctx.device, weights_only=True))
    if state["world_size"] == ctx.world_size:
        random_state = torch.load(_rank_file(folder, ctx.rank), weights_only=True)
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state and ctx.device.type == "cuda":
            torch.cuda.set_rng_state(random_state["cuda"], ctx.device)
    return state["step"], MetricLog.from_state(state["log"])
