"""Dataset formats: one parser each, all into one shape (`Conversation`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from train_loop.data.formats.chat import openai, sharegpt
from train_loop.data.formats.conversation import Conversation, Message, RowRejected, each, kind, normalise, text
from train_loop.data.formats.pairs import alpaca, plain_text, prompt_completion
from train_loop.data.formats.tools import parse_tools

__all__ = ["Conversation", "Message", "RowRejected", "each", "to_conversation"]

PARSERS: dict[str, Callable[[dict[str, Any]], Iterable[Message]]] = {
    "sharegpt": sharegpt,
    "openai": openai,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
}
# What tells a format by a row's keys; any one of the sets is enough. `text` is looked at last, as many datasets of other shapes
# have a column of that name besides.
SHAPES: dict[str, tuple[frozenset[str], ...]] = {
    "openai": (frozenset({"messages"}),),
    "sharegpt": (frozenset({"conversations"}), frozenset({"conversation"})),
    "alpaca": (frozenset({"instruction", "output"}),),
    "prompt_completion": (frozenset({"prompt", "completion"}), frozenset({"query", "response"})),
}
KNOWN_SHAPES = "messages; conversations; instruction and output; prompt and completion; query and response; text"
PREFERENCE_KEYS = frozenset({"chosen", "rejected", "rejected_response", "preferred_output", "non_preferred_output"})
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")


def to_conversation(row: Any, dataset_format: str) -> Conversation:
    """Parse and normalise one decoded row. Raises RowRejected."""
    if not isinstance(row, dict):
        raise RowRejected(f"a row must be a JSON object, not {kind(row)}")
    if any(row.get(key) for key in MEDIA_KEYS):
        raise RowRejected("images need model_type vlm")
    if dataset_format == "auto":
        dataset_format = detect(row)
    if dataset_format == "text":
        return {"text": plain_text(row)}
    messages = normalise(PARSERS[dataset_format](row))
    system = row.get("system")
    if system is not None and messages[0]["role"] != "system" and text(system, "system").strip():
        messages.insert(0, {"role": "system", "content": system})
    tools = parse_tools(row.get("tools") or row.get("functions"))
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def detect(row: dict[str, Any]) -> str:
    """The format that a row's keys tell. Raises RowRejected where they tell none, or several."""
    given = {key for key, value in row.items() if value is not None}
    if given & PREFERENCE_KEYS:
        raise RowRejected("a preference row holds a chosen and a rejected answer, and sft learns from one")
    fits = [name for name, shapes in SHAPES.items() if any(keys <= given for keys in shapes)]
    if not fits and "text" in given:
        return "text"
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise RowRejected(f"fits {' and '.join(fits)}: name one of them in dataset_format")
    raise RowRejected(f"of no known shape: a row has the keys {KNOWN_SHAPES}")
