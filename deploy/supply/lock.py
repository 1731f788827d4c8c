"""What a lock names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Pin(NamedTuple):
    """A line of a lock, and the name and version in it; of a build for a device (2.13.0+cpu) the release."""

    line: str
    name: str
    version: str


def pins(lock: str) -> Iterator[Pin]:
    """Each line's."""
    for line in lock.splitlines():
        if line.strip() and not line.startswith(("#", "-")):
            pin = line.split(";")[0].strip()
            name, _, version = pin.partition("==")
            yield Pin(pin, name.partition("[")[0], version.partition("+")[0])
