"""Dataset formats: one parser each, all into `{"messages": [{"role", "content"}, ...]}`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Message = dict[str, str]
Conversation = dict[str, list[Message]]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
TOOL_ROLES = frozenset({"tool", "function", "function_call", "observation", "tool_call"})


class RowRejected(Exception):
    """This row can't be trained on; `reason` says why, in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def to_conversation(row: Any, dataset_format: str) -> Conversation:
    """Parse and normalise one decoded row. Raises RowRejected.

    Leading assistant turns are dropped, same-role neighbours merged, turns after the last answer dropped (they carry no loss).
    """
    if not isinstance(row, dict):
        raise RowRejected(f"a row must be a JSON object, not {_kind(row)}")
    if row.get("tools"):
        raise RowRejected("tool calls are not supported yet")
    if row.get("images") or row.get("image"):
        raise RowRejected("images need model_type vlm")
    messages = _normalise(PARSERS[dataset_format](row))
    system = row.get("system")
    if system is not None and messages[0]["role"] != "system":
        if not isinstance(system, str):
            raise RowRejected("system is not a string")
        if system.strip():
            messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}


def _sharegpt(row: dict[str, Any]) -> Iterable[tuple[str, str]]:
    turns = row.get("conversations", row.get("conversation"))
    if not isinstance(turns, list):
        raise RowRejected('no list "conversations" or "conversation"')
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowRejected(f"a turn must be an object, not {_kind(turn)}")
        if "from" in turn:
            yield _role(turn["from"], SHAREGPT_ROLES), _text(turn.get("value"), "value")
        elif "human" in turn or "assistant" in turn:
            if turn.get("human") is not None:
                yield "user", _text(turn["human"], "human")
            if turn.get("assistant") is not None:
                yield "assistant", _text(turn["assistant"], "assistant")
        else:
            raise RowRejected('a turn has neither "from" nor "human"/"assistant"')


def _openai(row: dict[str, Any]) -> Iterable[tuple[str, str]]:
    turns = row.get("messages")
    if not isinstance(turns, list):
        raise RowRejected('no list "messages"')
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowRejected(f"a message must be an object, not {_kind(turn)}")
        if turn.get("tool_calls"):
            raise RowRejected("tool calls are not supported yet")
        if turn.get("weight") not in (None, 1) or turn.get("loss") not in (None, True):
            raise RowRejected("per-message weight is not supported yet")
        content = turn.get("content")
        if isinstance(content, list):
            if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
                raise RowRejected("content parts other than text need model_type vlm")
            content = "".join(_text(p.get("text"), "text") for p in content)
        yield _role(turn.get("role"), {r: r for r in ("system", "user", "assistant")}), _text(content, "content")


PARSERS: dict[str, Callable[[dict[str, Any]], Iterable[tuple[str, str]]]] = {"sharegpt": _sharegpt, "openai": _openai}


def _normalise(turns: Iterable[tuple[str, str]]) -> list[Message]:
    messages: list[Message] = []
    for role, content in turns:
        if role == "system" and messages:
            raise RowRejected("a system message must come first")
        if role == "assistant" and not any(m["role"] == "user" for m in messages):
            continue
        if role == "assistant" and not content.strip():
            raise RowRejected("empty assistant turn")
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content
        else:
            messages.append({"role": role, "content": content})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise RowRejected("no assistant turn that answers a user")
    return messages


def _role(name: Any, known: dict[str, str]) -> str:
    if isinstance(name, str):
        role = known.get(name.strip().lower())
        if role is not None:
            return role
        if name.strip().lower() in TOOL_ROLES:
            raise RowRejected("tool calls are not supported yet")
    raise RowRejected(f"unknown role {str(name)[:40]!r}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowRejected(f"{name} is not a string but {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
