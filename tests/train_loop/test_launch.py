"""Errors on their way through Ray keep the code and the sentence that were made for the user."""

from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError

from train_loop.errors import DatasetError
from train_loop.faults import classify
from train_loop.launch import ActorMonitor
from train_loop.spec import JobSpec


@pytest.fixture
def wrapped():
    """What ray.get raises for an error of ours: an instance of Ray's class and of ours."""
    error = DatasetError("the role can't be assumed.", field="dataset_details.secret_id", code="role_not_assumable")
    both = RayTaskError("keys", "a remote traceback", error).as_instanceof_cause()
    assert isinstance(both, DatasetError)
    assert both.code != error.code
    return both


def test_an_error_of_a_data_task_keeps_its_code(wrapped, local_job):
    assert classify(wrapped, JobSpec.model_validate(local_job())).code == "role_not_assumable"


def test_an_error_of_the_vault_keeps_its_code_and_brings_no_remote_traceback(wrapped, monkeypatch):
    def get(_):
        raise wrapped

    keys = SimpleNamespace(remote=lambda: None)
    monkeypatch.setattr("ray.get_actor", lambda *_, **__: SimpleNamespace(keys=keys))
    monkeypatch.setattr("ray.get", get)
    with pytest.raises(DatasetError) as caught:
        ActorMonitor("job-x", "tuneyard").keys()
    assert caught.value.code == "role_not_assumable"
    assert str(caught.value) == caught.value.message == "the role can't be assumed."
