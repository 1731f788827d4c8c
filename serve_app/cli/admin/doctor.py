"""Is all well, and if not, what is to be done."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve_app.cli.admin.common import admin_app
from serve_app.cli.common import AsJson, plain, show
from serve_app.cli.failures import FAILED, in_words

if TYPE_CHECKING:
    from serve_app.settings import Settings


@admin_app.command()
def doctor(
    address: Annotated[str, typer.Option(help="Ray's address; default the one of this home, or of this machine.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Look at settings, database, keys, storage, models, disk, clock and Ray, and say how to mend what isn't well.

    Takes two minutes at most, whatever hangs. Status 1 when something is broken.
    """
    from serve_app.doctor import Finding, Level, examine
    from serve_app.settings import Settings

    try:
        settings = Settings.load()
    except ValueError as error:
        found = [Finding("settings", Level.FAIL, line, "mend it: tuneyard settings lists them all") for line in _lines(error)]
    else:
        if address == "auto":
            address = _of_this_home(settings) or address
        found = [Finding("settings", Level.OK, f"read; the home is {settings.home}")]
        found += examine(settings, address, lambda error: in_words(error)[0])
    broken = any(finding.level is Level.FAIL for finding in found)
    if as_json:
        show({"ok": not broken, "findings": [asdict(finding) for finding in found]})
    else:
        for finding in found:
            typer.echo(plain(f"{finding.level:<4}  {finding.check:<10}  {finding.said}"))
            if finding.mend:
                typer.echo(plain(f"{'':<18}→ {finding.mend}"))
    if any(thread.daemon and thread.name in {finding.check for finding in found} for thread in threading.enumerate()):
        # What hangs would keep libraries from ending in order.
        sys.stdout.flush()
        os._exit(FAILED)
    if broken:
        raise typer.Exit(FAILED)


def _lines(error: Exception) -> list[str]:
    return in_words(error)[0].splitlines()


def _of_this_home(settings: Settings) -> str | None:
    """The address of the Ray that `tuneyard up` runs for this home, if it does."""
    from serve_app.embedded.lifetime import read_state

    try:
        state = read_state(settings.home) or {}
        return Path(state["ray_dir"], "ray_current_cluster").read_text().strip()
    except (KeyError, OSError):
        return None
