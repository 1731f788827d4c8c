"""Where in its turns a row's images are.

While a row is parsed an image is part of a turn's text: its reference between two characters that no text has. So it goes where
the text goes, and is dropped and merged with it; at the end `take_images` makes parts of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from train_loop.data.formats.conversation import Message, RowRejected, kind

# Unicode keeps them out of text that is exchanged ("noncharacters").
OPEN, CLOSE = "\ufdd0", "\ufdd1"
IMAGE = re.compile(f"{OPEN}([^{CLOSE}]*){CLOSE}")
SLOT = OPEN + CLOSE  # an image that is named beside the turns
PLACEHOLDER = "<image>"
LOOKING = ("user", "tool")  # whose turns may hold images


def image_of_part(part: dict[str, Any]) -> str | None:
    """The image that a content part is, as it is written into the text; None of another part. Raises RowRejected."""
    if part.get("type") in ("image_url", "input_image"):
        value = part.get("image_url")
        return _written(value.get("url") if isinstance(value, dict) else value)
    if part.get("type") == "image":
        given = [part[key] for key in ("image", "url", "path") if part.get(key) is not None]
        return _written(given[0]) if given else SLOT
    return None


def images_of_row(row: dict[str, Any]) -> list[str]:
    """The images of `images` or `image`, as they are written into text. Raises RowRejected."""
    given = [row[key] for key in ("images", "image") if row.get(key)]
    if len(given) > 1:
        raise RowRejected("has both image and images")
    if not given:
        return []
    return [_written(value) for value in (given[0] if isinstance(given[0], list) else given)]


def placed(turns: Iterable[Message], images: list[str]) -> Iterator[Message]:
    """The turns with the row's `images` where they belong: in the places of image parts that name none, else of `<image>`.

    Where there is neither, before the first user's text. Raises RowRejected.
    """
    held = list(turns)
    for turn in held:
        if turn["role"] not in LOOKING and OPEN in turn["content"]:
            raise RowRejected(f"an image in a turn of {turn['role']}: only those of user and tool may show some")
    looking = [turn for turn in held if turn["role"] in LOOKING]
    has_parts = any(OPEN in turn["content"] for turn in looking)
    place = SLOT if has_parts else PLACEHOLDER
    places = sum(turn["content"].count(place) for turn in looking)
    before_all = images if not has_parts and not places else []
    if not before_all and places != len(images):
        raise RowRejected(f"{len(images)} images for {places} placeholders ({'image parts' if has_parts else PLACEHOLDER})")
    left = iter(images)
    for turn in held:
        if turn["role"] in LOOKING and places:
            first, *rest = turn["content"].split(place)
            turn = turn | {"content": first + "".join(next(left) + text for text in rest)}
        if turn["role"] == "user" and before_all:
            turn, before_all = turn | {"content": "".join(before_all) + turn["content"]}, []
        yield turn


def take_images(messages: Iterable[Message]) -> tuple[list[Message], list[str]]:
    """The messages with parts for content where they hold images, and the references of those in order."""
    made: list[Message] = []
    references: list[str] = []
    for message in messages:
        first, *rest = IMAGE.split(message["content"])
        if rest:
            texts = [first, *rest[1::2]]
            references += rest[::2]
            parts: list[dict[str, str]] = []
            for i, text in enumerate(texts):
                parts += [{"type": "image"}] if i else []
                parts += [{"type": "text", "text": text}] if text else []
            message = message | {"content": parts}
        made.append(message)
    return made, references


def _written(value: Any) -> str:
    """A reference, as it is written into text. Raises RowRejected."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), str):
            value = f"data:;base64,{value['bytes']}"
        else:
            value = next((value[key] for key in ("path", "url") if value.get(key) is not None), None)
    if not isinstance(value, str):
        raise RowRejected(f"an image must be a path, a URI or an object with path, url or bytes, not {kind(value)}")
    if not value.strip() or CLOSE in value:
        raise RowRejected("an image without a name")
    return f"{OPEN}{value.strip()}{CLOSE}"
