"""Where a text may be cut up before a tokenizer over bytes sees it: only where none of its words goes on.

Such a tokenizer finds words by a pattern. At a cut no word of a known pattern goes on, looks at what follows to see where it
ends, or at what came before to see where it begins; nor is there a cut within an added token. Two or three bytes of UTF-8 decide,
so that NumPy finds the cuts of a whole text at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from string import ascii_letters, digits, punctuation

import numpy as np

from train_loop.data.token_bounds import FIRST_OF_SEVERAL

LETTERS, DIGITS, SIGNS = ascii_letters.encode(), digits.encode(), punctuation.encode()
SPACES = bytes(byte for byte in range(FIRST_OF_SEVERAL) if chr(byte).isspace())
BLANKS = b" \t\n\r"  # those of them that are blank to every pattern
VISIBLE = bytes(byte for byte in range(FIRST_OF_SEVERAL) if byte not in SPACES)  # or at least no blank
OF_SEVERAL = bytes(range(FIRST_OF_SEVERAL, 256))
# A blank that isn't in ASCII ends in one of LAST_BUT_ONE and then one of LAST_OF_BLANKS; so do a few other characters.
LAST_OF_BLANKS = bytes(range(0x80, 0x8B)) + b"\x9f\xa0\xa8\xa9\xaf"
LAST_BUT_ONE = b"\xc2\x80\x81\x9a"
BETWEEN_TEXTS = b"\xff"  # which is no part of UTF-8, and decides nothing

# Cuts between two bytes: what isn't blank and " "; a letter or digit and what ends its word; a letter or sign and a digit; a
# digit and a letter, and where words don't begin with signs a sign and a letter (but for "'", as in "'s").
BLANK, STOP, DIGIT, LETTER = 1, 2, 4, 8
BETWEEN_TWO = BLANK | STOP | DIGIT | LETTER
UNICODE_BLANK = 16  # two bytes behind which " " isn't BLANK
# Cuts by three bytes: before the last of several blanks, which goes with what follows; behind a sign that goes with the sign or
# " " before it, not with the letter that follows; behind a line's end that a letter follows.
RUN, SIGN, LINE = 32, 64, 128


class Cuts:
    """Where texts are cut for one tokenizer."""

    def __init__(self, added: Iterable[str], *, joins_signs: bool) -> None:
        """`added`: its added tokens. `joins_signs`: whether words may begin with a sign, as in known patterns but GPT-2's."""
        self._behind = _table(
            {
                BLANK: VISIBLE + OF_SEVERAL,
                STOP: LETTERS + DIGITS,
                DIGIT: LETTERS + SIGNS,
                LETTER: DIGITS if joins_signs else DIGITS + SIGNS.replace(b"'", b""),
                UNICODE_BLANK: LAST_OF_BLANKS,
                RUN: BLANKS,
                # Mistral's takes a "/" to the line's end before it.
                SIGN: b" " + SIGNS.replace(b"/", b"") if joins_signs else b"",
                LINE: VISIBLE + BLANKS + OF_SEVERAL.translate(None, LAST_OF_BLANKS),
            }
        )
        self._middle = _table({RUN: b" " if joins_signs else b" \n", SIGN: SIGNS.replace(b"'", b""), LINE: b"\n"})
        self._before = _table(
            {
                BLANK: b" ",
                STOP: SPACES + SIGNS,
                DIGIT: DIGITS,
                LETTER: LETTERS,
                UNICODE_BLANK: LAST_BUT_ONE,
                RUN: LETTERS + SIGNS,
                SIGN: LETTERS,
                LINE: LETTERS,
            }
        )
        for token in added:
            self._leave_whole(token.encode())

    def within(self, texts: Sequence[bytes]) -> np.ndarray:
        """Of each byte of texts in UTF-8 (none is empty), one after another, whether they are cut before it `[n]`."""
        text = BETWEEN_TEXTS.join(texts)
        behind, middle, before = (
            np.frombuffer(text.translate(table), np.uint8) for table in (self._behind, self._middle, self._before)
        )
        cuts = np.zeros(len(text), bool)
        cuts[1:] = behind[:-1] & before[1:] & BETWEEN_TWO
        cuts[2:] &= behind[1:-1] & before[:-2] & UNICODE_BLANK == 0
        three = behind[:-2] & middle[1:-1] & before[2:]
        cuts[1:-1] |= three & RUN != 0
        cuts[2:] |= three & (SIGN | LINE) != 0
        behind_texts = np.cumsum([len(text) + 1 for text in texts])
        cuts[0] = cuts[behind_texts[:-1]] = True
        return np.delete(cuts, behind_texts[:-1] - 1)

    def _leave_whole(self, token: bytes) -> None:
        """Take back what would cut an added token, whatever is around it."""
        # What is around it is a text each: several blanks end as one word, and the first word may begin with a sign.
        self._before[token[0]] &= ~RUN
        self._behind[token[-1]] &= ~SIGN
        for last, this in pairwise(token):
            if self._behind[last] & STOP:
                self._before[this] &= ~STOP
            self._behind[last] &= ~(self._before[this] & (DIGIT | LETTER) | self._middle[this] & RUN)
            self._middle[last] &= ~(self._before[this] & (SIGN | LINE))


def _table(bytes_of: dict[int, bytes]) -> bytearray:
    """Of each byte, its bits."""
    return bytearray(sum(bit for bit, its in bytes_of.items() if byte in its) for byte in range(256))
