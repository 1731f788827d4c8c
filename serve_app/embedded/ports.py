"""Free TCP ports on the loopback interface."""

from __future__ import annotations

import random
import socket

GRPC_OFFSET = 10_000  # SeaweedFS listens for gRPC at each port + 10000


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(count: int, *, with_grpc: bool = False) -> list[int]:
    """`count` distinct free ports below the ephemeral range; `with_grpc` also wants each port + 10000 free.

    Nothing holds them until their server starts; a start that loses that race is tried again by its caller.
    """
    found: list[int] = []
    for port in random.sample(range(12_000, 22_000), 10_000):
        if _is_free(port) and (not with_grpc or _is_free(port + GRPC_OFFSET)):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports on 127.0.0.1")
