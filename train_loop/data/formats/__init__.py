"""Dataset formats: one parser each, all into one shape (`Conversation`), or two of it (`Preference`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from train_loop.data.formats.chat import openai, sharegpt
from train_loop.data.formats.conversation import Conversation, Message, Preference, RowRejected, each, kind, normalise, text
from train_loop.data.formats.images import OPEN, images_of_row, placed, take_images
from train_loop.data.formats.pairs import alpaca, plain_text, prompt_completion
from train_loop.data.formats.preference import KEYS as PREFERENCE_KEYS
from train_loop.data.formats.preference import preference
from train_loop.data.formats.tools import parse_tools

__all__ = ["Conversation", "Message", "Preference", "RowRejected", "each", "parse", "preferred", "to_conversation"]

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
KNOWN_SHAPES = (
    "messages; conversations; instruction and output; prompt and completion; query and response; chosen and rejected; text"
)
SHOWN_KEYS, SHOWN_CHARS = 8, 40
IMAGE_KEYS = ("images", "image")
OTHER_MEDIA_KEYS = ("videos", "video", "audios", "audio")
NEED_VLM = "images need model_type vlm"


def parse(row: Any, dataset_format: str, *, vision: bool = False) -> Conversation | Preference:
    """Parse and normalise one decoded row; with `vision` it may have images. Raises RowRejected."""
    if not isinstance(row, dict):
        raise RowRejected(f"a row must be a JSON object, not {kind(row)}")
    if vision and (unseen := [key for key in OTHER_MEDIA_KEYS if row.get(key)]):
        raise RowRejected(f"{unseen[0]}: of media only images can be trained on")
    if not vision and any(row.get(key) for key in (*IMAGE_KEYS, *OTHER_MEDIA_KEYS)):
        raise RowRejected(NEED_VLM)
    if dataset_format == "auto":
        dataset_format = detect(row)
    images = images_of_row(row) if vision else []
    if dataset_format == "text":
        if images:
            raise RowRejected("images need a conversation: a row of text alone shows none")
        return {"text": plain_text(row)}
    shown = images if vision else None
    if dataset_format != "preference":
        try:
            return _conversation(PARSERS[dataset_format](row), row, shown)
        except RowRejected as error:
            raise RowRejected(f"{error.reason}{_keys_of_another(row, dataset_format)}") from None
    chosen, rejected = preference(row)
    if isinstance(row.get("input"), dict):
        row = row["input"] | row  # OpenAI's rows have their tools there
    first = _conversation(chosen, row, shown)
    try:
        return Preference(first, _conversation(rejected, row, shown))
    except RowRejected as error:
        raise RowRejected(f"of the answer that isn't preferred: {error.reason}") from None


def preferred(parsed: Conversation | Preference) -> Conversation:
    """What sft trains on."""
    return parsed.chosen if isinstance(parsed, Preference) else parsed


def to_conversation(row: Any, dataset_format: str, *, vision: bool = False) -> Conversation:
    """One decoded row as sft trains on it; with `vision` it may have images. Raises RowRejected."""
    return preferred(parse(row, dataset_format, vision=vision))


def _conversation(turns: Iterable[Message], row: dict[str, Any], images: list[str] | None) -> Conversation:
    """The turns with what a row of any format may have besides: a system message, tools, and `images` where it may have some."""
    messages = normalise(turns if images is None else placed(turns, images))
    system = row.get("system")
    if system is not None and messages[0]["role"] != "system" and text(system, "system").strip():
        messages.insert(0, {"role": "system", "content": system})
    tools = parse_tools(row.get("tools") or row.get("functions"))
    made: Conversation = {"messages": messages, "tools": tools} if tools else {"messages": messages}
    return _illustrated(made, images is not None)


def _illustrated(conversation: Conversation, vision: bool) -> Conversation:
    """With its images beside its messages, where it has some. Raises RowRejected."""
    if not any(OPEN in m["content"] for m in conversation["messages"]):
        return conversation
    messages, references = take_images(conversation["messages"])
    if references and not vision:
        raise RowRejected(NEED_VLM)
    return conversation | {"messages": messages, "images": references} if references else conversation


def detect(row: dict[str, Any]) -> str:
    """The format that a row's keys tell. Raises RowRejected where they tell none, or several."""
    given = {key for key, value in row.items() if value is not None}
    if given & PREFERENCE_KEYS:
        return "preference"
    fits = [name for name, shapes in SHAPES.items() if any(keys <= given for keys in shapes)]
    if not fits and "text" in given:
        return "text"
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise RowRejected(f"fits {' and '.join(fits)}: name one of them in dataset_format")
    raise RowRejected(f"of no known shape: a row has the keys {KNOWN_SHAPES}; this one has {_shown(row)}")


def _keys_of_another(row: dict[str, Any], dataset_format: str) -> str:
    """What the keys of a row tell that hasn't those of its format; nothing of one that has."""
    if any(keys <= row.keys() for keys in SHAPES[dataset_format]):
        return ""
    try:
        return f"; its keys are those of dataset_format {detect(row)}"
    except RowRejected:
        return f"; it has {_shown(row)}"


def _shown(row: dict[str, Any]) -> str:
    return ", ".join(str(key)[:SHOWN_CHARS] for key in [*row][:SHOWN_KEYS]) + ", …" * (len(row) > SHOWN_KEYS) or "no keys"
