"""From what a row calls an image to the image: out of the dataset's zip, out of its bucket, or out of the row itself."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train_loop.data.archive import Archive
from train_loop.data.formats import RowRejected
from train_loop.data.images import MAX_BYTES, Picture, admit
from train_loop.data.parts import open_archive
from train_loop.data.sources import SourceFile, explain, path_of
from train_loop.spec import SCHEMES, JobSpec
from train_loop.storage import DENIED, is_away

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

SHOWN_CHARS = 100
DATA = "data:"


@dataclass(frozen=True)
class ImageSource:
    """The images that rows of one zip may name."""

    archive: Archive
    file: SourceFile  # the zip
    filesystem: FileSystem  # the dataset's; its keys open objects that rows name
    scheme: str | None  # how those begin: s3://
    max_pixels: int | None

    def picture(self, reference: str) -> Picture:
        """Raises RowRejected that names the image, OSError while the storage is away, DatasetError for all else."""
        try:
            return admit(self._read(reference), self.max_pixels)
        except RowRejected as error:
            raise RowRejected(f"image {shortened(reference)} {error.reason}") from None

    def _read(self, reference: str) -> bytes:
        scheme, colon, _ = reference[:10].partition("://")
        if reference[: len(DATA)].lower() == DATA:
            return _decoded(reference)
        if self.scheme is not None and reference.startswith(self.scheme):
            return self._object(reference)
        if colon:
            where = f", or as {self.scheme} objects that the dataset's keys open" if self.scheme else ""
            raise RowRejected(f"isn't fetched by {scheme}://: put images into the zip{where}")
        try:
            return self.archive.read(reference)
        except OSError as error:
            if is_away(error):
                raise
            raise explain(error, self.file.uri) from None

    def _object(self, uri: str) -> bytes:
        path = path_of(uri)
        if not all(path.partition("/")):
            raise RowRejected("names no object")
        try:
            with self.filesystem.open_input_file(path) as stream:
                if stream.size() > MAX_BYTES:
                    raise RowRejected(f"is larger than {MAX_BYTES >> 20} MiB")
                return bytes(stream.read())
        except ValueError:  # Arrow's, of a path that it can't read
            raise RowRejected("names no object") from None
        except OSError as error:
            if is_away(error):
                raise
            refused = isinstance(error, PermissionError) or any(sign in str(error) for sign in DENIED)
            raise RowRejected("can't be read with the dataset's keys" if refused else "isn't there") from None


@contextmanager
def image_source(spec: JobSpec, filesystem: FileSystem, file: SourceFile) -> Iterator[ImageSource]:
    """What opens the images of a zip's rows, while the block lasts. Raises OSError while the storage is away, DatasetError."""
    scheme = SCHEMES.get(spec.dataset_details.source_type)
    with open_archive(filesystem, file) as archive:
        yield ImageSource(archive, file, filesystem, scheme, spec.dataset_config.preprocessing.max_pixels)


def shortened(reference: str) -> str:
    """For people; of a data URI without its data."""
    if reference[: len(DATA)].lower() == DATA:
        return reference.partition(",")[0][:SHOWN_CHARS]
    return reference if len(reference) <= SHOWN_CHARS else f"{reference[:SHOWN_CHARS]}…"


def _decoded(uri: str) -> bytes:
    head, comma, data = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RowRejected("isn't base64: a data URI must be data:image/…;base64,…")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RowRejected("isn't sound base64") from None
