"""Chat templates run as inference runs them, but given up when they flood or don't end.

transformers compiles them, in its sandbox, which keeps them from the machine but not from its time and memory. They are run from
here, a piece at a time: a template of a few loops can make more text than there is memory. What a single step of one takes of
memory is the preparation's to bound (`train_loop.data.bounds`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

from jinja2 import nodes

from train_loop.data.bounds import limited

MAX_LAYOUT_CHARS = 1 << 20  # a template's own; longer texts must be mostly what the row says
LAYOUT_PER_CHAR = 4
# Compiled templates are shared, and what notes where their marks are serves one rendering at a time. Streamed rows are read by
# several threads.
ONE_AT_A_TIME = threading.Lock()
# What a loop knows of itself that doesn't tell how much is to come.
LOOKS_BACK = {"first", "index", "index0", "previtem", "depth", "depth0"}
OUT_OF_ORDER: tuple[type[nodes.Node], ...] = (
    nodes.Macro,
    nodes.CallBlock,
    nodes.FilterBlock,
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.Extends,
    nodes.Block,
)


class Flood(Exception):
    """A template made far more text than the row holds."""


class Refused(Exception):
    """A template does what none needs; the message says what."""


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, and which parts of it the template marks as generated: (start, end) in characters.

    `begins`: where in it each message begins, and where the last one ends; only if of the first messages alone the same text is
    rendered up to there, and then what follows the last one. Else empty.
    """

    text: str
    generated: list[tuple[int, int]]
    begins: list[int]


def render(
    template: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, names: Mapping[str, str], *, prompt: bool
) -> Rendered:
    """Render messages, with the head of the next answer after them for a `prompt`. `names` are the special tokens.

    Raises Flood, Stalled, Refused, and whatever goes wrong in the template.
    """
    if (wrong := _needless(template)) is not None:
        raise Refused(f"it {wrong}")
    compiled = _compiled(template)
    # As transformers does, for templates (gpt-oss) that know reasoning by its other name.
    said = [{"thinking": m["reasoning_content"], **m} if "reasoning_content" in m else m for m in messages]
    pieces: list[str] = []
    generated: list[tuple[int, int]] = []
    size, limit = 0, MAX_LAYOUT_CHARS
    heard = _Heard(said, pieces) if grows(template) else None
    with ONE_AT_A_TIME, limited(), compiled.environment.activate_tracker(pieces, generated):
        for piece in compiled.generate(
            messages=heard or said, tools=tools, documents=None, add_generation_prompt=prompt, **names
        ):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                limit = max(limit, LAYOUT_PER_CHAR * len(json.dumps([messages, tools], ensure_ascii=False)))
                if size > limit:
                    raise Flood
    if heard is None or len(heard.asked_at) != len(messages) + 1:
        return Rendered("".join(pieces), generated, [])
    ends = [0, *accumulate(map(len, pieces))]
    return Rendered("".join(pieces), generated, [ends[count] for count in heard.asked_at])


class _Heard(list[Mapping[str, Any]]):
    """Messages that note how many pieces there are when a loop asks for each, and when it finds no more."""

    def __init__(self, messages: Iterable[Mapping[str, Any]], pieces: Sequence[str]) -> None:
        super().__init__(messages)
        self.pieces, self.asked_at = pieces, list[int]()

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for message in super().__iter__():
            self.asked_at.append(len(self.pieces))
            yield message
        self.asked_at.append(len(self.pieces))


def _compiled(template: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


def needless(tree: nodes.Template) -> str | None:
    """What a template has that none needs, and that can't be ended once it runs: powers, which are one step of hours."""
    return "has the operator **, which no chat template needs" if tree.find(nodes.Pow) is not None else None


@cache
def _needless(template: str) -> str | None:
    return needless(_compiled(template).environment.parse(template))


@cache
def grows(template: str) -> bool:
    """Whether what the template renders of a message surely depends on none after it, and what it renders after them on none.

    So it is where the template is one loop over the messages that looks at no other than the first, nor at what is to come.
    """
    tree: nodes.Template = _compiled(template).environment.parse(template)
    loops = [i for i, node in enumerate(tree.body) if isinstance(node, nodes.For)]
    if len(loops) != 1 or any(tree.find(kind) is not None for kind in OUT_OF_ORDER):
        return False
    loop, after = tree.body[loops[0]], nodes.Template(tree.body[loops[0] + 1 :])
    assert isinstance(loop, nodes.For)
    if loop.iter != nodes.Name("messages", "load") or loop.test is not None or loop.else_ or loop.recursive:
        return False
    names = list(tree.find_all(nodes.Name))
    first = sum(n.node == nodes.Name("messages", "load") and n.arg == nodes.Const(0) for n in tree.find_all(nodes.Getitem))
    back = sum(n.node == nodes.Name("loop", "load") and n.attr in LOOKS_BACK for n in tree.find_all(nodes.Getattr))
    later = [name.name for name in after.find_all(nodes.Name)]
    changed = {name.name for name in names if name.ctx != "load"}
    return (
        sum(name.name == "messages" for name in names) == first + 1
        and sum(name.name == "loop" for name in names) == back
        and sum(name.name == "add_generation_prompt" for name in names) == later.count("add_generation_prompt")
        and changed.isdisjoint(later)
        and {"messages", "loop", "tools", "documents"}.isdisjoint(later)
    )
