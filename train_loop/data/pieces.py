"""A text's tokens piece by piece, most of them from memory: words come again and again.

A tokenizer over bytes first cuts a text into words, by a pattern, and makes the tokens of each by itself. So it may be cut
beforehand at places where each of the known patterns does, and what a piece became is remembered. Text without blanks is one
piece, and takes as long as it did. Several texts are cut up together by NumPy and Arrow, and a piece is looked up once for all
of its places in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from train_loop.data.token_bounds import FIRST_OF_SEVERAL, TokenBounds, steps
from train_loop.data.words import LONG_CHARS, TOKEN, Words, is_known

# Before a blank that follows a character, and where a word or number ends before one of some signs: no word that a pattern finds
# goes on there, nor does it look at what follows to see where it ends, or at what came before to see where it begins.
CUT = r"(?<=\S)(?= )|(?<=[A-Za-z0-9])(?=[\s{signs}])"
SIGNS = r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~"""
CHARS_PER_TOKEN = 3  # or more: so much text is looked at first for each token that is asked for
MORE_CHARS = 64  # and this
MAX_TOGETHER = 1 << 20  # characters that are cut up at a time
MAX_KNOWN = 1 << 16  # pieces: some 12 MB, twice

Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]


# What a byte of UTF-8 says of a cut before it (`_begins`) and behind it (`_ends`). A blank that isn't in ASCII ends in one of
# LAST_BUT_ONE and then one of LAST_OF_BLANKS; so do a few other characters, after which nothing is cut either.
BLANK, STOP, UNICODE_BLANK = 1, 2, 4
LAST_OF_BLANKS = bytes(range(0x80, 0x8B)) + b"\x9f\xa0\xa8\xa9\xaf"
LAST_BUT_ONE = b"\xc2\x80\x81\x9a"


class Pieces:
    """The pieces that one tokenizer has met."""

    def __init__(self, tokenizer: Any, words: Words | None, signs: str) -> None:
        """`signs`: those before which a word may be cut off."""
        self._backend, self._words = tokenizer.backend_tokenizer, words
        # As a file may have it; a call of `tokenizer` does the same.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._cut = re.compile(CUT.format(signs=re.escape(signs)))
        self._ends, self._begins = _ends(), _begins(signs)
        self._known: dict[str, bytes] = {}  # TOKENs by piece
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
        return self.tokens_each([text], [at_least])[0]

    def tokens_each(self, texts: Sequence[str], at_least: Sequence[int | None]) -> list[Tokens]:
        """The same of several."""
        found = [[np.empty((3, 0), np.int64)] for _ in texts]
        at, made = [0] * len(texts), [0] * len(texts)
        left = [i for i, text in enumerate(texts) if text]
        while left:
            some, size = list[str](), 0
            for i in left:
                if size > MAX_TOGETHER:
                    break
                begin, at[i] = at[i], self._stop(texts[i], at[i], made[i], at_least[i])
                some.append(texts[i][begin : at[i]])
                size += len(some[-1])
            for i, part, tokens in zip(left, some, self._looked_up(some), strict=False):
                if tokens is None:
                    found[i], at[i] = [np.array(self._made(texts[i]))], len(texts[i])
                    continue
                tokens[1:] += at[i] - len(part)
                found[i].append(tokens)
                made[i] += tokens.shape[1]
            left = [i for i in left if at[i] < len(texts[i]) and ((wanted := at_least[i]) is None or made[i] < wanted)]
        joined = (parts[-1] if len(parts) < 3 else np.concatenate(parts, axis=1) for parts in found)
        return [(ids.astype(np.int32), starts, ends) for ids, starts, ends in joined]

    def _stop(self, text: str, at: int, made: int, at_least: int | None) -> int:
        """Where to stop looking at a text for so many tokens, of which some are made of what is before `at`."""
        if at_least is None:
            return len(text)
        chars = (at / made if made else CHARS_PER_TOKEN) * (at_least - made)
        cut = self._cut.search(text, at + round(chars) + MORE_CHARS)
        return cut.start() if cut else len(text)

    def _looked_up(self, texts: Sequence[str]) -> Iterator[np.ndarray | None]:
        """Of each text (none is empty) its tokens, where they start and end `[3, n]`; None if some of it makes no token."""
        written = [text.encode() for text in texts]
        data = b"".join(written)
        cuts = self._cuts(data)
        texts_at = np.cumsum([0, *map(len, written)])
        cuts[texts_at[:-1]] = True
        places = np.append(np.flatnonzero(cuts), len(data)).astype(np.int32)
        buffers = [None, pa.py_buffer(places), pa.py_buffer(data)]
        pieces = pa.Array.from_buffers(pa.string(), len(places) - 1, buffers).dictionary_encode()
        which = pieces.indices.to_numpy()
        made = self._tokens_of(pieces.dictionary.to_numpy(zero_copy_only=False).tolist())
        sizes = np.fromiter(map(len, made), np.int64, len(made)) // TOKEN.size
        known = np.frombuffer(b"".join(made), np.int32).reshape(-1, 3).T.astype(np.int64, order="C")
        # Each piece's tokens in its place.
        counts = sizes[which]
        ends = np.cumsum(counts)
        tokens = np.repeat((np.cumsum(sizes) - sizes)[which] - ends + counts, counts) + np.arange(ends[-1])
        all_made = np.take(known, tokens, axis=1)
        _, covers, ahead = all_made
        starts = np.cumsum(ahead) - ahead
        all_made[1:] = starts, starts + covers
        firsts = np.searchsorted(places, texts_at)
        lost = np.minimum.reduceat(counts, firsts[:-1]) == 0
        edges = np.append(0, ends)[firsts]
        for (first, last), is_lost in zip(pairwise(edges.tolist()), lost.tolist(), strict=True):
            if is_lost:
                yield None
            else:
                found = all_made[:, first:last]
                found[1:] -= found[1, 0]
                yield found

    def _cuts(self, text: bytes) -> np.ndarray:
        """Of each byte of a text in UTF-8, whether the text is cut before it: at CUT, but for some rare places of it."""
        ends, begins = (np.frombuffer(text.translate(table), np.uint8) for table in (self._ends, self._begins))
        cuts = np.zeros(len(text), bool)
        cuts[1:] = ends[:-1] & begins[1:] & (BLANK | STOP)
        cuts[2:] &= ends[1:-1] & begins[:-2] & UNICODE_BLANK == 0
        return cuts

    def _tokens_of(self, pieces: Sequence[str]) -> list[bytes]:
        """TOKENs of pieces; empty if none is made of how one begins."""
        if len(self._known) > MAX_KNOWN:
            self._before, self._known = self._known, {}
        known, before = self._known, self._before
        tokens = [*map(known.get, pieces)]
        missing = [piece for piece, its in zip(pieces, tokens, strict=True) if its is None]
        found = {piece: before[piece] for piece in missing if piece in before}
        new = [piece for piece in missing if piece not in found]
        found |= zip(new, self._made_each(new), strict=True)
        known.update((piece, its) for piece, its in found.items() if len(piece) <= LONG_CHARS)
        return [found[piece] if its is None else its for piece, its in zip(pieces, tokens, strict=True)]

    def _made_each(self, pieces: Sequence[str]) -> list[bytes]:
        made = self._words.tokens_each(pieces) if self._words is not None else [None] * len(pieces)
        return [self._made_alone(piece) if its is None else its for piece, its in zip(pieces, made, strict=True)]

    def _made_alone(self, piece: str) -> bytes:
        ids, starts, ends = self._made(piece)
        if len(starts) == 0 or starts[0] > 0:
            return b""
        return np.column_stack([ids, ends - starts, np.diff(starts, append=len(piece))]).astype(np.int32).tobytes()

    def _made(self, text: str) -> Tokens:
        encoding = self._backend.encode(text, add_special_tokens=False)
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(encoding))
        return np.array(encoding.ids, np.int32), offsets[::2], offsets[1::2]


def _ends() -> bytes:
    """Of each byte, what may be cut off behind it."""
    return bytes(
        BLANK * (byte >= FIRST_OF_SEVERAL or not chr(byte).isspace())
        + STOP * (byte < FIRST_OF_SEVERAL and chr(byte).isalnum())
        + UNICODE_BLANK * (byte in LAST_OF_BLANKS)
        for byte in range(256)
    )


def _begins(signs: str) -> bytes:
    """Of each byte, as what it may be cut off from what is before it. `signs`: those before which a word may be."""
    return bytes(
        BLANK * (byte == ord(" "))
        + STOP * (byte < FIRST_OF_SEVERAL and (chr(byte).isspace() or chr(byte) in signs))
        + UNICODE_BLANK * (byte in LAST_BUT_ONE)
        for byte in range(256)
    )


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
