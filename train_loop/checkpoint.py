"""Checkpoints: everything a run needs to go on as if it had never stopped, in folders that are whole or don't count.

A checkpoint is `checkpoints/step-XXXXXXXX/`: what is trained (an adapter in PEFT layout, so it is also usable as it is, or every
weight in float32), optimizer, metrics and position, the random state of every rank. `complete.json` comes last, with size and
hash of each file: without it, or when they differ, the folder is not picked up.

Rank 0 writes all of it. What the others have of their own, their random state and their slices of a sharded model, is gathered
first; so the rest can run in a thread behind the next steps without a word between ranks, and another number of workers can
go on from it. Steps wait only for a copy of what is trained and of its moments: serialising, hashing and uploading are done
from that copy. Where it is too large to be held twice (`snapshot.affordable`), the files are written before the next step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from train_loop import weights
from train_loop.context import RunContext
from train_loop.errors import Cause, RunFault
from train_loop.layout import CHECKPOINTS
from train_loop.metrics import MetricLog
from train_loop.node import barrier, from_first_worker
from train_loop.optim import page_again
from train_loop.sharding import is_sharded, placed_like, whole
from train_loop.snapshot import Snapshot, affordable
from train_loop.storage import delete_file, delete_folder, download_file, list_files, read_bytes, upload_folder, write_json

log = logging.getLogger(__name__)
MARKER = "complete.json"
SET_ASIDE = "damaged.json"
STATE, OPTIMIZER, RANDOM = "state.json", "optimizer.pt", "random.pt"
CUT_OFF = "it was cut off while it was written"
SLOW_S = 1.0  # waiting that is told of


class Checkpoints:
    """The checkpoints of a run, as one of its ranks sees them. Close it: something may be on its way to storage."""

    def __init__(self, ctx: RunContext, keep: int) -> None:
        self._ctx = ctx
        self._keep = keep
        self._root = f"{ctx.run_path}/{CHECKPOINTS}"
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None
        self._newest: int | None = None
        self._trained, self._moments = Snapshot(ctx.device), Snapshot(ctx.device)  # apart, for they go to files of their own
        self._format: weights.FileFormat | None = None  # of the model: the thread doesn't touch it, for steps go on in it
        self._told_slow = False

    def save(
        self, step: int, model: Any, optimizer: torch.optim.Optimizer, metrics: MetricLog, first: Callable[[], None]
    ) -> None:
        """Take a checkpoint after `step` steps, uploaded after `first` has run. Collective. It is whole once `wait` has returned.

        Waits for the one before, and raises what that failed with.
        """
        if step == self._newest:
            return  # stopped or taken back right after it was saved
        self._newest = step
        writes = self._ctx.rank == 0
        if writes:
            self._take_turn()
        random_states = _of_all_ranks(_random_state(self._ctx.device), self._ctx)
        learned, state = weights.trained(model), optimizer.state_dict()
        live = [p.detach() for p in learned.values()], list(_tensors(state))
        values, moments = ([whole(tensor, keep=writes) for tensor in tensors] for tensors in live)
        if not writes:
            return
        copied = affordable(sum(tensor.nbytes for tensor in (*values, *moments)), self._ctx.device.type)
        if copied:
            values, moments = _copies(live[0], values, self._trained), _copies(live[1], moments, self._moments)
        trained = dict(zip(learned, values, strict=True))
        state = _with_tensors(state, iter(moments))
        about = {"step": step, "world_size": self._ctx.world_size, "log": metrics.state()}
        self._format = self._format or weights.FileFormat.of(model)
        write: Callable[[], Path] = partial(self._write, self._format, trained, state, random_states, about)
        if not copied:
            write = partial(Path, write())  # before the next step changes what it is of
        best = metrics.best["step"] if metrics.best else None
        self._under_way = self._thread.submit(self._finish, first, write, step, best)

    def behind(self, upload: Callable[[], None]) -> None:
        """Have this run behind the next steps, once what is under way is done. Raises what that failed with."""
        self._take_turn()
        self._under_way = self._thread.submit(upload)

    def wait(self) -> None:
        """Return when all is in storage. Raises what the upload failed with."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """End the thread, after the upload that it may be in."""
        self._thread.shutdown()

    def restore(self, model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, MetricLog] | None:
        """Go back to the newest whole checkpoint; return its step and the metrics so far, or None without one. Collective.

        On another world size each rank goes on with fresh dropout; samples and their order stay the same.
        """
        ctx, own = self._ctx, self._ctx.scratch / "resume"
        mine = self._choose(own) if ctx.rank == 0 else None
        # Rank 0 decides. Counted from 1, so that 0 is none.
        chosen = int(ctx.all_reduce_sum(torch.tensor([0 if mine is None else mine + 1], device=ctx.device)).item()) - 1
        if chosen < 0:
            return None

        def fetch() -> Path:
            if ctx.rank != 0 and (wrong := self._fetch(chosen, own)) is not None:
                message = f"The checkpoint of step {chosen} was whole for rank 0, not for {ctx.rank}: {wrong}."
                raise RunFault(Cause.INTERNAL, message)
            return own

        folder = from_first_worker(ctx, fetch)
        metrics = _read(folder, model, optimizer, ctx)
        self._remove(folder)
        self._newest = chosen
        return chosen, metrics

    def go_back(self, step: int, model: Any) -> None:
        """Put the weights of the checkpoint of `step` into the model. Collective. Raises RunFault where it isn't whole."""
        self.wait()
        barrier(self._ctx)  # rank 0 has it in storage

        def fetch() -> Path:
            own = self._ctx.scratch / "best"
            if (wrong := self._fetch(step, own)) is not None:
                raise RunFault(Cause.INTERNAL, f"The best checkpoint, of step {step}, can't be used: {wrong}.")
            return own

        folder = from_first_worker(self._ctx, fetch)
        weights.read(folder, model)
        self._remove(folder)

    # --- on rank 0 ---

    def _take_turn(self) -> None:
        """Wait for what is under way, and say it once if the steps are held up by that."""
        began = time.monotonic()
        self.wait()
        waited_s = time.monotonic() - began
        if waited_s < SLOW_S:
            return
        log.warning("steps waited %.1f s for the checkpoint before", waited_s)
        if not self._told_slow:
            self._told_slow = True
            said = f"steps waited {waited_s:.0f} s for the checkpoint before: storage is slower than the steps between two saves"
            self._ctx.event("checkpoint_slow", f"{said}; raise save_steps")

    def _finish(self, first: Callable[[], None], write: Callable[[], Path], step: int, best: int | None) -> None:
        first()
        self._publish(write(), step, best)

    def _write(
        self,
        file_format: weights.FileFormat,
        trained: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, Any],
        random_states: torch.Tensor,
        about: Mapping[str, Any],
    ) -> Path:
        """A local folder with the files of a checkpoint."""
        self._trained.wait()
        self._moments.wait()
        folder = Path(tempfile.mkdtemp(dir=self._ctx.scratch, prefix="checkpoint-"))
        file_format.write(folder, trained)
        torch.save(optimizer, folder / OPTIMIZER)
        torch.save(random_states, folder / RANDOM)
        (folder / STATE).write_text(json.dumps(about))
        return folder

    def _publish(self, folder: Path, step: int, best: int | None) -> None:
        path = self._path(step)
        files = upload_folder(folder, self._ctx.storage, path)
        self._ctx.require_current()  # what comes now counts for whoever goes on
        marker = {"step": step, "world_size": self._ctx.world_size, "files": files}
        write_json(self._ctx.storage, f"{path}/{MARKER}", marker)
        shutil.rmtree(folder)
        log.info("checkpoint of step %d is in storage", step)
        self._prune(step, best)

    def _prune(self, step: int, best: int | None) -> None:
        """Keep the newest `keep` and the best; remove what is older, and what was cut off before `step`."""
        found = {s: names for s, names in self._found().items() if s <= step}
        whole = sorted(s for s, names in found.items() if MARKER in names)
        for old in found.keys() - {*whole[-self._keep :], best}:
            delete_file(self._ctx.storage, f"{self._path(old)}/{MARKER}")  # first: what is half removed doesn't count
            delete_folder(self._ctx.storage, self._path(old))

    def _choose(self, folder: Path) -> int | None:
        """Fetch the newest whole checkpoint into `folder`; set aside, and tell of, what can't be used."""
        chosen, unusable = None, []
        for step, names in sorted(self._found().items(), reverse=True):
            if SET_ASIDE in names and MARKER not in names:
                continue  # told by an earlier attempt
            wrong = self._fetch(step, folder) if MARKER in names else CUT_OFF
            if wrong is None:
                chosen = step
                break
            unusable.append((step, wrong))
        then = "starting from the beginning" if chosen is None else f"going on from step {chosen}"
        for step, wrong in unusable:
            self._ctx.event("checkpoint_damaged", f"the checkpoint of step {step} can't be used ({wrong}): {then}")
            write_json(self._ctx.storage, f"{self._path(step)}/{SET_ASIDE}", {"reason": wrong})
            delete_file(self._ctx.storage, f"{self._path(step)}/{MARKER}")
        return chosen

    def _found(self) -> dict[int, set[str]]:
        """Names of the files in each checkpoint's folder, by step."""
        found: dict[int, set[str]] = {}
        for name in list_files(self._ctx.storage, self._root):
            folder, _, file = name.partition("/")
            step = folder.removeprefix("step-")
            if step.isdigit() and file:
                found.setdefault(int(step), set()).add(file)
        return found

    # --- on every rank ---

    def _remove(self, folder: Path) -> None:
        """Remove what the workers of a machine share, once all have read it."""
        barrier(self._ctx)
        if self._ctx.local_rank == 0:
            shutil.rmtree(folder)

    def _path(self, step: int) -> str:
        return f"{self._root}/step-{step:08d}"

    def _fetch(self, step: int, folder: Path) -> str | None:
        """Copy a checkpoint into the local `folder` and check it; return what is wrong with it, or None."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        name = MARKER
        try:
            files = json.loads(read_bytes(self._ctx.storage, f"{self._path(step)}/{MARKER}"))["files"]
            for file in files:
                name, local = file["name"], folder / file["name"]
                download_file(self._ctx.storage, f"{self._path(step)}/{name}", local)
                if (size := local.stat().st_size) != file["size_bytes"]:
                    return f"{name} has {size} of {file['size_bytes']} bytes"
                with local.open("rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != file["sha256"]:
                        return f"{name} isn't what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except (ValueError, KeyError, TypeError):
            return f"{MARKER} can't be read"
        return None


def _random_state(device: torch.device) -> torch.Tensor:
    """CPU's and, behind it, the GPU's: one row of bytes."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _of_all_ranks(row: torch.Tensor, ctx: RunContext) -> torch.Tensor:
    rows = torch.zeros((ctx.world_size, len(row)), dtype=row.dtype, device=ctx.device)
    rows[ctx.rank] = row.to(ctx.device)
    return ctx.all_reduce_sum(rows).cpu()


def _copies(live: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], snapshot: Snapshot) -> list[torch.Tensor]:
    """The `tensors`, which are the `live` ones or what was gathered of them, with a copy of each that is live."""
    ours = {id(tensor): tensor for tensor in live if not is_sharded(tensor)}
    copies = dict(zip(ours, snapshot.take(list(ours.values())), strict=True))
    return [copies.get(id(tensor), tensor) for tensor in tensors]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Those of an optimizer's state dict, however deep: bitsandbytes puts a parameter's into a dict of their own."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)


def _with_tensors(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The state dict with these in place of what `_tensors` found, and its numbers as they are now."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    return {name: _with_tensors(each, tensors) for name, each in value.items()} if isinstance(value, Mapping) else value


def _load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over what `_with_tensors` returned, each rank its part."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        p = parameters[index]
        values |= {k: placed_like(v, p) for k, v in values.items() if isinstance(v, torch.Tensor) and v.shape == p.shape}
    optimizer.load_state_dict(state)
    page_again(optimizer)


def _read(folder: Path, model: Any, optimizer: torch.optim.Optimizer, ctx: RunContext) -> MetricLog:
    state = json.loads((folder / STATE).read_text())
    weights.read(folder, model)
    # Mapped, not read: each rank's device takes its part of one tensor after the other, and a machine's ranks share the pages.
    _load(optimizer, torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True))
    if state["world_size"] == ctx.world_size:
        row = torch.load(folder / RANDOM, weights_only=True)[ctx.rank]
        num_cpu = len(torch.get_rng_state())
        torch.set_rng_state(row[:num_cpu].clone())
        if ctx.device.type == "cuda" and len(row) > num_cpu:
            torch.cuda.set_rng_state(row[num_cpu:].clone(), ctx.device)
    return MetricLog.from_state(state["log"])
