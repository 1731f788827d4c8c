"""Processes kept ready for the next job on this machine, with their libraries loaded: serve_app.preload says what.

A job's own processes would spend most of the time to its first step on loading torch and transformers. Each of these is used
once: Ray gives a process that has worked for a job to no other one, and new ones are started when no job is starting.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import psutil
import ray
from ray import JobID

from serve_app.preload import is_of_no_job
from train_loop.launch import TRAINS, worker_environment

HELPERS = 5  # the job's actor, a task that prepares rows, Ray Train's controller, its cleaner and its barrier
START_S = 60.0  # Ray ends a process that hasn't started by then
KEEP_S = 10 * 365 * 86400
ASK_S = 10.0
NO_ENVIRONMENT = "{}"
PRELOADS = "RAY_preload_python_modules"


class Found(NamedTuple):
    """A process that was started for no job; `waits` says whether it still has none."""

    process: Hashable
    environment: str
    waits: bool


class Pool:
    """How many processes of each environment are to be started, so that as many wait as are `wanted`.

    One that was asked for is on its way until it is seen, whether it waits or a job has it by then, or for START_S.
    """

    def __init__(self, wanted: Mapping[str, int]) -> None:
        self._wanted = wanted
        self._coming = list[tuple[str, float]]()  # until when, oldest first
        self._seen = set[Hashable]()

    def ask(self, found: Iterable[Found], now: float, *, one_by_one: bool = False) -> Counter[str]:
        """What to start now, when these are there; one, and none while one comes, where the machine has other work."""
        there = {f.process: f for f in found}
        come = Counter(f.environment for process, f in there.items() if process not in self._seen)
        self._seen = set(there)
        left = list[tuple[str, float]]()
        for environment, until in self._coming:
            if come[environment]:
                come[environment] -= 1
            elif now < until:
                left.append((environment, until))
        waiting = Counter(f.environment for f in there.values() if f.waits)
        missing = Counter(self._wanted) - waiting - Counter(environment for environment, _ in left)
        if one_by_one:
            missing = Counter([] if left else list(missing)[:1])
        self._coming = left + [(environment, now + START_S) for environment in missing.elements()]
        return missing


class ReadyProcesses:
    """Keeps so many processes ready for workers, and what a job has beside them, on the Ray node that this process is on.

    On the embedded one only, which has its workers load something: it starts anew with each version of the code, and these
    processes keep what they have loaded.
    """

    def __init__(self, num_workers: int) -> None:
        self._of_workers = _of_workers()
        self._on = PRELOADS in os.environ
        self._pool = Pool({NO_ENVIRONMENT: HELPERS, self._of_workers: num_workers})

    def top_up(self, *, one_by_one: bool) -> None:
        """Have as many as wanted, a while later. Raises grpc.RpcError.

        One by one takes longer and leaves a job that trains, and who asks for its status, their share of the cores.
        """
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

        if not self._on:
            return
        here = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == here)
        with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
            raylet = NodeManagerServiceStub(channel)
            asked = self._pool.ask(self._found(raylet), time.monotonic(), one_by_one=one_by_one)
            for environment, number in asked.items():
                _start(raylet, environment, number)

    def _found(self, raylet: Any) -> Iterator[Found]:
        from ray.core.generated.common_pb2 import WorkerType
        from ray.core.generated.node_manager_pb2 import GetNodeStatsRequest

        for worker in raylet.GetNodeStats(GetNodeStatsRequest(), timeout=ASK_S).core_workers_stats:
            if worker.worker_type != WorkerType.WORKER:
                continue
            with contextlib.suppress(psutil.Error):  # it has just ended
                process = psutil.Process(worker.pid)
                environment = process.environ()  # as it was started
                if is_of_no_job(environment):
                    kind = self._of_workers if TRAINS in environment else NO_ENVIRONMENT
                    yield Found(process, kind, worker.job_id == JobID.nil().binary())


def _of_workers() -> str:
    """The environment of a run's workers as Ray Train has it, in Ray's writing: a process is known by it."""
    from ray.runtime_env import RuntimeEnv
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    return str(RuntimeEnv(env_vars=get_env_vars_to_propagate() | worker_environment()).serialize())


def _start(raylet: Any, environment: str, number: int) -> None:
    from ray.core.generated.common_pb2 import Language
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest

    asked = PrestartWorkersRequest(language=Language.PYTHON, num_workers=number, keep_alive_duration_secs=KEEP_S)
    asked.runtime_env_info.serialized_runtime_env = environment
    raylet.PrestartWorkers(asked, timeout=ASK_S)
