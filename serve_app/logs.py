"""Structured logs: one JSON object a line, without local variables, which could hold secrets."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import structlog

MIN_SECRET_CHARS = 4
SECRET_LOOKS = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_\w{20,}|\bBearer\s+[\w.~+/=-]{16,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
)


def configure(**of_process: Any) -> None:
    """Set up structlog for this process. What is given stands in each of its lines, then also in those that `train_loop` logs."""

    def named(logger: Any, method: str, event: Any) -> Any:
        return of_process | event

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        named,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
    ]
    structlog.configure(processors=[*shared, structlog.processors.JSONRenderer()])
    if of_process:
        handler = logging.StreamHandler(sys.stdout)
        last: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()]
        handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last))
        theirs = logging.getLogger("train_loop")
        theirs.handlers, theirs.propagate = [handler], False  # or Ray prints each line once more
        theirs.setLevel(logging.INFO)


class Redactor:
    """Takes secrets out of text: the values it was told, and what looks like a key or token of anyone's."""

    def __init__(self) -> None:
        self._values: set[str] = set()

    def hide(self, *values: str | None) -> None:
        """Never show these from now on."""
        self._values |= {v for v in values if v and len(v) >= MIN_SECRET_CHARS}

    def __call__(self, text: str) -> str:
        for value in sorted(self._values, key=len, reverse=True):
            text = text.replace(value, "[redacted]")
        return SECRET_LOOKS.sub("[redacted]", text)
