"""`tuneyard …`: one module a theme. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys

from serve_app.cli import chat, here, jobs, reads, secret
from serve_app.cli.common import app
from serve_app.cli.job_file import read_spec

__all__ = ["app", "chat", "here", "jobs", "main", "read_spec", "reads", "secret"]
UNREACHABLE = 3


def main() -> None:
    """Entry point; expected failures are one sentence on stderr and exit code 1."""
    import httpx
    from pydantic import ValidationError

    from serve_app.client import ApiError
    from train_loop.errors import UserError

    try:
        app()
    except ApiError as error:
        sys.exit(str(error))
    except httpx.TransportError as error:
        sys.stderr.write(f"the service can't be reached: {error}\n")
        sys.exit(UNREACHABLE)
    except UserError as error:
        sys.exit(error.message)
    except ValidationError as error:
        if error.title != "Settings":
            raise
        # Without the values: a setting may be a secret.
        sys.exit("\n".join(f"TUNEYARD_{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()))
