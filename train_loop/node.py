"""What the workers of one machine share: files that the first of them fetches, once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from train_loop.context import RunContext

PATH_BYTES = 4096


def from_first_worker(ctx: RunContext, fetch: Callable[[], Path]) -> Path:
    """The folder that `fetch` returns on this machine's first worker, once it has: the others here read it too. Collective.

    Raises NotADirectoryError where they don't see it.
    """
    paths = torch.zeros((ctx.world_size, PATH_BYTES), dtype=torch.uint8)
    if ctx.local_rank == 0:
        path = os.fsencode(fetch())
        paths[ctx.node_rank, : len(path)] = torch.frombuffer(bytearray(path), dtype=torch.uint8)
    mine = ctx.all_reduce_sum(paths.to(ctx.device))[ctx.node_rank].cpu().numpy().tobytes()
    folder = Path(os.fsdecode(mine.rstrip(b"\0")))
    if not folder.is_dir():
        raise NotADirectoryError(f"worker {ctx.rank} doesn't see {str(folder)!r}, the first one's folder on this machine")
    return folder


def barrier(ctx: RunContext) -> None:
    """Wait until every rank is here."""
    ctx.all_reduce_sum(torch.zeros(1, device=ctx.device)).item()
