"""A zip of images with `train.jsonl` at its root, read where it is: its directory by ranges, then one member at a time.

Nothing is unpacked to disk, and of a member no more is held than MAX_BYTES. What is wrong with the archive as a whole is a
WrongType, what is wrong with one image a RowRejected.
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from train_loop.data import lines
from train_loop.data.formats import RowRejected
from train_loop.data.images import MAX_BYTES
from train_loop.data.lines import WrongType
from train_loop.data.stored_file import StoredFile
from train_loop.errors import first_line

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

ROWS = "train.jsonl"
MAX_DIRECTORY_BYTES = 64 << 20  # some 800,000 members: as objects of Python 600 MB
AHEAD_BYTES = 1 << 20  # read at a time where the next bytes will be wanted too
END_BYTES = 66 << 10  # a small archive's whole directory is in it
HEADER_BYTES = 30  # before a member's name and data
# Deflate makes of zeros a thousandth, of text or pixels rarely less than a fiftieth, but of a plain drawing as BMP.
MAX_TIMES = 200
HARMLESS_BYTES = 16 << 20
HARMLESS_ROWS_BYTES = 64 << 20
ENCRYPTED, PATCHED, UTF8 = 0x1, 0x20, 0x800  # flag bits
METHODS = {8: "deflate", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "zstd", 95: "xz", 98: "PPMd", 99: "AES encryption"}
# What zipfile raises over an archive that isn't sound.
UNSOUND = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    EOFError,
    IndexError,
    OSError,
    OverflowError,
    struct.error,
    zlib.error,
)
KINDS = {
    b"\x1f\x8b": "gzip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "RAR",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
DRIVE = re.compile("[A-Za-z]:")


class Archive:
    """One zip. Not for several threads at once."""

    def __init__(self, filesystem: FileSystem, path: str) -> None:
        """Raises OSError of the storage, WrongType."""
        self._ranges = _Ranges(StoredFile(filesystem, path))
        try:
            self._zip = self._opened()
            # None: there are several of the name.
            self._members: dict[str, zipfile.ZipInfo | None] = {}
            for info in self._zip.infolist():
                name = _name_of(info)
                self._members[name] = None if name in self._members else info
            self._rows = self._find_rows()
        except BaseException:
            self._ranges.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
        self._ranges.close()

    @property
    def rows_bytes(self) -> int:
        """Length of train.jsonl, uncompressed."""
        return self._rows.file_size

    def row_chunks(self, start: int = 0) -> Iterator[bytes]:
        """The bytes of train.jsonl from `start` on. It is unpacked from its beginning, whatever the start.

        Raises OSError of the storage, WrongType where it is damaged.
        """
        at = 0
        try:
            with self._unpacking(), self._zip.open(self._rows) as stream:
                while chunk := stream.read(lines.CHUNK_BYTES):
                    if at + len(chunk) > start:
                        yield chunk[max(0, start - at) :]
                    at += len(chunk)
        except _Unsound as unsound:
            raise WrongType(f"its {ROWS} is damaged: {unsound}") from None
        if at != self._rows.file_size:
            raise WrongType(f"its {ROWS} is damaged: it ends after {at} of {self._rows.file_size} bytes")

    def read(self, reference: str) -> bytes:
        """The image that a row names by its path from the archive's root. Raises OSError of the storage, RowRejected."""
        name = _path_of(reference)
        info = self._members.get(name)
        if info is None:
            raise RowRejected("is in the archive more than once" if name in self._members else "isn't in the archive")
        if (fault := _fault_of(info, HARMLESS_BYTES)) is not None:
            raise RowRejected(fault)
        if max(info.file_size, info.compress_size) > MAX_BYTES:
            raise RowRejected(f"is larger than {MAX_BYTES >> 20} MiB")
        self._ranges.load(info.header_offset, HEADER_BYTES + len(info.orig_filename.encode()) + 512 + info.compress_size)
        try:
            with self._unpacking(), self._zip.open(info) as stream:
                data = stream.read()
        except _Unsound as unsound:
            raise RowRejected(f"is damaged in the archive: {unsound}") from None
        if len(data) != info.file_size:
            raise RowRejected(f"is damaged in the archive: it ends after {len(data)} of {info.file_size} bytes")
        return data

    def _opened(self) -> zipfile.ZipFile:
        self._ranges.load(max(0, self._ranges.size - END_BYTES), END_BYTES)
        try:
            with self._unpacking():
                return zipfile.ZipFile(self._ranges)
        except _Unsound as unsound:
            head = self._ranges.at(0, 300)
            known = next(
                (name for sign, name in KINDS.items() if head.startswith(sign)), "tar" if b"ustar" in head[257:] else None
            )
            if known is not None:
                raise WrongType(f"it is a {known} archive") from None
            if unsound.is_no_zip and head.startswith(b"PK"):
                raise WrongType("it is cut off: the directory at its end is missing") from None
            raise WrongType(f"it isn't a zip: it begins with {head[:8]!r}" if unsound.is_no_zip else str(unsound)) from None

    def _find_rows(self) -> zipfile.ZipInfo:
        info = self._members.get(ROWS)
        if info is not None:
            if (fault := _fault_of(info, HARMLESS_ROWS_BYTES)) is not None:
                raise WrongType(f"its {ROWS} {fault}")
            return info
        if ROWS in self._members:
            raise WrongType(f"it has {ROWS} more than once")
        below = [name for name in self._members if name.endswith(f"/{ROWS}") and not name.startswith("__MACOSX/")]
        others = [name for name in self._members if name.endswith(".jsonl") and "/" not in name]
        hint = ""
        if below:
            hint = f", but {below[0][:200]}: zip what is in {posixpath.dirname(below[0])[:200]} and not the folder itself"
        elif others:
            hint = f", but {others[0][:200]}: rename it"
        raise WrongType(f"it has no {ROWS} at its root{hint}")

    @contextlib.contextmanager
    def _unpacking(self) -> Iterator[None]:
        """Inside, the storage's errors are raised as they are, and zipfile's as _Unsound."""
        try:
            yield
        except UNSOUND as error:
            if self._ranges.error is not None:
                raise self._ranges.error from None
            raise _Unsound(error) from error


class _Unsound(Exception):
    """What zipfile found to be wrong."""

    def __init__(self, error: Exception) -> None:
        super().__init__(re.sub(r" for file .*", "", first_line(error, "it is cut off")))
        self.is_no_zip = str(error) == "File is not a zip file"


class _Ranges(io.RawIOBase):
    """A file of which one range is held, for one reader: zipfile asks for four kilobytes at a time."""

    def __init__(self, source: StoredFile) -> None:
        self._source = source
        self.size = source.size()
        self._position = 0
        self._start = 0  # of what is held
        self._held = b""

    @property
    def error(self) -> OSError | None:
        """The storage's, if it raised one."""
        return self._source.error

    def load(self, start: int, length: int) -> None:
        """Have this range at hand."""
        end = self._start + len(self._held)
        if self._start <= start and start + length <= end:
            return
        # Members that are wanted in the order in which they lie are read together.
        if self._start < start <= end + (64 << 10):
            length = max(length, AHEAD_BYTES)
        self._start, self._held = start, self._source.read_at(start, length)

    def at(self, start: int, length: int) -> bytes:
        """The bytes of a range."""
        self.load(start, length)
        return self._held[start - self._start : start - self._start + length]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise OSError("an offset before its beginning")  # zipfile tries
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        wanted = max(0, self.size - self._position)
        wanted = min(wanted, size) if size >= 0 else wanted
        if wanted > MAX_DIRECTORY_BYTES:  # nothing else is read at once
            raise ValueError(f"its directory is larger than {MAX_DIRECTORY_BYTES >> 20} MiB: make several archives of it")
        if not wanted:
            return b""
        if not self._start <= self._position <= self._position + wanted <= self._start + len(self._held):
            self._start, self._held = self._position, self._source.read_at(self._position, max(wanted, AHEAD_BYTES))
        data = self._held[self._position - self._start :][:wanted]
        self._position += len(data)
        return data

    def close(self) -> None:
        self._source.close()
        super().close()


def _name_of(info: zipfile.ZipInfo) -> str:
    """The member's name, as rows may spell it."""
    name = info.filename
    if not info.flag_bits & UTF8:
        # Many programs write UTF-8 and don't say so; zipfile takes it for an old code page.
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return _spelled(name)


def _spelled(name: str) -> str:
    """One spelling for all: Windows has its own separators, macOS its own accents."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")


def _path_of(reference: str) -> str:
    """The name that the archive may have for a reference. Raises RowRejected."""
    path = _spelled(reference)
    if path.startswith("/") or DRIVE.match(path):
        raise RowRejected("is an absolute path: images are named from the archive's root")
    if ".." in path.split("/"):
        raise RowRejected("leads out of a folder by ..: images are named from the archive's root")
    return posixpath.normpath(path)


def _fault_of(info: zipfile.ZipInfo, harmless_bytes: int) -> str | None:
    """Why the member isn't read, from what the directory says of it."""
    if info.is_dir():
        return "is a folder"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a symbolic link"
    if info.flag_bits & ENCRYPTED:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & PATCHED:
        method = METHODS.get(info.compress_type, f"method {info.compress_type}")
        return f"is compressed by {method}, which isn't read: use deflate, what zip programs do unless told otherwise"
    if info.file_size > max(harmless_bytes, MAX_TIMES * info.compress_size):
        return f"unpacks to {info.file_size:,} bytes from {info.compress_size:,}, more than {MAX_TIMES} times as many"
    return None
