"""Rows that are one question and one answer (`alpaca`, `prompt_completion`), and those that are `text` alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from train_loop.data.formats.chat import parse_turns
from train_loop.data.formats.conversation import Message, RowRejected, kind, text


def alpaca(row: dict[str, Any]) -> Iterator[Message]:
    """instruction, with input below it where there is one, and output; after the pairs of history."""
    instruction = text(row.get("instruction"), "instruction")
    details = text(row["input"], "input") if row.get("input") is not None else ""
    yield from _history(row)
    yield {"role": "user", "content": "\n".join(part for part in (instruction, details) if part.strip())}
    yield {"role": "assistant", "content": text(row.get("output"), "output")}


def prompt_completion(row: dict[str, Any]) -> Iterator[Message]:
    """prompt and completion, or query and response: each a string or a list of messages. Only the completion is trained on."""
    asked, answered = ("query", "response") if "query" in row and "prompt" not in row else ("prompt", "completion")
    yield from _history(row)
    for message in one_or_more(row.get(asked), asked, "user"):
        yield message | {"loss": False} if message["role"] == "assistant" else message
    yield from one_or_more(row.get(answered), answered, "assistant")


def plain_text(row: dict[str, Any]) -> str:
    """The text of a row for continued pre-training. Raises RowRejected."""
    found = text(row.get("text"), "text")
    if not found.strip():
        raise RowRejected("empty text")
    return found


def one_or_more(value: Any, name: str, role: str) -> Iterator[Message]:
    """The messages of a list, or the one that a string is, of this role. Raises RowRejected."""
    if isinstance(value, list):
        return parse_turns(value)
    return iter([{"role": role, "content": text(value, name)}])


def _history(row: dict[str, Any]) -> Iterator[Message]:
    pairs = row.get("history")
    if not isinstance(pairs, list | None):
        raise RowRejected(f"history must be a list of pairs, not {kind(pairs)}")
    for pair in pairs or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowRejected("history must be a list of pairs: [question, answer]")
        yield {"role": "user", "content": text(pair[0], "history")}
        yield {"role": "assistant", "content": text(pair[1], "history")}
