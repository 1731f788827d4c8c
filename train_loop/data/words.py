"""The tokens of short texts, word by word, without most of a tokenizer's pipeline: the same ones in a third of the time.

A tokenizer over bytes cuts a text into words by patterns and makes the tokens of each by itself. In plain ASCII Python's regular
expressions find the same words.
"""

from __future__ import annotations

import re
import string
import struct
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from train_loop.data.token_bounds import TokenBounds, byte_names, steps

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel has by itself
# Those of Llama 3, of Qwen 2 and 3, and of Mistral's newer models.
PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
KINDS = {"L": "A-Za-z", "N": "0-9", "Lu": "A-Z", "Ll": "a-z", "Lt": "", "Lm": "", "Lo": "", "M": ""}  # of ASCII
PLAIN = "\t\n\r" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
LETTERS = " " + string.ascii_letters
LETTER_CASES = r"\p{Lu}"  # in a pattern that also cuts where a large letter follows a small one
# What the other patterns don't cut, and what none of them cuts.
WORD, WORD_IN_CASES = re.compile(" ?[A-Za-z]+"), re.compile(" ?[A-Za-z]?[a-z]*")
NEVER = re.compile("(?!)")
MAX_CHARS = 1 << 16  # of a text: its words are objects of Python
LONG_CHARS = 32  # what won't come again
MAX_KNOWN = 1 << 15
# Of a token: its id, how many characters it covers, how many further on the next one starts.
TOKEN = struct.Struct("=3i")


class Known(dict[str, bytes]):
    """TOKENs of texts that came before; those of a new one are made when it is looked up. Threads may share it."""

    def __init__(self, make: Callable[[str], bytes]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, text: str) -> bytes:
        tokens = self.make(text)
        if len(text) <= LONG_CHARS:
            self[text] = tokens
        return tokens


class OfAscii(dict[int, bytes]):
    """TOKENs of ASCII by their ids, each of which is made when it is looked up: a vocabulary is large."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.backend = backend

    def __missing__(self, i: int) -> bytes:
        size = len(self.backend.id_to_token(i))
        self[i] = TOKEN.pack(i, size, size)
        return self[i]


class Words:
    """The words that one tokenizer has met."""

    def __init__(
        self, tokenizer: Any, splits: Sequence[Callable[[str], list[str]]], bounds: TokenBounds, *, in_cases: bool
    ) -> None:
        """`splits` cut plain text, one after another; `in_cases`: also before a large letter that follows a small one."""
        backend = tokenizer.backend_tokenizer
        self._backend, self._model, self._bounds = backend, backend.model, bounds
        self._cut, *self._cut_again = splits
        self._added = re.compile(f"({'|'.join(map(re.escape, sorted(bounds.added, key=len, reverse=True))) or '(?!)'})")
        self._ids = {token: backend.token_to_id(token) for token in bounds.added}
        self._plain = re.compile(f"[{re.escape(''.join(sign for sign in PLAIN if bounds.covers(sign)))}]*")
        word = WORD_IN_CASES if in_cases else WORD
        self._is_word = (word if bounds.covers(LETTERS) and not any(map(word.fullmatch, bounds.added)) else NEVER).fullmatch
        self._names = byte_names()
        self._lost = bytes(byte for byte, name in self._names.items() if backend.token_to_id(name) is None)
        self._of_ascii = OfAscii(backend)
        self._known = Known(self._made)

    @classmethod
    def of(cls, tokenizer: Any, bounds: TokenBounds) -> Words | None:
        """The tokenizer's words, if it makes the tokens of each by itself and cuts them by ways known here."""
        splits = steps(tokenizer.backend_tokenizer.pre_tokenizer)
        if [s["type"] == "ByteLevel" for s in splits] != [False] * (len(splits) - 1) + [True]:
            return None  # bytes are cut in other places
        found = [_split(s) for s in splits]
        in_cases = any(LETTER_CASES in s["pattern"]["Regex"] for s in splits if is_known(s))
        return cls(tokenizer, [split for split in found if split is not None], bounds, in_cases=in_cases)

    def tokens_each(self, texts: Iterable[str]) -> list[bytes | None]:
        """TOKENs of texts that stand by themselves; None where they aren't sure to be those of its words and added tokens."""
        is_word, written, blank = self._is_word, self._written, self._names[ord(" ")]
        return [
            self._tokens(text) if is_word(text) is None or len(text) > MAX_CHARS else written(text.replace(" ", blank))
            for text in texts
        ]

    def _tokens(self, text: str) -> bytes | None:
        if len(text) > MAX_CHARS:
            return None
        if self._added.search(text) is None:
            return self._between(text)
        found = list[bytes | None]()
        for i, part in enumerate(self._added.split(text)):
            if i % 2:
                size = len(part)
                found.append(TOKEN.pack(self._ids[part], size, size) if self._bounds.stands_alone(part) else None)
            else:
                found.append(self._between(part))
        return None if None in found else b"".join(found)  # type: ignore[arg-type]

    def _between(self, text: str) -> bytes | None:
        """TOKENs of a text without added tokens."""
        if self._plain.fullmatch(text) is not None:
            words = self._cut(text)
            for cut in self._cut_again:
                words = [word for part in words for word in cut(part)]
        elif self._is_whole(text.encode()) and (not self._bounds.composes or unicodedata.is_normalized("NFC", text)):
            words = [text[start:end] for _, (start, end) in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        else:
            return None
        if len(self._known) > MAX_KNOWN:
            self._known.clear()
        return b"".join(map(self._known.__getitem__, words))

    def _is_whole(self, text: bytes) -> bool:
        """Whether each byte is part of some token."""
        return len(text.translate(None, self._lost)) == len(text)

    def _written(self, word: str) -> bytes:
        """TOKENs of a word of ASCII, as the vocabulary writes it."""
        of_ascii = self._of_ascii
        return b"".join([of_ascii[token.id] for token in self._model.tokenize(word)])

    def _made(self, word: str) -> bytes:
        written = "".join(map(self._names.__getitem__, word.encode()))
        if len(written) == len(word):
            return self._written(written)
        # Of which character each byte is.
        at = [i for i, character in enumerate(word) for _ in character.encode()]
        found = [token.id for token in self._model.tokenize(written)]
        begins = [0, *accumulate(len(self._backend.id_to_token(i)) for i in found)]
        starts = [at[begin] for begin in begins[:-1]] + [len(word)]
        return b"".join(
            TOKEN.pack(i, at[end - 1] + 1 - start, following - start)
            for i, end, (start, following) in zip(found, begins[1:], pairwise(starts), strict=True)
        )


def is_known(split: dict[str, Any]) -> bool:
    """Whether this step of a pre-tokenizer cuts by one of PATTERNS."""
    isolated = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    return isolated and split["pattern"].get("Regex") in PATTERNS


def _split(step: dict[str, Any]) -> Callable[[str], list[str]] | None:
    """How a step of a pre-tokenizer cuts plain text; None if it doesn't."""
    if step["type"] == "Digits":
        return re.compile(r"[0-9]|[^0-9]+" if step["individual_digits"] else r"[0-9]+|[^0-9]+").findall
    if step["type"] == "ByteLevel":
        return _for_ascii(GPT2).findall if step["use_regex"] else None
    return _for_ascii(step["pattern"]["Regex"]).findall


def _for_ascii(pattern: str) -> re.Pattern[str]:
    """The same pattern, for ASCII."""

    def kinds(text: str, form: str) -> str:
        return re.sub(r"\\p\{(\w+)\}", lambda kind: form.format(KINDS[kind[1]]), text)

    inside = re.sub(r"\[[^\]]*\]", lambda group: kinds(group[0], "{}"), pattern)
    return re.compile(kinds(inside, "[{}]"), re.ASCII)
