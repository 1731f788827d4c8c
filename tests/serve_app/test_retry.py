"""When a fault is tried again."""

from hypothesis import given
from hypothesis import strategies as st

from serve_app.retry import LONGEST_WAIT_S, LOSSES, MAX_LOSSES, NO_ROOM_WAIT_S, judge
from train_loop.errors import Cause


@given(st.sampled_from(sorted(set(Cause) - LOSSES - {Cause.NO_ROOM})), st.integers(0, 10))
def test_a_fault_of_the_run_is_retried_max_retries_times(cause, max_retries):
    faults, waits = 0, []
    while (verdict := judge(cause, faults=faults, losses=0, progressed=True, max_retries=max_retries)).retry:
        faults, waits = verdict.faults, [*waits, verdict.wait_s]
    assert len(waits) == max_retries
    assert waits == sorted(waits)
    assert all(wait <= LONGEST_WAIT_S for wait in waits)


@given(st.sampled_from(sorted(LOSSES)), st.integers(0, 3))
def test_a_lost_machine_counts_for_nothing_while_the_job_gets_on(cause, faults):
    losses = 0
    for _ in range(3 * MAX_LOSSES):
        verdict = judge(cause, faults=faults, losses=losses, progressed=True, max_retries=0)
        losses = verdict.losses
        assert (verdict.retry, verdict.faults, verdict.wait_s) == (True, faults, 0.0)


def test_a_job_that_the_kernel_ends_for_memory_has_one_more_try_at_the_same_step():
    def verdict(progressed, last_cause):
        return judge(Cause.OUT_OF_MEMORY, faults=1, losses=0, progressed=progressed, max_retries=50, last_cause=last_cause)

    assert verdict(False, None).retry
    assert verdict(False, "node_lost").retry
    assert verdict(True, "out_of_memory").retry
    assert not verdict(False, "out_of_memory").retry


def test_a_job_without_room_waits_for_as_long_as_it_takes_and_is_never_given_up():
    for losses in (0, MAX_LOSSES):
        verdict = judge(Cause.NO_ROOM, faults=3, losses=losses, progressed=False, max_retries=0)
        assert (verdict.retry, verdict.wait_s, verdict.faults, verdict.losses) == (True, NO_ROOM_WAIT_S, 3, losses)


def test_a_job_that_only_loses_machines_ends():
    losses, tries = 0, 0
    while (verdict := judge(Cause.NODE_LOST, faults=0, losses=losses, progressed=False, max_retries=3)).retry:
        losses, tries = verdict.losses, tries + 1
    assert tries == MAX_LOSSES
