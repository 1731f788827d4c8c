"""Secrets taken out of what a run says, for whoever writes that down."""

from __future__ import annotations

import re

MIN_SECRET_CHARS = 4
SECRET_LOOKS = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_\w{20,}|\bBearer\s+[\w.~+/=-]{16,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
)


class Redactor:
    """Takes secrets out of text: the values it was told, and what looks like a key or token of anyone's.

    Also what PostgreSQL or UTF-8 can't hold.
    """

    def __init__(self) -> None:
        self._values: set[str] = set()

    def hide(self, *values: str | None) -> None:
        """Never show these from now on."""
        self._values |= {v for v in values if v and len(v) >= MIN_SECRET_CHARS}

    def __call__(self, text: str) -> str:
        for value in sorted(self._values, key=len, reverse=True):
            text = text.replace(value, "[redacted]")
        told = SECRET_LOOKS.sub("[redacted]", text)
        return told.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
