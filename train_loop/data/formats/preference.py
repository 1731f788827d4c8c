"""Rows that hold two answers to the same prompt, of which one is preferred (`preference`).

The two are `chosen` and `rejected` with a prompt beside or inside them, OpenAI's `preferred_output` and
`non_preferred_output`, or the last answer of the messages and `rejected_response`. An answer is a string, a message or a list
of messages; with the prompt repeated in it or without.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from train_loop.data.formats.chat import parse_turns, sharegpt
from train_loop.data.formats.conversation import Message, RowRejected, kind
from train_loop.data.formats.pairs import one_or_more

NAMES = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
KEYS = frozenset({*NAMES[0], *NAMES[1], "rejected_response"})
# How Anthropic's datasets write a conversation as one text.
TRANSCRIPT = re.compile(r"\s*\n\nHuman:.*\n\nAssistant:", re.DOTALL)
SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def preference(row: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    """The turns with the preferred answer, and those with the other one; what comes before the answers isn't trained on.

    Raises RowRejected.
    """
    if row.get("rejected_response") is not None:
        return _with_other_ending(row)
    names = next((names for names in NAMES if any(row.get(name) is not None for name in names)), None)
    if names is None:
        known = "; ".join(" and ".join(names) for names in (*NAMES, ("messages", "rejected_response")))
        raise RowRejected(f"not two answers: a preference row has the keys {known}")
    prompt = _prompt(row) if names[0] == "chosen" else _input(row)
    first, second = (_turns(row.get(name), name) for name in names)
    if prompt is not None:
        return _answered(*_after(prompt, first, names[0]), names[0]), _answered(*_after(prompt, second, names[1]), names[1])
    start = _where_they_part(first, second)
    if not any(turn["role"] == "user" for turn in first[:start]):
        raise RowRejected(f"no prompt: none beside {names[0]} and {names[1]}, and they begin with no user turn in common")
    return _answered(first[:start], first[start:], names[0]), _answered(second[:start], second[start:], names[1])


def _with_other_ending(row: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    turns = _prompt(row)
    if not turns or turns[-1]["role"] != "assistant":
        raise RowRejected("rejected_response needs messages before it that end with the preferred answer")
    start = next((i + 1 for i in range(len(turns) - 1, -1, -1) if turns[i]["role"] != "assistant"), 0)
    rejected = _after(turns[:start], _turns(row["rejected_response"], "rejected_response"), "rejected_response")
    return _answered(turns[:start], turns[start:], "messages"), _answered(*rejected, "rejected_response")


def _input(row: dict[str, Any]) -> list[Message]:
    asked = row.get("input")
    if not isinstance(asked, dict) or not isinstance(asked.get("messages"), list):
        raise RowRejected('no "input" with a list "messages"')
    return list(parse_turns(asked["messages"]))


def _prompt(row: dict[str, Any]) -> list[Message] | None:
    """The turns beside the answers, if there are any."""
    if row.get("prompt") is not None:
        return _spoken_or_listed(row["prompt"], "prompt", "user")
    if row.get("messages") is not None:
        return list(one_or_more(row["messages"], "messages", "user"))
    if row.get("conversations") is not None or row.get("conversation") is not None:
        return list(sharegpt(row))
    return None


def _turns(value: Any, name: str) -> list[Message]:
    """An answer's turns. Raises RowRejected."""
    if value is None:
        raise RowRejected(f'no "{name}"')
    if not isinstance(value, str | dict | list):
        raise RowRejected(f"{name} must be a string, a message or a list of messages, not {kind(value)}")
    if not value or (isinstance(value, str) and not value.strip()):
        raise RowRejected(f"{name} is empty")
    return _spoken_or_listed([value] if isinstance(value, dict) else value, name, "assistant")


def _spoken_or_listed(value: Any, name: str, role: str) -> list[Message]:
    if isinstance(value, str) and TRANSCRIPT.match(value):
        return _spoken(value)
    return list(one_or_more(value, name, role))


def _spoken(transcript: str) -> list[Message]:
    """The turns of a transcript; a last one without words only asks for the answer."""
    _, *parts = SPEAKER.split(transcript)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    return turns if turns[-1]["content"] else turns[:-1]


def _where_they_part(first: Sequence[Message], second: Sequence[Message]) -> int:
    """The first turn of the answers in conversations that begin alike: where they differ, or the last answer of equal ones."""
    start, last = 0, min(len(first), len(second)) - 1
    while start < last and first[start] == second[start]:
        start += 1
    while start and first[start - 1]["role"] == "assistant" in (first[start]["role"], second[start]["role"]):
        start -= 1  # they are one turn
    return start


def _answered(prompt: list[Message], answer: list[Message], name: str) -> list[Message]:
    """The prompt, which isn't trained on, and its answer."""
    if not any(turn["role"] == "assistant" for turn in answer):
        raise RowRejected(f"{name} holds no answer to the prompt")
    if prompt and prompt[-1]["role"] == "assistant" == answer[0]["role"]:
        raise RowRejected(f"the prompt of {name} ends with an answer")
    return [*(turn | {"loss": False} if turn["role"] == "assistant" else turn for turn in prompt), *answer]


def _after(prompt: list[Message], side: list[Message], name: str) -> tuple[list[Message], list[Message]]:
    """The prompt, with a system message that only `side` has, and what `side` says after it."""
    (system, asked), (own, said) = _headed(prompt), _headed(side)
    repeated = bool(asked) and _gist(said[: len(asked)]) == _gist(asked)
    answer = said[len(asked) :] if repeated else said
    if answer and not repeated and answer[0]["role"] != "assistant":
        raise RowRejected(f"{name} begins with other turns than the prompt's")
    return [*(system or own), *asked], answer


def _headed(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system messages that come first, and the rest."""
    start = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    return turns[:start], turns[start:]


def _gist(turns: Sequence[Message]) -> list[tuple[Any, ...]]:
    return [(turn["role"], turn["content"].strip(), turn.get("tool_calls")) for turn in turns]
