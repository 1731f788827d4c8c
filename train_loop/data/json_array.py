"""A JSON array of rows, element by element: only one of them is held in memory.

Brackets and strings are followed, nothing more; an element's own text is for the JSON parser.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

from train_loop.data import lines
from train_loop.data.lines import BOM, EXCERPT_BYTES, Damaged, Line, WrongType

OUTSIDE = re.compile(rb'["\[\]{},]')
INSIDE = re.compile(rb'["\\]')
QUOTE, BACKSLASH, COMMA = b'"'[0], b"\\"[0], b","[0]
OPENING, CLOSING = b"[{", b"]}"
END = "the file ends within the array"


def split_array(chunks: Iterable[bytes]) -> Iterator[Line]:
    """The elements of the array that the file is. What a cut or damaged file has lost counts as one more.

    Raises WrongType when the file doesn't begin with an array.
    """
    stream = iter(chunks)
    buffer, base = _open(stream)  # base: the offset in the file of buffer[0], which is the opening bracket
    if not buffer:
        return
    begin, at = base + 1, 1  # the element's offset in the file; where in the buffer to look on
    depth, in_string, oversized = 1, False, False
    fault: Damaged | None = None
    while fault is None:
        found = (INSIDE if in_string else OUTSIDE).search(buffer, at)
        if found is None:
            at = max(at, len(buffer))  # a backslash at the buffer's end takes the next byte with it
            oversized = oversized or base + len(buffer) - begin > lines.MAX_LINE_BYTES
            done = len(buffer) if oversized else begin - base
            del buffer[:done]
            base, at = base + done, at - done
            fault = _more(stream, buffer)
            continue
        byte, at = buffer[found.start()], found.end()
        if in_string:
            in_string = byte == BACKSLASH
            at += in_string
        elif byte == QUOTE:
            in_string = True
        elif byte in OPENING:
            depth += 1
        elif depth > 1:
            depth -= byte in CLOSING
        else:  # what ends an element: a comma, or the end of the array
            text = bytes(buffer[max(0, begin - base) : found.start()])
            if oversized or len(text) > lines.MAX_LINE_BYTES:
                yield lines.too_long(begin)
            elif text.strip():
                yield _element(begin, text)
            elif byte == COMMA:
                yield Line(begin, b"", "nothing between two commas of the array")
            begin, oversized = base + at, False
            if byte != COMMA:
                del buffer[:at]
                fault = _after(buffer, stream, byte)
                if fault is not None:
                    excerpt, rest = bytes(buffer[:EXCERPT_BYTES]), len(buffer) + _length(stream)
                    yield Line(begin, excerpt, fault.reason, fault.lost_from(begin, begin + rest))
                return
    text, end = bytes(buffer[max(0, begin - base) :]), base + len(buffer)
    if depth == 1 and not in_string and not oversized and text.rstrip().endswith(b"}"):
        yield _element(begin, text)  # whole: only what should follow is missing
        begin, text = begin + len(text), b""
    yield Line(begin, text[:EXCERPT_BYTES], fault.reason, fault.lost_from(begin, end))


def _length(stream: Iterator[bytes]) -> int:
    """Bytes that are left."""
    length = 0
    with contextlib.suppress(Damaged):
        for chunk in stream:
            length += len(chunk)
    return length


def _element(offset: int, text: bytes) -> Line:
    lead = len(text) - len(text.lstrip())
    return Line(offset + lead, text.strip())


def _open(stream: Iterator[bytes]) -> tuple[bytearray, int]:
    """The first bytes from the opening bracket on, and its offset; no bytes for a blank file."""
    buffer = bytearray()
    while not buffer.removeprefix(BOM).strip():
        if len(buffer) > lines.MAX_LINE_BYTES:
            raise WrongType("it begins with nothing but blanks")
        fault = _more(stream, buffer)
        if fault is not None and fault.reason == END:
            return bytearray(), 0
        if fault is not None:
            raise WrongType(f"its first bytes can't be read: {fault.reason}")
    text = buffer.removeprefix(BOM).lstrip()
    if not text.startswith(b"["):
        raise WrongType(f"it begins with {text[:20].decode(errors='replace')!r}, not with [")
    return text, len(buffer) - len(text)


def _more(stream: Iterator[bytes], buffer: bytearray) -> Damaged | None:
    """Put the next chunk into the buffer; why there is none."""
    try:
        buffer += next(stream)
    except StopIteration:
        return Damaged(END)
    except Damaged as damage:
        return damage
    return None


def _after(rest: bytearray, stream: Iterator[bytes], closing: int) -> Damaged | None:
    """What is wrong with how the array and the file end, if anything."""
    if closing != CLOSING[0]:
        return Damaged("the array is closed by }")
    fault: Damaged | None = None
    while fault is None and not rest.strip():
        rest.clear()
        fault = _more(stream, rest)
    if fault is None:
        return Damaged("more text after the end of the array")
    return None if fault.reason == END else fault
