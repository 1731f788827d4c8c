"""What the operator's commands share: their app, the store, who types them."""

from __future__ import annotations

import os
import pwd
from typing import TYPE_CHECKING

import typer

from serve_app.cli.common import app, die

if TYPE_CHECKING:
    from serve_app.settings import Settings
    from serve_app.store.audit import By
    from serve_app.store.jobs import JobStore

admin_app = typer.Typer(
    no_args_is_help=True,
    help="Operate the service: for whoever has its settings. Works on the job store itself, also while the service is down.",
)
app.add_typer(admin_app, name="admin")


def opened() -> tuple[Settings, JobStore]:
    """The service's settings and its store, whose schema is this version's."""
    from serve_app.settings import Settings
    from serve_app.store.jobs import JobStore

    settings = Settings.load()
    try:
        store = JobStore.open(settings.database_url)
        store.require_current()
    except RuntimeError as error:
        die(str(error))
    return settings, store


def me() -> By:
    """Who types the command, as the system has it."""
    from serve_app.store.audit import By

    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:  # in a container that has no such user
        name = str(uid)
    return By(f"admin:{name}")
