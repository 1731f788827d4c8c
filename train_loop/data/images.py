"""Images of a dataset: what may become one, and in which form it is kept.

An image file is a program of someone else's for a decoder: nothing is decoded before its size is known, and whatever fails in it
makes its row unusable and nothing more.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from train_loop.data.formats import RowRejected
from train_loop.errors import first_line

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 64 << 20
MAX_PIXELS = 64_000_000  # 190 MB as RGB
MAX_RATIO = 200  # of the sides; processors of the Qwen family take no more
PLAIN = ("RGB", "L", "1", "P")  # modes that become RGB without a choice, where nothing of them is transparent
DEEP = ("I;16", "I;16B", "I;16L", "I;16N")  # grey of 16 bits
UNKNOWN_RANGE = ("I", "F")  # which value is white isn't said
ORIENTATION = 0x0112  # of EXIF; 1 is upright
MAX_REASON_CHARS = 100  # of a decoder's own words


@dataclass(frozen=True)
class Picture:
    """An image that decodes: a file of one of FORMATS, upright, of one frame, without transparency."""

    data: bytes
    width: int
    height: int

    def open(self) -> Image.Image:
        """The pixels, RGB."""
        with Image.open(io.BytesIO(self.data), formats=FORMATS) as image:
            return image.convert("RGB")


def admit(raw: bytes, max_pixels: int | None = None) -> Picture:
    """Decode an image file and put it into the form that is kept; above `max_pixels` it is scaled down, keeping its ratio.

    The file is kept as it is where it already has that form, else it is written anew as PNG. Raises RowRejected.
    """
    if len(raw) > MAX_BYTES:
        raise RowRejected(f"is larger than {MAX_BYTES >> 20} MiB")
    if not raw:
        raise RowRejected("is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are refused below
            return _admit(raw, max_pixels)
    except RowRejected:
        raise
    except UnidentifiedImageError:
        raise RowRejected("is no JPEG, PNG, WebP, GIF, BMP or TIFF") from None
    except Image.DecompressionBombError:
        raise RowRejected(f"has more than {MAX_PIXELS // 1_000_000} million pixels") from None
    except Exception as error:  # decoders raise what they like
        raise RowRejected(f"can't be decoded: {first_line(error, type(error).__name__)[:MAX_REASON_CHARS]}") from error


def _admit(raw: bytes, max_pixels: int | None) -> Picture:
    with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise RowRejected(f"has {width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million")
        if max(width, height) > MAX_RATIO * min(width, height):
            raise RowRejected(f"has {width} x {height} pixels: one side is more than {MAX_RATIO} times the other")
        if image.mode in UNKNOWN_RANGE:
            raise RowRejected(f"has pixels of 32 bits a channel (mode {image.mode}), whose range isn't known")
        image.load()
        made: Image.Image = image
        # A JPEG of several pictures is a camera's, and the first one is what every program shows.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            made = made.copy()
        if image.mode in DEEP:
            made = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.has_transparency_data:
            clear = image if image.mode == "RGBA" else image.convert("RGBA")
            made = Image.new("RGB", image.size, "white")
            made.paste(clear, mask=clear)
        elif image.mode not in PLAIN:
            made = image.convert("RGB")
        made = _upright(image, made)
        if max_pixels is not None and width * height > max_pixels:
            made = _scaled(_as_rgb(made), max_pixels)
        return Picture(raw if made is image else _as_png(made), *made.size)


def _upright(image: Image.Image, made: Image.Image) -> Image.Image:
    """`made`, turned as the metadata of `image` has it."""
    try:
        turned = image.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - damaged metadata says nothing of the pixels
        return made
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(turned)
    return made if method is None else made.transpose(method)


def _scaled(image: Image.Image, max_pixels: int) -> Image.Image:
    """At most so many pixels."""
    width, height = image.size
    factor = math.sqrt(max_pixels / (width * height))
    short = max(1, math.floor(min(width, height) * factor))
    long = max(short, min(math.floor(max(width, height) * factor), max_pixels // short))
    return image.resize((long, short) if width >= height else (short, long), Image.Resampling.BICUBIC)


def _as_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it, too


def _as_png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    _as_rgb(image).save(out, "PNG", compress_level=1)
    return out.getvalue()
