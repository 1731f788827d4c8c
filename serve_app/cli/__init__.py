"""`tuneyard …`: one module a theme. Heavy imports wait until a command needs them, so that `--help` is quick."""

from __future__ import annotations

import sys

# As `tuneyard --help` lists them.
from serve_app.cli import here, identity, plan, jobs, reads, chat, serve, secret, webhook, admin  # isort: skip
from serve_app.cli.common import app, plain
from serve_app.cli.failures import in_words
from serve_app.cli.job_file import read_spec

__all__ = ["admin", "app", "chat", "here", "identity", "jobs", "main", "plan", "read_spec", "reads", "secret", "serve", "webhook"]


def main() -> None:
    """Entry point; a failure is a sentence on stderr and an exit code."""
    try:
        app()
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        said, code = in_words(error)
        sys.stderr.writelines(f"{plain(line)}\n" for line in said.splitlines())
        sys.exit(code)
