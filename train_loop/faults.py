"""Which fault an exception of a run is: one place that knows how Ray, torch and storage say that something broke."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from train_loop.errors import Cause, RunFault, Stopped, TrainingError, UserError, first_line
from train_loop.spec import JobSpec

# When workers failed for several reasons, the first of these is the one that explains the others.
TELLING = (
    Cause.SUPERSEDED,
    Cause.PREEMPTED,
    Cause.NODE_LOST,
    Cause.HANG,
    Cause.STORAGE_AWAY,
    Cause.CLUSTER_AWAY,
    Cause.NO_ROOM,
    Cause.OUT_OF_MEMORY,
    Cause.WORKER_DIED,
    Cause.INTERNAL,
)
MAX_WRAPPERS = 20
REACH_S = 5.0
REACH_AT_ONCE = 32
NODE_GONE = ("its node has died", "node it was running on is dead", "is dead because its owner has died")
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "NCCL", "recv timeout")
CHILD_GONE = ("DataLoader worker",)
NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "low on memory", "CUBLAS_STATUS_ALLOC_FAILED")


End = UserError | RunFault | Stopped


@contextlib.contextmanager
def classified(spec: JobSpec) -> Iterator[None]:
    """Inside, every exception becomes one of the three ends: UserError, RunFault or Stopped."""
    try:
        yield
    except Exception as error:
        end = classify(error, spec)
        if end is error:
            raise
        raise end from error


def classify(error: BaseException, spec: JobSpec) -> End:
    """The end that `error` means: for the user to mend, for another attempt, or as asked for."""
    if (ours := _ours(error)) is not None:
        return ours
    # Without Ray (--local) none of its errors can come.
    if "ray" in sys.modules and (end := _of_ray(error, spec)) is not None:
        return end
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _says(error, NO_MEMORY):
        return out_of_memory(spec)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return RunFault(Cause.STORAGE_AWAY, f"The disk can't be written: {first_line(error)}")
    if _says(error, PEER_GONE):
        return RunFault(Cause.WORKER_DIED, f"A worker lost its connection to another: {first_line(error)}")
    if _says(error, CHILD_GONE):
        return RunFault(Cause.WORKER_DIED, f"A process of the run died: {first_line(error)}")
    return _internal(error)


def machines_lost(node_ids: Collection[str]) -> set[str]:
    """Those of these Ray nodes that are gone: Ray says so, or the raylet can't be reached.

    Ray takes up to half a minute to miss a machine that went without a word, while the death of its workers shows at once.
    """
    import ray

    asked = [node for node in ray.nodes() if node["NodeID"] in node_ids]
    with ThreadPoolExecutor(REACH_AT_ONCE) as pool:
        there = pool.map(lambda node: node["Alive"] and _answers(node), asked)
        return {node["NodeID"] for node, is_there in zip(asked, there, strict=True) if not is_there}


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), REACH_S).close()
    except OSError:
        return False
    return True


def _ours(error: BaseException | None) -> End | None:
    """The end that our own code raised, from under Ray's wrappers."""
    ray_errors: Any = sys.modules.get("ray.exceptions")
    for _ in range(MAX_WRAPPERS):
        # Ray's own class over ours has the class's attributes, and a remote traceback as its text.
        wrapper = ray_errors is not None and isinstance(error, ray_errors.RayError)
        if isinstance(error, UserError | RunFault | Stopped) and not wrapper:
            return error
        if not isinstance(error, BaseException):
            return None
        error = getattr(error, "cause", None) or error.__cause__
    return None


def _of_ray(error: BaseException, spec: JobSpec) -> End | None:
    from ray import exceptions as ray_errors
    from ray.train import TrainingFailedError

    if isinstance(error, ray_errors.RayTaskError):
        return classify(error.cause, spec) if error.cause is not None else None
    if isinstance(error, TrainingFailedError):
        return _of_training(error, spec)
    if isinstance(error, ray_errors.OutOfMemoryError):
        return out_of_memory(spec)
    if isinstance(error, ray_errors.RayActorError):
        return _of_actor(error, spec)
    if isinstance(error, ray_errors.NodeDiedError | ray_errors.LocalRayletDiedError | ray_errors.ObjectLostError):
        return RunFault(Cause.NODE_LOST, f"A machine of the run is gone: {first_line(error)}")
    if isinstance(error, ray_errors.WorkerCrashedError):
        return RunFault(Cause.WORKER_DIED, f"A process of the run died: {first_line(error)}")
    if isinstance(error, ray_errors.RaySystemError | ray_errors.RpcError | ray_errors.GetTimeoutError):
        return RunFault(Cause.CLUSTER_AWAY, f"Ray doesn't answer: {first_line(error)}")
    return None


def _of_training(error: BaseException, spec: JobSpec) -> End:
    """What Ray Train raises from `fit`."""
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2.api.exceptions import PreemptionError

    if isinstance(error, PreemptionError):
        ranks = ", ".join(map(str, error.preemption_info.preempted_ranks))
        return RunFault(Cause.PREEMPTED, f"The machine of worker {ranks} was taken back.")
    if isinstance(error, ControllerError):
        return _of_system(error.controller_failure, spec)
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        found = [_of_system(e, spec) for _, e in sorted(error.worker_failures.items())]
        return min(found, key=lambda end: TELLING.index(end.cause) if isinstance(end, RunFault) else -1)
    return _internal(error)


def _of_system(error: BaseException, spec: JobSpec) -> End:
    """What Ray Train says of one worker, or of its controller."""
    from ray.train.v2._internal import exceptions as train_errors

    if isinstance(error, train_errors.UserExceptionWithTraceback):
        return classify(error._base_exc, spec)
    if isinstance(error, train_errors.WorkerHealthCheckFailedError):
        return classify(error.health_check_failure, spec)
    if isinstance(error, train_errors.WorkerHealthCheckTimeoutError | train_errors.CollectiveTimeoutError):
        return RunFault(Cause.HANG, f"A worker doesn't answer: {first_line(error)}")
    if isinstance(error, train_errors.WorkerGroupStartupTimeoutError):
        return RunFault(Cause.NO_ROOM, f"The cluster had no room for {error.num_workers} workers.")
    if isinstance(error, train_errors.WorkerGroupStartupFailedError):
        return RunFault(Cause.WORKER_DIED, "A worker, or its machine, died while it started.")
    return classify(error, spec)


def _of_actor(error: BaseException, spec: JobSpec) -> End:
    if getattr(error, "preempted", False):
        return RunFault(Cause.PREEMPTED, "The machine of a worker was taken back.")
    if any(sign in str(error) for sign in NODE_GONE):
        return RunFault(Cause.NODE_LOST, "The machine of a worker is gone.")
    if any(sign in str(error) for sign in NO_MEMORY):  # Ray's memory monitor ends the largest worker of a full machine
        return out_of_memory(spec)
    return RunFault(Cause.WORKER_DIED, f"A process of the run died: {str(error).strip().splitlines()[-1][:300]}")


def _says(error: BaseException, signs: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def out_of_memory(spec: JobSpec) -> UserError:
    """An out-of-memory as advice: which settings of this job would lower what a worker needs."""
    field, advice = _what_lowers_memory(spec)
    return TrainingError(f"A worker ran out of memory. {advice}", field=field, code=str(Cause.OUT_OF_MEMORY))


def killed_for_memory(spec: JobSpec) -> RunFault:
    """The same where the kernel ended a process: what took the memory may not have been this job, so it is no UserError."""
    _, advice = _what_lowers_memory(spec)
    text = "The kernel ended a process of the run, as its machine or container ran out of memory."
    return RunFault(Cause.OUT_OF_MEMORY, f"{text} {advice}")


def _what_lowers_memory(spec: JobSpec) -> tuple[str, str]:
    """The first setting that would, and a sentence with all of them."""
    hp, prompt = spec.train_config.hyperparameters, spec.dataset_config.preprocessing.prompt
    advice: list[tuple[str, str]] = []
    if (batch := hp.per_device_train_batch_size) > 1:
        smaller, accumulation = 1 if batch % 2 else batch // 2, hp.gradient_accumulation_steps
        advice.append(
            (
                "train_config.hyperparameters.per_device_train_batch_size",
                f"per_device_train_batch_size {smaller} (now {batch}), with gradient_accumulation_steps "
                f"{accumulation * batch // smaller} (now {accumulation}) for the same global batch",
            )
        )
    if not hp.gradient_checkpointing:
        advice.append(("train_config.hyperparameters.gradient_checkpointing", "gradient_checkpointing true (now false)"))
    if spec.train_config.train_type == "full":  # which quantised weights don't take
        advice.append(("train_config.train_type", "train_type lora (now full)"))
    elif spec.model_details.quantization is None:
        advice.append(("model_details.quantization", "quantization.quant_bits 4 (now none)"))
    if prompt.max_length > 512:
        advice.append(
            (
                "dataset_config.preprocessing.prompt.max_length",
                f"prompt.max_length {prompt.max_length // 2} (now {prompt.max_length})",
            )
        )
    if not advice:
        advice.append(("infra_config.gpu_type", f"a gpu_type with more memory (now {spec.infra_config.gpu_type})"))
    return advice[0][0], f"What would lower its need: {'; '.join(text for _, text in advice)}."


def _internal(error: BaseException) -> RunFault:
    return RunFault(Cause.INTERNAL, f"The run failed ({type(error).__name__}): {first_line(error)}")
