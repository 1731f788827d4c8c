"""How a plan that Ray's worker can't finish is told: the worker is a process, and whatever happens to it is no server error."""

import os
import time

import pytest
import ray

from serve_app import app
from serve_app.app import RayRuntime
from serve_app.errors import ApiError
from tests.conftest import DOCUMENTED
from train_loop.spec import JobSpec


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    # Never that of somebody else on this machine.
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    ("fate", "limit_s", "said"),
    [
        (lambda spec: os.kill(os.getpid(), 9), 60.0, "was ended"),
        (lambda spec: time.sleep(600), 1.0, "took longer than 1 s"),
    ],
)
def test_a_worker_that_does_not_come_back_is_503(settings, monkeypatch, fate, limit_s, said):
    monkeypatch.setattr(app, "plan_in_worker", fate)
    monkeypatch.setattr(app, "TIMEOUT_S", limit_s)
    with pytest.raises(ApiError, match=said) as caught:
        RayRuntime(settings).plan(JobSpec.model_validate(DOCUMENTED))
    assert caught.value.status == 503
    assert int(caught.value.headers["Retry-After"]) > 0
