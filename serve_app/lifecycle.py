"""The job state machine: states and legal transitions, nothing else."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """What a user sees."""

    QUEUED = "QUEUED"  # durable, waiting for its turn
    RUNNING = "RUNNING"  # an attempt is under way
    COMPLETED = "COMPLETED"  # the adapter is in storage, with its manifest
    FAILED = "FAILED"  # error_code and error_message say why
    CANCELED = "CANCELED"  # stopped on request


class Phase(StrEnum):
    """Where a job is, finer than its status."""

    QUEUED = "queued"
    WAITING_FOR_RESOURCES = "waiting_for_resources"
    PREPARING_DATA = "preparing_data"
    LOADING_MODEL = "loading_model"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAVING = "saving"
    EXPORTING = "exporting"
    DONE = "done"


# The run's workers may not hold their resources yet.
BEFORE_WORKERS = frozenset({Phase.QUEUED, Phase.PREPARING_DATA, Phase.WAITING_FOR_RESOURCES})
# A run that is to end there can be ended at once.
NOTHING_TO_SAVE = BEFORE_WORKERS | {Phase.LOADING_MODEL}


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.CANCELED, Status.FAILED}),
    # Back to the queue only where the operator asked for it, and nothing of the attempt is left.
    Status.RUNNING: frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELED, Status.QUEUED}),
    Status.COMPLETED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELED: frozenset(),
}
FINAL = frozenset(status for status, after in TRANSITIONS.items() if not after)

RESUMABLE = frozenset({Status.FAILED, Status.CANCELED})  # by an explicit resume, which makes them QUEUED again


class IllegalTransition(Exception):
    """A job can't go from its state to the one asked for."""


def check(old: Status, new: Status) -> None:
    """Raise IllegalTransition unless `old` may become `new`."""
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(f"a job that is {old} can't become {new}")
