"""infra_config.max_runtime_s: the time of all attempts together, then a job saves and ends; a resume gives it as long again."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest

from serve_app.job_actor import JobActor
from serve_app.lifecycle import Status
from serve_app.store.jobs import JobStore
from tests.conftest import DOCUMENTED, with_fields
from tests.serve_app.simulated import World
from train_loop.errors import Cause, Stopped
from train_loop.spec import JobSpec

MAX_S = 60


@pytest.fixture
def world():
    """A clock for the store and for job actors, which start nothing here."""
    world = World()
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch("serve_app.job_actor.time", SimpleNamespace(monotonic=world.awake_s)))
        patches.enter_context(mock.patch("serve_app.job_actor.launch", side_effect=Stopped()))
        yield world


@pytest.fixture
def attempt(world, settings, store):
    """Start the next attempt at the one job; its actor, without Ray and its threads."""
    clocked = JobStore(store.engine, world.clock)
    spec = JobSpec.model_validate(with_fields(DOCUMENTED, {"infra_config.max_runtime_s": MAX_S}))
    request_id = clocked.insert(spec, "queued")[0].request_id

    def start(number):
        assert clocked.start_attempt(request_id, number - 1, 1) is not None
        actor = JobActor.__new__(JobActor)
        actor.open(settings, clocked, request_id, number, "node-0")
        actor.live["phase"] = "training"
        return actor

    return start


def test_the_time_of_all_attempts_counts_and_a_resume_gives_as_long_again(world, attempt):
    first = attempt(1)
    world.later(MAX_S - 20)
    first.report()
    assert not first.stop
    first.store.record_fault(first.job.request_id, 1, Cause.WORKER_DIED, "died.")
    world.later(1000)  # between two attempts it doesn't run
    second = attempt(2)
    world.later(19)
    second.report()
    assert not second.stop
    world.later(2)
    second.report()
    assert second.stop  # the workers see it at the next step, and save
    second.write(second.run())
    job = second.store.get(second.job.request_id)
    assert (job.status, job.error_code) == (Status.FAILED, "max_runtime_exceeded")
    assert "resume to go on for as long again" in job.error_message
    second.store.resume(job.request_id)
    third = attempt(3)
    world.later(MAX_S - 1)
    third.report()
    assert not third.stop


def test_a_run_out_of_time_that_does_not_stop_is_ended_after_the_grace_period(world, attempt):
    actor = attempt(1)
    actor._exit = mock.Mock()
    world.later(MAX_S + 1)
    actor.report()
    world.later(actor.settings.cancel_grace_s - 1)
    assert not actor._is_over()
    world.later(2)
    assert actor._is_over()
    actor._exit.assert_called_once()
    assert actor.store.get(actor.job.request_id).error_code == "max_runtime_exceeded"


def test_a_wish_to_cancel_comes_before_the_end_of_the_time(world, attempt):
    actor = attempt(1)
    actor.store.request_cancel(actor.job.request_id)
    world.later(MAX_S + 1)
    actor.report()
    actor.write(actor.run())
    job = actor.store.get(actor.job.request_id)
    assert (job.status, job.cancel_requested) == (Status.RUNNING, True)  # CANCELED is the dispatcher's to write
