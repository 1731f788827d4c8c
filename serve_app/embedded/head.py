"""The embedded Ray and the service on it, in a process of its own: `python -m serve_app.embedded.head`.

Ray can't outlive its head: without the GCS nothing new starts and what runs gives up a minute later. So this process ends as soon
as a part that Ray can't do without is gone, and its supervisor starts another one. Jobs survive that because all they need is in
the store and in object storage.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import psutil

from serve_app.embedded.ports import remembered_ports
from serve_app.settings import Settings, write_private

VITAL = ("gcs_server", "raylet")
WATCH_S = 0.5


def main(ray_dir: str, ready_file: str, num_cpus: str) -> NoReturn:
    """Start Ray and the service, say where they are in `ready_file`, and stay until killed or unable to go on."""
    supervisor = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to the supervisor too, which sees to us
    url, dashboard_url = _start_ray(Settings.load(), ray_dir, int(num_cpus))
    vital = [p for p in psutil.Process().children(recursive=True) if p.name() in VITAL]
    if {p.name() for p in vital} != set(VITAL):
        raise RuntimeError(f"of {', '.join(VITAL)} only {[p.name() for p in vital]} are there")
    write_private(Path(ready_file), json.dumps({"url": url, "dashboard_url": dashboard_url}))
    while True:
        time.sleep(WATCH_S)
        lost = [p.pid for p in vital if not p.is_running() or p.status() == psutil.STATUS_ZOMBIE]
        if lost or os.getppid() != supervisor:
            sys.stderr.write("a part of Ray ended by itself\n" if lost else "the supervisor is gone\n")
            # Ray's own shutdown would wait for what is dead; the kernel ends its processes with this one.
            os._exit(1)


def _start_ray(settings: Settings, ray_dir: str, num_cpus: int) -> tuple[str, str]:
    # Read when Ray is imported: only as a one-machine Ray, its default outside Linux, does it stay off the network.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray
    from ray._private import parameter

    from serve_app.deployment import deploy
    from serve_app.proxy import CALLBACK
    from serve_app.ready import PRELOADS

    # Everything listens on 127.0.0.1, and `ray job submit` reads no token unless it is told to: RAY_AUTH_MODE=token for both
    # closes it to other users of this machine.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # Ray makes all its workers nice, the ingress like the training; only the training should be.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ |= CALLBACK
    # One machine is there or isn't: nobody takes it back, so no process of each run need watch for that.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # What Ray Train gives its controller: see train_loop.trainer.
    os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")
    # What serve_app.ready has Ray start is of use; what Ray would start by itself now would load all that for the ingress.
    os.environ |= {PRELOADS: "serve_app.preload", "RAY_prestart_worker_first_driver": "0"}
    # Ray's own choice is one port for every Ray of the machine: on the second of them no `ray job submit` finds an agent.
    parameter.RayParams = partial(parameter.RayParams, dashboard_agent_listen_port=0)
    http_port, dashboard_port = remembered_ports(settings.home / "ports.json", 2)
    context = ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=0,
        object_store_memory=256 << 20,
        dashboard_host="127.0.0.1",
        dashboard_port=dashboard_port,
        namespace=settings.ray_namespace,
        _temp_dir=ray_dir,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    # Without this file a job submitted to this Ray gets the address of whichever Ray its supervisor finds on the machine.
    Path(ray_dir, "ray_current_cluster").write_text(context.address_info["gcs_address"])
    deploy(settings, "127.0.0.1", http_port)
    return f"http://127.0.0.1:{http_port}", f"http://{context.dashboard_url}"


if __name__ == "__main__":
    main(*sys.argv[1:])
