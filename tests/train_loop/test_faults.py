"""What broke, told from what Ray, torch and the system raise."""

import errno
import pickle

import pytest
import torch
from ray import exceptions as ray_errors
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal import exceptions as train_errors
from ray.train.v2.api.exceptions import PreemptionError
from ray.train.v2.api.preemption import PreemptionInfo

from train_loop.errors import Cause, DatasetError, RunFault, Stopped, UserError
from train_loop.faults import TELLING, classified, classify, killed_for_memory
from train_loop.spec import JobSpec


@pytest.fixture
def spec(local_job):
    return JobSpec.model_validate(local_job())


def actor_died(message, **fields):
    return ray_errors.ActorDiedError(ActorDiedErrorContext(actor_id=b"1" * 16, error_message=message, **fields))


def failed_health_check(message, **fields):
    return train_errors.WorkerHealthCheckFailedError("no answer", actor_died(message, **fields))


NODE_DIED = "The actor died because its node has died. Node Id: 1f"
KILLED = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
OOM = "1 worker(s) were killed due to the node running low on memory. Memory on the node was 15 GB / 16 GB"
DRAINED = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5123")
OURS = DatasetError("no rows", field="dataset_details.dataset_path", code="dataset_empty")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (PreemptionError(PreemptionInfo(1, {"a": [0, 2]})), Cause.PREEMPTED),
        (WorkerGroupError("", {0: GLOO, 1: failed_health_check(NODE_DIED, node_death_info=DRAINED)}), Cause.PREEMPTED),
        (WorkerGroupError("", {0: GLOO, 1: failed_health_check(NODE_DIED)}), Cause.NODE_LOST),
        (WorkerGroupError("", {0: GLOO, 1: failed_health_check(KILLED)}), Cause.WORKER_DIED),
        (WorkerGroupError("", {0: GLOO}), Cause.WORKER_DIED),
        (WorkerGroupError("", {0: ZeroDivisionError("division by zero")}), Cause.INTERNAL),
        (WorkerGroupError("", {1: RunFault(Cause.STORAGE_AWAY, "away"), 0: GLOO}), Cause.STORAGE_AWAY),
        (WorkerGroupError("", {0: train_errors.WorkerHealthCheckTimeoutError("600 s")}), Cause.HANG),
        (ControllerError(train_errors.WorkerGroupStartupTimeoutError(4)), Cause.NO_ROOM),
        (ControllerError(train_errors.WorkerGroupStartupFailedError("died")), Cause.WORKER_DIED),
        (actor_died(KILLED), Cause.WORKER_DIED),
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), Cause.WORKER_DIED),
        (ray_errors.NodeDiedError("gone"), Cause.NODE_LOST),
        (ray_errors.RaySystemError("no GCS"), Cause.CLUSTER_AWAY),
        (OSError(errno.ENOSPC, "No space left on device"), Cause.STORAGE_AWAY),
        (KeyError("x"), Cause.INTERNAL),
    ],
)
def test_what_breaks_around_a_job_has_its_cause(spec, error, cause):
    end = classify(error, spec)
    assert isinstance(end, RunFault)
    assert end.cause == cause
    assert end.message == end.message.strip()
    assert "\n" not in end.message
    copy = pickle.loads(pickle.dumps(end))
    assert (type(copy), copy.cause, copy.message, str(copy)) == (RunFault, cause, end.message, end.message)


@pytest.mark.parametrize(
    "error",
    [
        OURS,
        WorkerGroupError("", {0: GLOO, 1: OURS}),
        RayTaskError("f", "a remote traceback", OURS).as_instanceof_cause(),
        pickle.loads(pickle.dumps(WorkerGroupError("", {1: OURS}))),
    ],
)
def test_an_error_of_the_user_is_found_wherever_it_was_raised(spec, error):
    end = classify(error, spec)
    assert isinstance(end, UserError)
    assert (end.code, end.field, end.message) == (OURS.code, OURS.field, OURS.message)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 PB"
        ),
        WorkerGroupError("", {0: GLOO, 1: failed_health_check(OOM)}),
        ray_errors.OutOfMemoryError(OOM),
    ],
)
def test_out_of_memory_is_for_the_user_and_comes_with_advice(local_job, error):
    job = local_job(
        {
            "train_config.hyperparameters.per_device_train_batch_size": 6,
            "train_config.hyperparameters.gradient_checkpointing": False,
            "dataset_config.preprocessing.prompt.max_length": 4096,
        }
    )
    end = classify(error, JobSpec.model_validate(job))
    assert isinstance(end, UserError)
    assert (end.code, end.field) == ("out_of_memory", "train_config.hyperparameters.per_device_train_batch_size")
    for said in ("6", "gradient_accumulation_steps 2", "gradient_checkpointing true", "max_length 2048 (now 4096)"):
        assert said in end.message
    assert "quant" not in end.message  # it is quantised already


def test_advice_names_only_what_is_left_to_lower(local_job):
    job = local_job({"train_config.hyperparameters.per_device_train_batch_size": 1, "infra_config.gpu_type": "l4"})
    end = classify(MemoryError(), JobSpec.model_validate(job))
    assert end.message == "A worker ran out of memory. What would lower its need: a gpu_type with more memory (now l4)."


def test_advice_for_a_job_that_trains_every_weight_is_one_that_it_may_take(local_job):
    changes = {
        "train_config.hyperparameters.per_device_train_batch_size": 1,
        "train_config.train_type": "full",
        "model_details.quantization": None,
    }
    end = classify(MemoryError(), JobSpec.model_validate(local_job(changes)))
    assert (end.field, end.message) == (
        "train_config.train_type",
        "A worker ran out of memory. What would lower its need: train_type lora (now full).",
    )


def test_a_process_that_the_kernel_ended_for_memory_is_worth_another_try_and_comes_with_the_same_advice(spec):
    end = killed_for_memory(spec)
    assert end.cause == Cause.OUT_OF_MEMORY == classify(MemoryError(), spec).code
    assert end.message.endswith(classify(MemoryError(), spec).message.removeprefix("A worker ran out of memory."))


def test_only_three_ends_leave_a_run(spec):
    with pytest.raises(RunFault), classified(spec):
        raise KeyError("x")
    with pytest.raises(Stopped), classified(spec):
        raise Stopped
    with pytest.raises(DatasetError) as caught, classified(spec):
        raise OURS
    assert caught.value is OURS


def test_every_cause_has_its_place_among_the_others():
    assert sorted(TELLING) == sorted(Cause)
