"""The bytes of a file, decompressed as its name says, in bounded memory whatever was compressed."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import zstandard

from train_loop.data import lines
from train_loop.data.lines import Damaged, WrongType
from train_loop.spec import COMPRESSED

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

GZIP = 31  # zlib's name of the format
GZIP_MAGIC = b"\x1f"
GZIP_OUT_BYTES = 256 << 10
# zstandard gives all that its input holds at once, and a kilobyte may hold 40 MB.
ZSTD_IN_BYTES = 1 << 10
ZSTD_WINDOW_BYTES = 128 << 20  # what `zstd --long` makes; more has to be asked for there too


def is_compressed(path: str) -> bool:
    """By its name."""
    return path.endswith(COMPRESSED)


def read_chunks(filesystem: FileSystem, path: str, start: int = 0, limit: int | None = None) -> Iterator[bytes]:
    """The file's bytes: from `start` on, where it isn't compressed; as if the file ended after `limit` bytes.

    Raises OSError of the storage, WrongType when it isn't compressed as its name says, Damaged where that breaks off.
    """
    with filesystem.open_input_file(path) as stream:
        stream.seek(start)
        raw = [bytes(stream.read(limit))] if limit else iter(lambda: bytes(stream.read(lines.CHUNK_BYTES)), b"")
        try:
            if path.endswith(".gz"):
                yield from _gunzip(raw)
            elif path.endswith(".zst"):
                yield from _unzstd(raw)
            else:
                yield from raw
        except _Broken as broken:
            unread = stream.size() - stream.tell() + broken.unread
            raise Damaged(broken.reason, unread / stream.size()) from None


class _Broken(Exception):
    """Compressed data that can't be read on; of the bytes at hand `unread` are left."""

    def __init__(self, reason: str, unread: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.unread = unread


def _gunzip(raw: Iterable[bytes]) -> Iterator[bytes]:
    member, begun, any_done = zlib.decompressobj(GZIP), False, False
    for data in raw:
        while data:
            if any_done and not begun and not (data := data.lstrip(b"\0")):
                break  # padding
            before = member.copy()
            try:
                out = member.decompress(data, GZIP_OUT_BYTES)
            except zlib.error:
                if not any_done and not begun and data[:1] != GZIP_MAGIC:
                    raise WrongType("it isn't gzip data") from None
                yield from _up_to_the_damage(before, data)
                raise _Broken("the gzip data is damaged from here on", len(data)) from None
            begun = True
            if out:
                yield out
            data = member.unconsumed_tail
            if member.eof:
                data, member, begun, any_done = member.unused_data, zlib.decompressobj(GZIP), False, True
    if begun:
        if out := member.flush():
            yield out
        if not member.eof:
            raise _Broken("the file ends within its gzip data")


def _up_to_the_damage(member: Any, data: bytes) -> Iterator[bytes]:
    """What a call that failed had read by then."""
    with contextlib.suppress(zlib.error):
        for i in range(len(data)):
            if out := member.decompress(data[i : i + 1]):
                yield out


def _unzstd(raw: Iterable[bytes]) -> Iterator[bytes]:
    def new_frame() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj(write_size=16 << 10)

    frame, begun, any_done = new_frame(), False, False
    for whole in raw:
        for at in range(0, len(whole), ZSTD_IN_BYTES):
            data = whole[at : at + ZSTD_IN_BYTES]
            while data:
                try:
                    out = frame.decompress(data)
                except zstandard.ZstdError as error:
                    if "too much memory" in str(error):
                        raise WrongType(f"its zstd window is larger than {ZSTD_WINDOW_BYTES >> 20} MiB") from None
                    if not any_done and not begun:
                        raise WrongType("it isn't zstd data") from None
                    raise _Broken("the zstd data is damaged from here on", len(whole) - at) from None
                begun = True
                if out:
                    yield out
                data = b""
                if frame.eof:
                    data, frame, begun, any_done = frame.unused_data, new_frame(), False, True
    if begun:
        raise _Broken("the file ends within its zstd data")
