"""Ray Train's TorchTrainer in parts: torch only where it computes, and no process that a run here has no use for.

Whoever starts a run, Ray Train's controller and its cleaner would each spend seconds on loading torch before the first step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback, placement_group_callback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from train_loop.cleaner import CleanerCallback

GROUP_S = 1800  # that the workers wait for each other, in forming their group and in everything that they do together
LEAVE_S = 30.0


@dataclass
class ProcessGroup(BackendConfig):
    """torch's process group over the workers, as TorchConfig has it."""

    backend: str  # gloo, nccl

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroupBackend

    @property
    def train_func_context(self) -> Any:
        return _on_own_device

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend, "timeout_s": GROUP_S}


class _ProcessGroupBackend(Backend):
    """TorchTrainer's, called where the workers are: its own controller loads torch."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        meeting_point, ranks = worker_group.execute_single(0, get_address_and_port), range(len(worker_group))
        joining = [
            worker_group.execute_single_async(rank, _join, backend_config.backend, rank, len(ranks), *meeting_point)
            for rank in ranks
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        with contextlib.suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(_leave, len(worker_group) > 1), timeout=LEAVE_S)


def _join(backend: str, rank: int, world_size: int, address: str, port: int) -> None:
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(backend, rank, world_size, "env://", GROUP_S)


def _leave(others: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=others)


@contextlib.contextmanager
def _on_own_device() -> Iterator[None]:
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield


class Trainer(DataParallelTrainer):
    """What TorchTrainer does, for workers that read their rows themselves, with our cleaner of placement groups."""

    def _create_default_callbacks(self) -> list[Any]:
        theirs = placement_group_callback.PlacementGroupCleanerCallback
        callbacks = [c for c in super()._create_default_callbacks() if type(c) is not DatasetsCallback]
        return [CleanerCallback() if type(c) is theirs else c for c in callbacks]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        """As theirs does. But where the node's environment is this process's, and has what theirs would add to it, the controller
        gets none of its own: the processes that Ray has ready have no other."""
        here = ray.get_runtime_context()
        if here.get_actor_id() is None or RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR not in os.environ:
            return super()._initialize_and_run_controller(**arguments)
        beside = {ray._raylet.RAY_NODE_ID_KEY: here.get_node_id()}
        controller = ray.remote(num_cpus=0, label_selector=beside)(TrainController).remote(**arguments)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
