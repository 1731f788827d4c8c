"""Errors made for their reader: what was wrong with the input, and how to mend it."""


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


class Stopped(Exception):
    """The run was asked to stop and did so at a step boundary. Not an error."""
