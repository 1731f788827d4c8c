"""Whether a job that a fault has stopped is tried again, and when: one pure rule for every cause."""

from __future__ import annotations

from dataclasses import dataclass

from train_loop.errors import Cause

# The machines' fault and not the job's. They don't count against max_retries as long as the job gets on in between.
LOSSES = frozenset({Cause.PREEMPTED, Cause.NODE_LOST, Cause.CLUSTER_AWAY})
MAX_LOSSES = 20  # in a row without a step: such a job may be what kills the machines
NO_ROOM_WAIT_S = 30.0  # what holds the room may not be seen by whoever admits, or others were faster
FIRST_WAIT_S = 5.0
LONGEST_WAIT_S = 300.0


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job; `sentence` tells its owner."""

    retry: bool
    wait_s: float
    faults: int
    losses: int
    sentence: str


def judge(
    cause: Cause, *, faults: int, losses: int, progressed: bool, max_retries: int, last_cause: str | None = None
) -> Verdict:
    """Judge a fault of a job that had `faults` that count and `losses` in a row that don't; `progressed` since the last one.

    The first retry comes at once, later ones after waits that double.
    """
    if cause is Cause.NO_ROOM:
        return Verdict(True, NO_ROOM_WAIT_S, faults, losses, "The job is back in the queue; that counts for nothing.")
    losses = 0 if progressed else losses
    if cause in LOSSES:
        losses += 1
        if losses > MAX_LOSSES:
            return Verdict(False, 0.0, faults, losses, f"Giving up: {MAX_LOSSES} attempts in a row were lost without a step.")
        return Verdict(True, _wait_s(losses), faults, losses, "That doesn't count as a retry.")
    faults += 1
    # Once it may have been another process that took the memory; at the same step again it is the job.
    if cause is Cause.OUT_OF_MEMORY and cause == last_cause and not progressed:
        return Verdict(False, 0.0, faults, losses, "Giving up: that was the second time in a row without a step between.")
    if faults > max_retries:
        return Verdict(False, 0.0, faults, losses, f"Giving up after {faults} faults (infra_config.max_retries = {max_retries}).")
    return Verdict(True, _wait_s(faults), faults, losses, f"Retry {faults} of {max_retries}.")


def _wait_s(in_a_row: int) -> float:
    return 0.0 if in_a_row == 1 else min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** (in_a_row - 2))
