"""What is sure about a text's tokens without making them: how many there are at most, and where one must lie.

Holds of BPE over bytes, or over characters with bytes for those it doesn't know: the tokens cover the text in order, and each
covers at least one byte of its own. A tokenizer that isn't known to be of these kinds has no bounds.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any

EXTRA_TOKENS = 1  # a blank that is put before the text
KEEPS_ALL = {"Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"}  # ways of splitting that drop nothing
BLANK = "▁"
FIRST_OF_SEVERAL = 0x80  # from this byte on, a UTF-8 character has more than one


@dataclass(frozen=True)
class TokenBounds:
    """Bounds for one tokenizer."""

    composes: bool  # characters, as Unicode's NFC does
    longest: int | None  # characters that a token covers at most; None if some take all the blanks around them too
    added: tuple[str, ...]  # what is looked for in the text before anything else
    uncertain: frozenset[str]  # of those, which may start elsewhere or not be found
    dropped: frozenset[str]  # characters of which no token is made: control characters that it never saw

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBounds | None:
        """The tokenizer's bounds, if it is of a kind that has some."""
        from tokenizers import models

        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        model = getattr(backend, "model", None)
        if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
            return None
        added = list(tokenizer.added_tokens_decoder.values())
        if any(a.single_word for a in added) or tokenizer.split_special_tokens:
            return None
        try:
            splits, changes = (steps(step) for step in (backend.pre_tokenizer, backend.normalizer))
        except (TypeError, ValueError):  # one of its own, in Python
            return None
        vocabulary = tokenizer.get_vocab()
        kinds = [step["type"] for step in splits]
        dropped: frozenset[str] = frozenset()
        if "ByteLevel" in kinds:
            missing = [byte for byte, name in byte_names().items() if name not in vocabulary]
            dropped = frozenset(chr(byte) for byte in missing if byte < FIRST_OF_SEVERAL)
            # Other characters leave at least the bytes that follow their first.
            known = _over_bytes(splits, changes) and not any(FIRST_OF_SEVERAL <= byte < 0xC0 for byte in missing)
        else:
            short = any(len(a.content.encode()) < 2 for a in added)
            known = bool(model.byte_fallback) and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
            known = known and _over_characters(splits, changes, vocabulary, short=short)
        if not known:
            return None
        plain = not any(a.lstrip or a.rstrip for a in added)
        return cls(
            composes=any(change["type"] == "NFC" for change in changes),
            longest=max(map(len, vocabulary)) if plain else None,
            added=tuple(a.content for a in added),
            # In a tokenizer that changes its text first, one that it looks for in the changed text isn't sure to be found.
            uncertain=frozenset(a.content for a in added if a.lstrip or (changes and a.normalized)),
            dropped=dropped,
        )

    def covers(self, text: str) -> bool:
        """Whether each character is part of some token."""
        return self.dropped.isdisjoint(text)

    def most(self, text: str) -> int | None:
        """How many tokens the text, or any beginning or end of one, makes at most."""
        if text.isascii():
            return len(text) + EXTRA_TOKENS
        if self.composes and not unicodedata.is_normalized("NFC", text):
            return None
        return len(text.encode()) + EXTRA_TOKENS

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(a[i:] for a in self.added for i in range(1, len(a)))

    def stands_alone(self, token: str) -> bool:
        """Whether wherever these characters are they are this one token: no other one can take some of them."""
        if token not in self._alone:
            self._alone[token] = self._is_alone(token)
        return self._alone[token]

    @cached_property
    def _alone(self) -> dict[str, bool]:
        return {}

    def _is_alone(self, token: str) -> bool:
        return (
            token in self.added
            and token not in self.uncertain
            and token == token.strip()
            and not any(token in other or other in token for other in self.added if other != token)
            and not any(token[:i] in self._ends for i in range(1, len(token) + 1))
        )


def steps(step: Any) -> list[dict[str, Any]]:
    """A pre-tokenizer, normaliser or post-processor, each of its steps as it would be in tokenizer.json."""
    if step is None:
        return []
    whole = json.loads(step.__getstate__())
    parts = (whole.get(name) for name in ("pretokenizers", "normalizers", "processors"))
    return next((list(part) for part in parts if part is not None), [whole])


def _over_bytes(splits: list[dict[str, Any]], changes: list[dict[str, Any]]) -> bool:
    return (
        all(s["type"] in ("ByteLevel", "Digits") or _keeps_all(s) for s in splits)
        and not any(s.get("add_prefix_space") for s in splits)
        and all(change["type"] == "NFC" for change in changes)
    )


def _over_characters(
    splits: list[dict[str, Any]], changes: list[dict[str, Any]], vocabulary: dict[str, int], *, short: bool
) -> bool:
    blanks = all(
        change["type"] == "NFC"
        or (change["type"] == "Prepend" and change["prepend"] == BLANK)
        or (change["type"] == "Replace" and change["pattern"] == {"String": " "} and change["content"] == BLANK)
        for change in changes
    )
    # A blank comes before each stretch between added tokens: these leave room for it where they are of two bytes or more.
    prepends = any(change["type"] == "Prepend" for change in changes) or any(
        s["type"] == "Metaspace" and s["prepend_scheme"] != "never" for s in splits
    )
    kept = all(s["type"] in ("Digits", "Metaspace") or _keeps_all(s) for s in splits)
    return blanks and kept and BLANK in vocabulary and not (prepends and (short or len(splits) > 1))


def _keeps_all(split: dict[str, Any]) -> bool:
    return split["type"] == "Split" and split["behavior"] in KEEPS_ALL


def byte_names() -> dict[int, str]:
    """How each byte is written in the vocabulary of a tokenizer over bytes (GPT-2's way: visible ones as themselves)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = (byte for byte in range(256) if byte not in visible)
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
