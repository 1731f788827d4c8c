"""A file in storage as a file object of Python, for libraries that read from one."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


class StoredFile(io.RawIOBase):
    """Read by ranges. Remembers the storage's own `error`: a library may hide it, or raise OSErrors of its own."""

    def __init__(self, filesystem: FileSystem, path: str) -> None:
        self._file = filesystem.open_input_file(path)
        self.error: OSError | None = None

    def size(self) -> int:
        """In bytes."""
        return int(self._file.size())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._file.read(size))
        except OSError as error:
            self.error = error
            raise

    def read_at(self, offset: int, size: int) -> bytes:
        """The bytes from `offset` on, in one request."""
        try:
            return bytes(self._file.read_at(size, offset))
        except OSError as error:
            self.error = error
            raise

    def close(self) -> None:
        self._file.close()
        super().close()
