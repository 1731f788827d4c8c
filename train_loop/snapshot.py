"""Tensors as they are between two steps, copied: a checkpoint is written from the copies while the next steps go on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import torch

ALIGNED_BYTES = 64  # where a copy begins, as torch allocates
CPU_BYTES = 512 << 20  # more than a GPU's host, a machine that trains on its CPUs needs its memory for training
HOST_SHARE = 1 / 8  # of a GPU's host; torch may take twice as much, for it rounds pinned memory up to a power of two


def host_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def affordable(size_bytes: int, device: str) -> bool:
    """Whether so much is copied: up to HOST_SHARE of the host's memory from a GPU, and on a CPU up to CPU_BYTES (an adapter of
    rank 16 on a model of 8B). What is copied stays there until the run ends."""
    return size_bytes <= (CPU_BYTES if device == "cpu" else HOST_SHARE * host_bytes())


class Snapshot:
    """Copies in the host's memory, at places that the next `take` uses again: fresh memory takes as long as a copy, or longer."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._places: list[torch.Tensor] = []
        self._copied = torch.cuda.Event(blocking=True) if device.type == "cuda" else None

    def take(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of the tensors. Those of a GPU's are whole once `wait` has returned, which isn't for the thread of the steps.

        A GPU makes them in the order of its stream: after what the step before queued there, before what the next one changes.
        """
        if [(p.shape, p.dtype) for p in self._places] != [(t.shape, t.dtype) for t in tensors]:
            self._places = _places(tensors, pinned=self._copied is not None)
        for place, tensor in zip(self._places, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))
        return list(self._places)

    def wait(self) -> None:
        """Return once the copies are made."""
        if self._copied is not None:
            self._copied.synchronize()


def _places(tensors: Sequence[torch.Tensor], *, pinned: bool) -> list[torch.Tensor]:
    """Room for each, laid out as it is. All of a dtype are in one piece, which is pinned, and by torch.save written, at once; so
    what is between them is zero."""
    sizes: Counter[torch.dtype] = Counter()
    starts = []
    for tensor in tensors:
        starts.append(sizes[tensor.dtype])
        per_line = ALIGNED_BYTES // tensor.itemsize
        sizes[tensor.dtype] += -(-tensor.numel() // per_line) * per_line
    pieces = {dtype: torch.zeros(size, dtype=dtype, pin_memory=pinned) for dtype, size in sizes.items()}
    shapes = (torch.empty_like(tensor, device="meta") for tensor in tensors)
    return [pieces[s.dtype].as_strided(s.shape, s.stride(), start) for s, start in zip(shapes, starts, strict=True)]
