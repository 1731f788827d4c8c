"""What a Ray cluster says of itself, as JSON on stdout: `python -m serve_app.ray_probe <address> <namespace>`.

A process of its own, so that whoever asks can end it: a cluster may hang, and Ray ends a driver that loses it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

DISPATCHER_S = 10.0


def probe(address: str, namespace: str) -> dict[str, Any]:
    """Nodes with their resources, and whether the dispatcher answers; or an error in words."""
    import ray

    from serve_app.cluster import RayCluster, dispatcher_answers
    from serve_app.reach import CannotReach, TokenRefused, connect

    try:
        connect(address, namespace)
    except (CannotReach, TokenRefused) as error:
        return {"error": str(error), "token": isinstance(error, TokenRefused)}
    dispatcher = dispatcher_answers(namespace, DISPATCHER_S)
    nodes = [{"resources": dict(node.resources), "draining": node.draining} for node in RayCluster(namespace).nodes()]
    return {"ray": ray.__version__, "nodes": nodes, "dispatcher": dispatcher}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe(*sys.argv[1:])) + "\n")
    sys.stdout.flush()
