"""Structured logs: one JSON object a line, without local variables, which could hold secrets."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


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
