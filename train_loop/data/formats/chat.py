"""Rows that hold a list of turns: `sharegpt` ("conversations" or "conversation") and `openai` ("messages").

Turns are the same in both: `from` and `value`, `role` and `content`, or a pair `human` and `assistant`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from train_loop.data.formats.conversation import Message, RowRejected, kind, text
from train_loop.data.formats.images import image_of_part
from train_loop.data.formats.tools import parse_calls

TEXT_PARTS = ("text", "input_text", "output_text")
CALL = "function_call"  # what the assistant says is a tool call, as JSON
ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": CALL,
    "tool_call": CALL,
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}


def sharegpt(row: dict[str, Any]) -> Iterator[Message]:
    """The turns of a ShareGPT row."""
    turns = row.get("conversations")
    turns = row.get("conversation") if turns is None else turns
    if not isinstance(turns, list):
        raise RowRejected('no list "conversations" or "conversation"')
    return parse_turns(turns)


def openai(row: dict[str, Any]) -> Iterator[Message]:
    """The messages of an OpenAI row."""
    if not isinstance(row.get("messages"), list):
        raise RowRejected('no list "messages"')
    return parse_turns(row["messages"])


def parse_turns(turns: list[Any]) -> Iterator[Message]:
    """Messages of a list of turns. Raises RowRejected."""
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowRejected(f"a turn must be an object, not {kind(turn)}")
        if turn.get("role") is not None:
            yield _message(_role(turn["role"]), turn, "content")
        elif turn.get("from") is not None:
            yield _message(_role(turn["from"]), turn, "value")
        elif "human" in turn or "assistant" in turn:
            for role, key in (("user", "human"), ("assistant", "assistant")):
                if turn.get(key) is not None:
                    yield {"role": role, "content": text(turn[key], key)}
        else:
            raise RowRejected('a turn has neither "from" nor "role" nor "human"/"assistant"')


def _message(role: str, turn: dict[str, Any], key: str) -> Message:
    content = turn.get(key)
    calls = parse_calls(turn.get("tool_calls") or turn.get("function_call"))
    if role == CALL:
        role, calls, content = "assistant", parse_calls(content), None
        if not calls:
            raise RowRejected("a function_call without a call")
    elif calls and role != "assistant":
        raise RowRejected(f"tool calls in a turn of {role}")
    if role == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    message: Message = {"role": role, "content": "" if content is None and calls else _content(content, key)}
    if calls:
        message["tool_calls"] = calls
    if role == "assistant" and turn.get("reasoning_content"):
        message["reasoning_content"] = text(turn["reasoning_content"], "reasoning_content")
    if role == "tool":
        message |= {k: text(turn[k], k) for k in ("tool_call_id", "name") if turn.get(k) is not None}
    if not _is_trained(role, turn):
        message["loss"] = False
    return message


def _content(content: Any, key: str) -> str:
    """A string, or what a list of parts says, with its images written into it."""
    if not isinstance(content, list):
        return text(content, key)
    return "".join(_part(part) for part in content)


def _part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
        return text(part.get("text"), "text")
    image = image_of_part(part) if isinstance(part, dict) else None
    if image is None:
        raise RowRejected("content parts other than text and images can't be trained on")
    return image


def _is_trained(role: str, turn: dict[str, Any]) -> bool:
    """False for an assistant turn of `weight` 0 or `loss` false."""
    for name in ("weight", "loss"):
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise RowRejected(f"{name} must be 0 or 1: tokens count fully or not at all")
        if role != "assistant" and value:
            raise RowRejected(f"{name} in a turn of {role}: only the assistant's are trained on")
        if role == "assistant" and not value:
            return False
    return True


def _role(name: Any) -> str:
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise RowRejected(f"unknown role {str(name)[:40]!r}")
    return role
