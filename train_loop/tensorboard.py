"""The run's metrics as a TensorBoard event file.

It is written anew from all points each time, so a run that was restarted holds every step once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

FILE = "events.out.tfevents.0000000000.tuneyard"
TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "epoch": "train/epoch",
    "eval_loss": "eval/loss",
}


def event_file(points: Iterable[Mapping[str, Any]]) -> bytes:
    """The points of metrics.jsonl as an event file."""
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[import-untyped]
    from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

    events = [Event(wall_time=0.0, file_version="brain.Event:2")]
    for point in points:
        values = [Summary.Value(tag=tag, simple_value=point[name]) for name, tag in TAGS.items() if name in point]
        events.append(Event(wall_time=point["time"], step=point["step"], summary=Summary(value=values)))
    return b"".join(_record(event.SerializeToString()) for event in events)


def _record(data: bytes) -> bytes:
    """One record of the TFRecord format: length and data, each with its masked CRC-32C."""
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    from tensorboardX.crc32c import crc32c  # type: ignore[import-untyped]

    value = crc32c(data)
    return struct.pack("<I", (((value >> 15) | (value << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
