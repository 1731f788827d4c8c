"""A text's tokens piece by piece, most of them from memory: words come again and again.

A tokenizer over bytes first cuts a text into words, by a pattern, and makes the tokens of each by itself. So it may be cut
beforehand at places where each of the known patterns does (`cuts.py`), and what a piece became is remembered. Text that has no
such places is one piece, and takes as long as it did. Several texts are cut up together by NumPy and Arrow, and a piece is
looked up once for all of its places in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from train_loop.data.cuts import Cuts
from train_loop.data.token_bounds import TokenBounds, steps
from train_loop.data.words import LONG_CHARS, TOKEN, Words, is_known

# Where one may stop to look at a text: at some of the places where it is cut.
STOP = re.compile(r"(?<=\S)(?= )|(?<=[A-Za-z0-9])(?=\s)")
CHARS_PER_TOKEN = 3  # or more, until texts were seen: so much is looked at first for each token that is asked for
MORE_CHARS = 64  # and this
MAX_TOGETHER = 2 << 20  # characters that are cut up at a time
MAX_KNOWN = 1 << 17  # pieces: some 25 MB, twice

Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]


class Pieces:
    """The pieces that one tokenizer has met."""

    def __init__(self, tokenizer: Any, words: Words | None, cuts: Cuts) -> None:
        self._backend, self._words, self._cuts = tokenizer.backend_tokenizer, words, cuts
        # As a file may have it; a call of `tokenizer` does the same.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._known: dict[bytes, bytes] = {}  # TOKENs by piece
        self._before: dict[bytes, bytes] = {}  # what was known until there was too much of it
        self._chars, self._tokens = CHARS_PER_TOKEN, 1  # of the texts before

    @classmethod
    def of(cls, tokenizer: Any, bounds: TokenBounds | None) -> Pieces | None:
        """The tokenizer's pieces, if it, with these `bounds`, is known to make their tokens one by one."""
        if bounds is None or not _keeps_apart(tokenizer, bounds):
            return None
        joins_signs = any(is_known(step) for step in steps(tokenizer.backend_tokenizer.pre_tokenizer))
        return cls(tokenizer, Words.of(tokenizer, bounds), Cuts(bounds.added, joins_signs=joins_signs))

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
        self._chars += sum(at)
        self._tokens += sum(made)
        joined = (parts[-1] if len(parts) < 3 else np.concatenate(parts, axis=1) for parts in found)
        return [(ids.astype(np.int32), starts, ends) for ids, starts, ends in joined]

    def _stop(self, text: str, at: int, made: int, at_least: int | None) -> int:
        """Where to stop looking at a text for so many tokens, of which some are made of what is before `at`."""
        if at_least is None:
            return len(text)
        chars = (at / made if made else self._chars / self._tokens) * (at_least - made)
        cut = STOP.search(text, at + round(chars) + MORE_CHARS)
        return cut.start() if cut else len(text)

    def _looked_up(self, texts: Sequence[str]) -> Iterator[np.ndarray | None]:
        """Of each text (none is empty) its tokens, where they start and end `[3, n]`; None if some of it makes no token."""
        written = [text.encode() for text in texts]
        data = b"".join(written)
        cuts = self._cuts.within(written)
        texts_at = np.cumsum([0, *map(len, written)])
        places = np.append(np.flatnonzero(cuts), len(data)).astype(np.int32)
        buffers = [None, pa.py_buffer(places), pa.py_buffer(data)]
        pieces = pa.Array.from_buffers(pa.binary(), len(places) - 1, buffers).dictionary_encode()
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

    def _tokens_of(self, pieces: Sequence[bytes]) -> list[bytes]:
        """TOKENs of pieces in UTF-8; empty if none is made of how one begins."""
        if len(self._known) > MAX_KNOWN:
            self._before, self._known = self._known, {}
        known, before = self._known, self._before
        tokens = [*map(known.get, pieces)]
        missing = [piece for piece, its in zip(pieces, tokens, strict=True) if its is None]
        found = {piece: before[piece] for piece in missing if piece in before}
        new = [piece for piece in missing if piece not in found]
        found |= zip(new, self._made_each([piece.decode() for piece in new]), strict=True)
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
