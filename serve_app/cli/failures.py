"""What a command says and exits with when it fails."""

from __future__ import annotations

import traceback
from pathlib import Path

EXIT_CODES = {
    0: "done",
    1: "refused or failed",
    2: "wrong usage",
    3: "the service (for serve: Ray) can't be reached",
    130: "interrupted",
}
FAILED, UNREACHABLE, INTERRUPTED = 1, 3, 130
PACKAGES = ("serve_app", "train_loop")


def in_words(error: Exception) -> tuple[str, int]:
    """The sentence for stderr and the exit code. Imports only now what knows the kinds of errors."""
    import httpx
    from pydantic import ValidationError

    from serve_app.client import ApiError, DownloadError
    from serve_app.store.jobs import STORE_AWAY
    from train_loop.errors import UserError

    if isinstance(error, ApiError | DownloadError):
        return str(error), FAILED
    if isinstance(error, httpx.TransportError):
        return f"the service can't be reached: {error or type(error).__name__}", UNREACHABLE
    if isinstance(error, UserError):
        return error.message, FAILED
    if isinstance(error, ValidationError) and error.title == "Settings":
        # Without the values: a setting may be a secret.
        return "\n".join(f"TUNEYARD_{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()), FAILED
    if isinstance(error, STORE_AWAY):
        # Without the whole text, which holds the statement.
        return (
            f"the job store can't be reached (TUNEYARD_DATABASE_URL): {first_line(getattr(error, 'orig', None) or error)}",
            FAILED,
        )
    if isinstance(error, OSError):
        return f"{error.filename or 'this machine'}: {error.strerror or error}", FAILED
    # Without its text, which may hold what must not be shown.
    shown = f"a bug in Tuneyard, {type(error).__name__} at {_place(error)}; python -X dev -m serve_app.cli shows the traceback"
    return shown, FAILED


def first_line(error: BaseException) -> str:
    """What it says in one line, or what it is."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _place(error: Exception) -> str:
    """Where in our code it happened, as innermost as possible."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if any(package in Path(f.filename).parts for package in PACKAGES)]
    last = (ours or frames)[-1]
    return f"{'/'.join(Path(last.filename).parts[-3:])}:{last.lineno}"
