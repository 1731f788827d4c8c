"""A text's tokens piece by piece, most of them from memory: words come again and again.

A tokenizer over bytes first cuts a text into words, by a pattern, and makes the tokens of each by itself. So it may be cut
beforehand at places where each of the known patterns does, and what a piece became is remembered. Text without blanks is one
piece, and takes as long as it did.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import numpy as np

from train_loop.data.token_bounds import TokenBounds, steps
from train_loop.data.words import TOKEN, Known, Words, is_known

# Before a blank that follows a character, and where a word or number ends before one of some signs: no word that a pattern finds
# goes on there, nor does it look at what follows to see where it ends, or at what came before to see where it begins.
CUT = r"(?<=\S)(?= )|(?<=[A-Za-z0-9])(?=[\s{signs}])"
# A piece, up to such a place: to find what lies between them is faster than to try each character.
PIECE = (
    r" ?[A-Za-z0-9]++(?=[\s{signs}]|\Z)"  # a word
    r"|\s*+[{all}]*+[A-Za-z0-9]++(?=[\s{signs}]|\Z)"  # a word after signs
    r"| ?[{all}]++(?= |\Z)"  # signs before a blank
    r"|\s*+[!-~\n]*?[A-Za-z0-9](?=[\s{signs}]|\Z)"  # ASCII that ends in a word
    r"|\s*+\S++(?:[^\S ]\s*+(?:\S++|\Z))*+|\s++"  # anything else before a blank
)
SIGNS = r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~"""
CHARS_PER_TOKEN = 3  # or more: so much text is looked at for each token that is asked for
MORE_CHARS = 64  # and this
MAX_KNOWN = 1 << 16  # pieces: some 12 MB, twice

Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]


class Uncovered(Exception):
    """No token is made of how a piece begins."""


class Pieces:
    """The pieces that one tokenizer has met."""

    def __init__(self, tokenizer: Any, words: Words | None, signs: str) -> None:
        """`signs`: those before which a word may be cut off."""
        self._backend, self._words = tokenizer.backend_tokenizer, words
        # As a file may have it; a call of `tokenizer` does the same.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._cut, self._piece = (re.compile(p.format(signs=re.escape(signs), all=re.escape(SIGNS))) for p in (CUT, PIECE))
        self._known = Known(self._made_alone)
        self._before: dict[str, bytes] = {}  # what was known until there was too much of it

    @classmethod
    def of(cls, tokenizer: Any, bounds: TokenBounds | None) -> Pieces | None:
        """The tokenizer's pieces, if it, with these `bounds`, is known to make their tokens one by one."""
        if bounds is None or not _keeps_apart(tokenizer, bounds):
            return None
        inside = {sign for token in bounds.added for sign in re.findall(r"(?<=[A-Za-z0-9])[^A-Za-z0-9]", token)}
        return cls(tokenizer, Words.of(tokenizer, bounds), "".join(sign for sign in SIGNS if sign not in inside))

    def tokens(self, text: str, at_least: int | None = None) -> Tokens:
        """The text's tokens, and where in it each starts and ends; or the first ones, `at_least` so many."""
        found, at, missing = list[bytes](), 0, at_least
        if len(self._known) > MAX_KNOWN:
            self._before, self._known = self._known, Known(self._made_alone)
        try:
            while at < len(text) and (missing is None or missing > 0):
                cut = self._cut.search(text, at + CHARS_PER_TOKEN * missing + MORE_CHARS) if missing is not None else None
                end = cut.start() if cut else len(text)
                found.append(b"".join(map(self._known.__getitem__, self._piece.findall(text[at:end]))))
                at = end
                if missing is not None:
                    missing -= len(found[-1]) // TOKEN.size
        except Uncovered:
            return self._made(text)
        ids, covers, ahead = np.frombuffer(b"".join(found), np.int32).reshape(-1, 3).T.astype(np.int64)
        starts = np.cumsum(ahead) - ahead
        return ids.astype(np.int32), starts, starts + covers

    def _made_alone(self, piece: str) -> bytes:
        """TOKENs of a piece that isn't known. Raises Uncovered."""
        if self._before and (tokens := self._before.get(piece)) is not None:
            return tokens
        if self._words is not None and (tokens := self._words.tokens(piece)) is not None:
            return tokens
        ids, starts, ends = self._made(piece)
        if len(starts) == 0 or starts[0] > 0:
            raise Uncovered
        return np.column_stack([ids, ends - starts, np.diff(starts, append=len(piece))]).astype(np.int32).tobytes()

    def _made(self, text: str) -> Tokens:
        encoding = self._backend.encode(text, add_special_tokens=False)
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(encoding))
        return np.array(encoding.ids, np.int32), offsets[::2], offsets[1::2]


def _keeps_apart(tokenizer: Any, bounds: TokenBounds) -> bool:
    """Whether the tokens of a text are those of its pieces."""
    backend = tokenizer.backend_tokenizer
    splits, ends = steps(backend.pre_tokenizer), steps(backend.post_processor)
    return (
        bounds.longest is not None  # no token takes the blanks around it
        and any(s["type"] == "ByteLevel" for s in splits)
        and any(s.get("use_regex") or is_known(s) for s in splits)
        and all(s["type"] in ("ByteLevel", "Digits") or is_known(s) for s in splits)
        # One that trims blanks may leave them in a text's first token.
        and all(e["type"] == "TemplateProcessing" or (e["type"] == "ByteLevel" and not e["trim_offsets"]) for e in ends)
        and backend.model.dropout is None
        and not any(re.search(r"\S\s", token) for token in bounds.added)
    )
