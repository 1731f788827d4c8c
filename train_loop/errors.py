"""How an attempt at a job ends other than well: the input is wrong (UserError), something around it broke (RunFault), or it was
asked to stop (Stopped). Made for their reader: what happened, and how to mend it."""

from __future__ import annotations

from enum import StrEnum

MAX_SAID_CHARS = 300


def first_line(error: BaseException | None, otherwise: str = "no message") -> str:
    """What a library says, as far as it fits into a sentence of ours; `otherwise` where it says nothing."""
    return (str(error).strip().splitlines() or [otherwise])[0][:MAX_SAID_CHARS]


def why_unloadable(error: BaseException) -> str:
    """What keeps a model's files from being loaded, as a library says it; but none of ours is ever told to run their code."""
    if "trust_remote_code" in str(error):
        return "it needs code that comes with it (auto_map), and no model's own code is run here"
    return first_line(error, type(error).__name__)


class UserError(Exception):
    """The user's input, or something they own (bucket, keys, rows), stops the job.

    `code` is stable and machine-readable, `field` is the dotted name in the request, the message is one or two
    plain sentences that say what is wrong and what would be right. Never retried.
    """

    code = "user_error"

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments don't survive the default pickling, and these cross process boundaries.
        return _rebuild, (type(self), self.message, self.field, self.code)


def _rebuild(cls: type[UserError], message: str, field: str | None, code: str) -> UserError:
    return cls(message, field=field, code=code)


class DatasetError(UserError):
    """The dataset can't be read, or holds too few usable rows."""

    code = "dataset_error"


class ModelError(UserError):
    """The base model can't be found or doesn't fit the request."""

    code = "model_error"


class TrainingError(UserError):
    """Training can't go on with this input (for example a loss that is no longer a number)."""

    code = "training_error"


class Cause(StrEnum):
    """What broke around a job."""

    PREEMPTED = "preempted"  # a machine was taken back, with or without notice
    NODE_LOST = "node_lost"  # a machine is gone
    OUT_OF_MEMORY = "out_of_memory"  # the kernel ended a process of the run as memory ran out
    WORKER_DIED = "worker_died"  # a process of the run was ended, or crashed
    HANG = "hang"  # no step for many times what a step takes
    STORAGE_AWAY = "storage_away"  # the run's storage couldn't be read or written for minutes
    SUPERSEDED = "superseded"  # another attempt has begun, or may have
    CLUSTER_AWAY = "cluster_away"  # Ray doesn't answer
    NO_ROOM = "no_room"  # the workers couldn't be placed: nothing broke
    INTERNAL = "internal"  # an error of ours


class RunFault(Exception):
    """This attempt ended by no fault of the job: another attempt goes on from the last checkpoint.

    The message is a plain sentence that says what broke.
    """

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause
        self.message = message

    def __reduce__(self) -> tuple[object, ...]:
        return RunFault, (self.cause, self.message)


class Stopped(Exception):
    """The run was asked to stop and did so at a step boundary. Not an error."""
