"""A text's tokens piece by piece, most of them from memory: words come again and again.

A tokenizer over bytes first cuts a text into words, by a pattern, and makes the tokens of each by itself. So it may be cut
beforehand at places where each of the known patterns does, and what a piece became is remembered. Text without blanks is one
piece, and takes as long as it did.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np

from train_loop.data.token_bounds import TokenBounds, steps

# Before a blank between two characters, and where a word or number ends before these: no word that a pattern finds goes on there,
# nor does it look at what follows to see where it ends, or at what came before to see where it begins.
CUT = re.compile(r'(?<=[!-~])(?= [!-~])|(?<=[A-Za-z0-9])(?=[\n.,:;!?)"*])')
# Besides GPT-2's, which ByteLevel has by itself: those of Llama 3, of Qwen 2 and 3, and of Mistral's newer models.
PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CHARS_PER_TOKEN = 4  # about: so much text is looked at for each token that is asked for
LONG_CHARS = 32  # pieces that won't come again
MAX_KNOWN = 1 << 17  # pieces: some 25 MB
TOKEN_BYTES = 12  # of a remembered one: its id, and where in the piece it starts and ends

Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]


class Pieces:
    """The pieces that one tokenizer has met."""

    def __init__(self, tokenizer: Any, separator: str) -> None:
        self._tokenizer, self._separator = tokenizer, separator
        self._known: dict[str, bytes] = {}

    @classmethod
    def of(cls, tokenizer: Any, bounds: TokenBounds | None) -> Pieces | None:
        """The tokenizer's pieces, if it, with these `bounds`, is known to make their tokens one by one."""
        if bounds is None or not _keeps_apart(tokenizer, bounds):
            return None
        separator = next((token for token in bounds.added if bounds.stands_alone(token)), None)
        return cls(tokenizer, separator) if separator else None

    def tokens(self, text: str, at_least: int | None = None) -> Tokens:
        """The text's tokens, and where in it each starts and ends; or the first ones, `at_least` so many."""
        found, at = list[Tokens](), 0
        while at < len(text) and (at_least is None or sum(len(ids) for ids, _, _ in found) < at_least):
            cut = CUT.search(text, at + CHARS_PER_TOKEN * at_least) if at_least is not None else None
            end = cut.start() if cut else len(text)
            found.append(self._of_part(text[at:end], at))
            at = end
        if len(found) == 1:
            return found[0]
        ids, starts, ends = zip(*found, strict=True) if found else ([np.empty(0)],) * 3
        return (
            np.concatenate(ids).astype(np.int32),
            np.concatenate(starts).astype(np.int64),
            np.concatenate(ends).astype(np.int64),
        )

    def _of_part(self, text: str, at: int) -> Tokens:
        pieces = CUT.split(text)
        found = self._looked_up(pieces)
        begins = np.cumsum([at, *map(len, pieces)])[:-1].repeat([len(tokens) // TOKEN_BYTES for tokens in found])
        ids, starts, ends = np.frombuffer(b"".join(found), np.int32).reshape(-1, 3).T
        return ids.copy(), begins + starts, begins + ends

    def _looked_up(self, pieces: list[str]) -> list[bytes]:
        # Other threads may do the same: what is known stays, until all of it is given up for a new one.
        known = self._known
        if not (new := [piece for piece in dict.fromkeys(pieces) if piece not in known]):
            return [known[piece] for piece in pieces]
        made = dict(zip(new, self._made(new), strict=True))
        if len(known) > MAX_KNOWN:
            self._known = {}
        known.update((piece, tokens) for piece, tokens in made.items() if len(piece) <= LONG_CHARS)
        return [made[piece] if piece in made else known[piece] for piece in pieces]

    def _made(self, pieces: list[str]) -> list[bytes]:
        """The pieces' tokens; made in one go, each behind the separator."""
        text = "".join(self._separator + piece for piece in pieces)
        out = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
        tokens = np.column_stack([out["input_ids"], out["offset_mapping"]]).astype(np.int32)
        begins = np.cumsum([0, *(len(self._separator) + len(piece) for piece in pieces)])
        edges = np.searchsorted(tokens[:, 1], begins)
        tokens[:, 1:] -= (begins[:-1] + len(self._separator)).repeat(np.diff(edges))[:, None].astype(np.int32)
        return [tokens[first + 1 : last].tobytes() for first, last in pairwise(edges.tolist())]


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
        and not any(CUT.search(token) for token in bounds.added)
    )


def _is_known(split: dict[str, Any]) -> bool:
    isolated = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    return isolated and split["pattern"].get("Regex") in PATTERNS
