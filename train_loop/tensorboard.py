"""The run's metrics as a TensorBoard event file: its start, and an event for each point.

It is written anew from all points each time, so a run that was restarted holds every step once.
"""

from __future__ import annotations

import struct

from train_loop.trackers.curves import Point, values


def start() -> bytes:
    """What comes before the events."""
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[import-untyped]

    return _record(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())


def event(point: Point) -> bytes:
    """A point of metrics.jsonl."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

    curves = [Summary.Value(tag=name, simple_value=value) for name, value in values(point).items()]
    return _record(Event(wall_time=point["time"], step=point["step"], summary=Summary(value=curves)).SerializeToString())


def _record(data: bytes) -> bytes:
    """One record of the TFRecord format: length and data, each with its masked CRC-32C."""
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    from tensorboardX.crc32c import crc32c  # type: ignore[import-untyped]

    value = crc32c(data)
    return struct.pack("<I", (((value >> 15) | (value << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
