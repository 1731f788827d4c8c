"""Processes kept ready for the next job on this machine, with their libraries loaded: serve_app.preload says what.

A job's own processes would spend most of the time to its first step on loading torch and transformers. Each of these is used
once: Ray gives a process that has worked for a job to no other one, and new ones are started when no job is starting.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import ray
from ray import JobID

from train_loop.launch import TRAINS, worker_environment

HELPERS = 5  # the job's actor, a task that prepares rows, Ray Train's controller, its cleaner and its barrier
START_S = 60.0  # Ray ends a process that hasn't started by then
KEEP_S = 10 * 365 * 86400
ASK_S = 10.0
NO_ENVIRONMENT = "{}"
PRELOADS = "RAY_preload_python_modules"


class ReadyProcesses:
    """Keeps so many processes ready for workers, and what a job has beside them, on the Ray node that this process is on.

    On the embedded one only, which has its workers load something: it starts anew with each version of the code, and these
    processes keep what they have loaded.
    """

    def __init__(self, num_workers: int) -> None:
        self._of_workers = _of_workers()
        self._wanted = {NO_ENVIRONMENT: HELPERS, self._of_workers: num_workers} if PRELOADS in os.environ else {}
        self._asked_at = float("-inf")

    def top_up(self) -> None:
        """Have as many as wanted, a while later. Raises grpc.RpcError."""
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

        if not self._wanted or time.monotonic() - self._asked_at < START_S:
            return
        here = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == here)
        with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
            raylet = NodeManagerServiceStub(channel)
            there = Counter(self._of_workers if trains else NO_ENVIRONMENT for trains in _waiting(raylet))
            for environment, wanted in self._wanted.items():
                if there[environment] < wanted:
                    _start(raylet, environment, wanted - there[environment])
                    self._asked_at = time.monotonic()


def _of_workers() -> str:
    """The environment of a run's workers as Ray Train has it, in Ray's writing: a process is known by it."""
    from ray.runtime_env import RuntimeEnv
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    return str(RuntimeEnv(env_vars=get_env_vars_to_propagate() | worker_environment()).serialize())


def _waiting(raylet: Any) -> Iterator[bool]:
    """Of each process that waits for its first job, whether it is a worker's."""
    from ray.core.generated.common_pb2 import WorkerType
    from ray.core.generated.node_manager_pb2 import GetNodeStatsRequest

    for process in raylet.GetNodeStats(GetNodeStatsRequest(), timeout=ASK_S).core_workers_stats:
        if process.worker_type == WorkerType.WORKER and process.job_id == JobID.nil().binary():
            with contextlib.suppress(psutil.Error):  # it has just ended
                yield TRAINS in psutil.Process(process.pid).environ()


def _start(raylet: Any, environment: str, number: int) -> None:
    from ray.core.generated.common_pb2 import Language
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest

    asked = PrestartWorkersRequest(language=Language.PYTHON, num_workers=number, keep_alive_duration_secs=KEEP_S)
    asked.runtime_env_info.serialized_runtime_env = environment
    raylet.PrestartWorkers(asked, timeout=ASK_S)
