"""What is told of a run's metrics in its folder: metrics.jsonl and TensorBoard's file."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pyarrow.fs import FileSystem

from train_loop import tensorboard
from train_loop.layout import METRICS, TENSORBOARD
from train_loop.storage import write_bytes
from train_loop.trackers.curves import Point


class MetricFiles:
    """Both files, in the folder `run_path`: written anew each time, but a point is encoded once. There may be many thousands."""

    def __init__(self, storage: FileSystem, run_path: str) -> None:
        self._storage = storage
        self._run_path = run_path
        self._encoded: list[tuple[Point, bytes, bytes]] = []

    def write(self, points: Sequence[Point]) -> None:
        """Write these points, each of which is the one of the time before or another object. From one thread at a time."""
        for i, point in enumerate(points):
            if i == len(self._encoded) or self._encoded[i][0] is not point:
                self._encoded[i:] = [(point, json.dumps(point).encode() + b"\n", tensorboard.event(point))]
        _, lines, events = zip(*self._encoded, strict=True) if self._encoded else ((), (), ())
        for name, pieces in ((METRICS, lines), (TENSORBOARD, (tensorboard.start(), *events))):
            write_bytes(self._storage, f"{self._run_path}/{name}", b"".join(pieces))
