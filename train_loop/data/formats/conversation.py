"""The one shape that rows of every format become, and the rules that every conversation keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

T = TypeVar("T")
S = TypeVar("S")

# `role` (system, user, assistant, tool) and `content`, a string, or with images a list of parts: {"type": "text", "text"} and
# {"type": "image"}; of an assistant also `tool_calls`, `reasoning_content`, and `loss` False if it is not trained on; of a tool
# `tool_call_id` and `name`.
Message = dict[str, Any]


class Conversation(TypedDict, total=False):
    """Messages with the tools that the assistant may call; or, for continued pre-training, text alone.

    `images` are the references of the image parts, in order; it is missing where there are none.
    """

    messages: list[Message]
    images: list[str]
    tools: list[dict[str, Any]]
    text: str


@dataclass(frozen=True)
class Preference:
    """Two conversations that begin with the same prompt and end with answers to it, of which `chosen` has the better one."""

    chosen: Conversation
    rejected: Conversation


class RowRejected(Exception):
    """This row can't be trained on; `reason` says why, in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def each(step: Callable[[T], S], items: Iterable[T | RowRejected]) -> list[S | RowRejected]:
    """The step's result for each item, or why the row is rejected, by this step or before it."""
    done = list[S | RowRejected]()
    for item in items:
        if not isinstance(item, RowRejected):
            try:
                done.append(step(item))
                continue
            except RowRejected as error:
                # Without its traceback, which would hold all that is done until that is found as garbage.
                item = RowRejected(error.reason)
        done.append(item)
    return done


def normalise(turns: Iterable[Message]) -> list[Message]:
    """A conversation that alternates, from the system or user to an answer. Raises RowRejected.

    What comes before the first user turn is dropped but for the system message, same-role neighbours are merged, turns after the
    last answer are dropped (they carry no loss). Tool calls are numbered anew: their ids are random, nothing to learn.
    """
    messages: list[Message] = []
    asked = False
    for turn in turns:
        role = turn["role"]
        asked = asked or role == "user"
        if role == "system" and any(m["role"] != "system" for m in messages):
            raise RowRejected("a system message must come first")
        if role in ("assistant", "tool") and not asked:
            continue
        if role == "assistant" and not turn["content"].strip() and not turn.get("tool_calls"):
            raise RowRejected("empty assistant turn")
        if role == "tool" and messages[-1]["role"] not in ("assistant", "tool"):
            raise RowRejected("a tool's result must follow an assistant turn")
        if messages and messages[-1]["role"] == role != "tool":
            messages[-1] = _merged(messages[-1], turn)
        else:
            messages.append(turn)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise RowRejected("no assistant turn that answers a user")
    if all(m.get("loss") is False for m in messages if m["role"] == "assistant"):
        raise RowRejected("no assistant turn to learn from: each has weight 0")
    return _numbered(messages)


def _merged(first: Message, second: Message) -> Message:
    if first.get("loss", True) != second.get("loss", True):
        raise RowRejected("neighbouring assistant turns with different weights can't be merged")
    if first.get("tool_calls") and second["content"]:
        raise RowRejected("a tool call without its result before the answer")
    merged = first | second | {"content": "\n\n".join(c for c in (first["content"], second["content"]) if c)}
    if calls := [*first.get("tool_calls", []), *second.get("tool_calls", [])]:
        merged["tool_calls"] = calls
    return merged


def _numbered(messages: list[Message]) -> list[Message]:
    """The calls numbered in order and results paired with them: by the ids of the row where it has some, else in turn."""
    number = 0
    open_calls: list[tuple[str | None, str, str]] = []  # (the row's id, ours, the tool's name)
    numbered = []
    for message in messages:
        if calls := message.get("tool_calls"):
            open_calls, again = [], []
            for call in calls:
                number += 1
                ours = f"call{number:05d}"  # nine letters and digits, the only ids that Mistral's templates take
                open_calls.append((call.get("id"), ours, call["function"]["name"]))
                again.append({**call, "id": ours})
            message = message | {"tool_calls": again}
        elif message["role"] == "tool":
            wanted = message.get("tool_call_id")
            answered = next((c for c in open_calls if wanted in (None, c[0])), None)
            if answered is not None:
                open_calls.remove(answered)
                message = {"name": answered[2]} | message | {"tool_call_id": answered[1]}
            elif wanted is not None:
                raise RowRejected("a tool's result answers no call of the turn before it")
        numbered.append(message)
    return numbered


def text(value: Any, name: str) -> str:
    """The value, which must be a string. Raises RowRejected."""
    if not isinstance(value, str):
        raise RowRejected(f"{name} is not a string but {kind(value)}")
    return value


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
