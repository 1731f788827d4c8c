"""`tuneyard admin …`: for the operator, where the settings are. Works on the store itself, with the service or without."""

from __future__ import annotations

from serve_app.cli.admin import dispatch, doctor, log, orgs, upkeep

__all__ = ["dispatch", "doctor", "log", "orgs", "upkeep"]
