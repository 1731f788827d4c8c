"""docs/settings.md, made from the settings' own model."""

from __future__ import annotations

from typing import Any

from serve_app.reference.tables import cell, type_of
from serve_app.settings import Profile, Settings

INTRO = """# Settings

Made from `serve_app/settings.py` by `make docs`; `tuneyard settings` prints the same. Each is a variable, or a name in
`<home>/settings.json` without `TUNEYARD_` and in lower case; the variable wins. On a cluster those of the head count: [where
settings go](operations.md#where-settings-go). Lists and profiles are JSON. What workers read from their environment is under
[Faults](faults.md#settings-of-the-workers).
"""
PROFILE = """## Profiles

`TUNEYARD_PROFILES` is a JSON object: the name of a `gpu_type`, and what one worker of it gets. It replaces the table that comes
along, which has NVIDIA's GPUs by Ray's names, and `cpu`.
"""


def markdown() -> str:
    """The page."""
    whole = Settings.model_json_schema()
    rows = [_row(f"`TUNEYARD_{name.upper()}`", field, whole["properties"][name]) for name, field in Settings.model_fields.items()]
    schema = Profile.model_json_schema()
    fields = [_row(name, field, schema["properties"][name]) for name, field in Profile.model_fields.items()]
    head = "| {} | type | default | what it is |\n|---|---|---|---|"
    return "\n".join([INTRO, head.format("variable"), *rows, "", PROFILE, head.format("field"), *fields]) + "\n"


def _row(name: str, field: Any, schema: dict[str, Any]) -> str:
    # Where it is made from others, the description says how.
    default = "required" if field.is_required() else "" if field.default_factory or field.default in (None, "") else field.default
    kind = type_of({"anyOf": [s for s in schema["anyOf"] if s.get("type") != "null"]} if "anyOf" in schema else schema)
    return f"| {name} | {cell(kind)} | {default} | {cell(field.description or '')} |"
