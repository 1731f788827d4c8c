"""TCP ports on the loopback interface: free ones, and the same ones again after a restart."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path

from serve_app.settings import write_private

GRPC_OFFSET = 10_000  # SeaweedFS listens for gRPC at each port + 10000


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: connections of an earlier run that linger in TIME_WAIT don't count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _usable(port: int, with_grpc: bool) -> bool:
    return _is_free(port) and (not with_grpc or _is_free(port + GRPC_OFFSET))


def remembered_ports(path: Path, count: int, *, with_grpc: bool = False) -> list[int]:
    """The ports that `path` remembers from the last run, or other free ones where somebody has taken one of them since.

    They outlive a restart because clients, stored secrets and the links of finished jobs name them.
    """
    try:
        ports = [int(port) for port in json.loads(path.read_text())]
    except (FileNotFoundError, ValueError, TypeError):
        ports = []
    if len(ports) != count or not all(_usable(port, with_grpc) for port in ports):
        ports = free_ports(count, with_grpc=with_grpc)
        write_private(path, json.dumps(ports))
    return ports


def free_ports(count: int, *, with_grpc: bool = False) -> list[int]:
    """`count` distinct free ports below the ephemeral range; `with_grpc` also wants each port + 10000 free.

    Nothing holds them until their server starts; a start that loses that race is tried again by its caller.
    """
    found: list[int] = []
    for port in random.sample(range(12_000, 22_000), 10_000):
        if _usable(port, with_grpc):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports on 127.0.0.1")
