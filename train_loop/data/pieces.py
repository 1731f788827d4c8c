"""A text's tokens piece by piece, most of them from memory: words come again and again.

A tokenizer over bytes first cuts a text into words, by a pattern, and makes the tokens of each by itself. So it may be cut
beforehand at places where each of the known patterns does, and what a piece became is remembered. Text without blanks is one
piece, and takes as long as it did.
"""

from __future__ import annotations

import re
from itertools import chain, pairwise
from typing import Any

import numpy as np

from train_loop.data.token_bounds import TokenBounds, steps

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
# Besides GPT-2's, which ByteLevel has by itself: those of Llama 3, of Qwen 2 and 3, and of Mistral's newer models.
PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CHARS_PER_TOKEN = 4  # about: so much text is looked at for each token that is asked for
MORE_CHARS = 64  # and this, as there may be fewer
LONG_CHARS = 32  # pieces that won't come again
MAX_KNOWN = 1 << 16  # pieces: some 12 MB, twice
TOKEN_BYTES = 12

Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]


class Pieces:
    """The pieces that one tokenizer has met."""

    def __init__(self, tokenizer: Any, separator: str, signs: str) -> None:
        """`signs`: those before which a word may be cut off."""
        self._backend, self._separator = tokenizer.backend_tokenizer, separator
        # As a file may have it; a call of `tokenizer` does the same.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._cut, self._piece = (re.compile(p.format(signs=re.escape(signs), all=re.escape(SIGNS))) for p in (CUT, PIECE))
        # Of each piece its tokens, three int32 for each: its id, how many characters it covers, how many further on the next one
        # starts. Other threads may add to it at the same time.
        self._known: dict[str, bytes] = {}
        self._before: dict[str, bytes] = {}  # what was known until there was too much of it

    @classmethod
    def of(cls, tokenizer: Any, bounds: TokenBounds | None) -> Pieces | None:
        """The tokenizer's pieces, if it, with these `bounds`, is known to make their tokens one by one."""
        if bounds is None or not _keeps_apart(tokenizer, bounds):
            return None
        separator = next((token for token in bounds.added if bounds.stands_alone(token)), None)
        inside = {sign for token in bounds.added for sign in re.findall(r"(?<=[A-Za-z0-9])[^A-Za-z0-9]", token)}
        return cls(tokenizer, separator, "".join(sign for sign in SIGNS if sign not in inside)) if separator else None

    def tokens(self, text: str, at_least: int | None = None) -> Tokens:
        """The text's tokens, and where in it each starts and ends; or the first ones, `at_least` so many."""
        found, at, missing = list[Tokens](), 0, at_least
        while at < len(text) and (missing is None or missing > 0):
            cut = self._cut.search(text, at + CHARS_PER_TOKEN * missing + MORE_CHARS) if missing is not None else None
            end = cut.start() if cut else len(text)
            found.append(self._of_part(text[at:end], at))
            at = end
            if missing is not None:
                missing -= len(found[-1][0])
        if len(found) == 1:
            return found[0]
        ids, starts, ends = zip(*found, strict=True) if found else ([np.empty(0)],) * 3
        return (
            np.concatenate(ids).astype(np.int32),
            np.concatenate(starts).astype(np.int64),
            np.concatenate(ends).astype(np.int64),
        )

    def _of_part(self, text: str, at: int) -> Tokens:
        pieces = self._piece.findall(text)
        tokens = self._looked_up(pieces)
        if tokens is None:
            ids, starts, ends = self._made(text)
            return ids, at + starts, at + ends
        ids, covers, ahead = np.frombuffer(tokens, np.int32).reshape(-1, 3).T
        starts = np.cumsum(ahead, dtype=np.int64) - ahead + at
        return ids.copy(), starts, starts + covers

    def _looked_up(self, pieces: list[str]) -> bytes | None:
        """The pieces' tokens after each other; None where they don't cover all of the text."""
        known = self._known
        found = list(map(known.get, pieces))
        if missing := [i for i, tokens in enumerate(found) if tokens is None]:
            before = self._before
            new = dict.fromkeys(pieces[i] for i in missing)
            again = {piece: tokens for piece in new if (tokens := before.get(piece)) is not None}
            made = self._made_apart([piece for piece in new if piece not in again])
            if made is None:
                return None
            made |= again
            if len(known) > MAX_KNOWN:
                self._before, self._known = known, {}
            known.update((piece, tokens) for piece, tokens in made.items() if len(piece) <= LONG_CHARS)
            for i in missing:
                found[i] = made[pieces[i]]
        return b"".join(found)  # type: ignore[arg-type]

    def _made_apart(self, pieces: list[str]) -> dict[str, bytes] | None:
        """The pieces' tokens, made in one go, each behind the separator; None where they don't cover all of a piece."""
        text = "".join(self._separator + piece for piece in pieces)
        ids, starts, ends = self._made(text)
        stops = np.cumsum([len(self._separator) + len(piece) for piece in pieces])
        begins = np.concatenate([[0], stops[:-1]]) + len(self._separator)
        edges = np.searchsorted(starts, np.concatenate([[0], stops]))
        following = np.append(starts, len(text))
        if (following[edges[:-1] + 1] != begins).any():
            return None
        tokens = np.column_stack([ids, ends - starts, np.diff(following)]).astype(np.int32).tobytes()
        places = (TOKEN_BYTES * edges).tolist()
        return {
            piece: tokens[separator + TOKEN_BYTES : end] for piece, (separator, end) in zip(pieces, pairwise(places), strict=True)
        }

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
        and any(s.get("use_regex") or _is_known(s) for s in splits)
        and all(s["type"] in ("ByteLevel", "Digits") or _is_known(s) for s in splits)
        # One that trims blanks may leave them in a text's first token.
        and all(e["type"] == "TemplateProcessing" or (e["type"] == "ByteLevel" and not e["trim_offsets"]) for e in ends)
        and backend.model.dropout is None
        and not any(re.search(r"\S\s", token) for token in bounds.added)
    )


def _is_known(split: dict[str, Any]) -> bool:
    isolated = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    return isolated and split["pattern"].get("Regex") in PATTERNS
