"""What the tables of a reference are made of."""

from __future__ import annotations

import re
from typing import Any


def type_of(schema: dict[str, Any]) -> str:
    """A JSON schema in words: its type with its bounds, or its values."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(type_of(s) for s in schema[key]))
    if "enum" in schema:
        return ", ".join(f"`{v}`" for v in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = str(schema.get("format") or schema.get("type", "any"))
    if kind == "array":
        return f"list of {type_of(schema['items'])}"
    names = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "maxLength": "length ≤"}
    bounds = [f"{sign} {schema[k]}" for k, sign in names.items() if k in schema]
    return " ".join([kind, *([", ".join(bounds)] if bounds else [])])


def cell(text: str) -> str:
    """Text as a cell of a table; `<home>` and the like are no HTML."""
    return re.sub(r"<(?=\w)", "&lt;", " ".join(text.split()).replace("|", "\\|"))
