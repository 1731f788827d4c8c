"""What the workers of one machine share: files that the first of them fetches, once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from train_loop.context import RunContext

PATH_BYTES = 4096
T = TypeVar("T")


def scratch_of_node(ctx: RunContext) -> Path:
    """The scratch folder of this machine's first worker, which the others here can read too. Collective.

    Raises NotADirectoryError where they don't see it.
    """
    paths = torch.zeros((ctx.world_size, PATH_BYTES), dtype=torch.uint8)
    if ctx.local_rank == 0:
        path = os.fsencode(ctx.scratch)
        paths[ctx.node_rank, : len(path)] = torch.frombuffer(bytearray(path), dtype=torch.uint8)
    mine = ctx.all_reduce_sum(paths.to(ctx.device))[ctx.node_rank].cpu().numpy().tobytes()
    folder = Path(os.fsdecode(mine.rstrip(b"\0")))
    if not folder.is_dir():
        raise NotADirectoryError(f"worker {ctx.rank} doesn't see {str(folder)!r}, the first one's folder on this machine")
    return folder


def first_of_node(ctx: RunContext, call: Callable[[bool], T]) -> T:
    """`call(True)` on the first worker of each machine, and when that is done `call(False)` on the others. Collective."""
    if ctx.local_rank == 0:
        made = call(True)
        barrier(ctx)
        return made
    barrier(ctx)
    return call(False)


def barrier(ctx: RunContext) -> None:
    """Wait until every rank is here."""
    ctx.all_reduce_sum(torch.zeros(1, device=ctx.device)).item()
