"""Chat templates run as inference runs them, but given up when they flood.

transformers compiles them, in its sandbox. They are run from here, a piece at a time: a template of a few loops can make more
text than there is memory.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_LAYOUT_CHARS = 1 << 20  # a template's own; longer texts must be mostly what the row says
LAYOUT_PER_CHAR = 4
# Compiled templates are shared, and what notes where their marks are serves one rendering at a time. Streamed rows are read by
# several threads.
ONE_AT_A_TIME = threading.Lock()


class Flood(Exception):
    """A template made far more text than the row holds."""


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, and which parts of it the template marks as generated: (start, end) in characters."""

    text: str
    generated: list[tuple[int, int]]


def render(
    template: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, names: Mapping[str, str], *, prompt: bool
) -> Rendered:
    """Render messages, with the head of the next answer after them for a `prompt`. `names` are the special tokens.

    Raises Flood, and whatever goes wrong in the template.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled: Any = _compile_jinja_template(template)
    # As transformers does, for templates (gpt-oss) that know reasoning by its other name.
    said = [{"thinking": m["reasoning_content"], **m} if "reasoning_content" in m else m for m in messages]
    pieces: list[str] = []
    generated: list[tuple[int, int]] = []
    size, limit = 0, MAX_LAYOUT_CHARS
    with ONE_AT_A_TIME, compiled.environment.activate_tracker(pieces, generated):
        for piece in compiled.generate(messages=said, tools=tools, documents=None, add_generation_prompt=prompt, **names):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                limit = max(limit, LAYOUT_PER_CHAR * len(json.dumps([messages, tools], ensure_ascii=False)))
                if size > limit:
                    raise Flood
    return Rendered("".join(pieces), generated)
