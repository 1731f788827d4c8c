"""What becomes of an image file: kept as it is, made upright and plain, or refused with the reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train_loop.data import images
from train_loop.data.formats import RowRejected
from train_loop.data.images import admit

ORIENTATION = 0x0112


def drawn(width=24, height=16, channels=3):
    """An image of smooth colours: a JPEG of it is close to it."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x // max(1, width - 1), 255 * y // max(1, height - 1), 0 * x + 40, 0 * x + 255][:channels]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def saved(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def with_orientation(value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def pixels(raw):
    return np.asarray(admit(raw).open()).astype(int)


def png_header(width, height):
    """A PNG that says this size and holds next to nothing."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


KEPT = {
    "JPEG": saved(drawn(), "JPEG"),
    "progressive JPEG": saved(drawn(), "JPEG", progressive=True),
    "PNG": saved(drawn()),
    "WebP": saved(drawn(), "WEBP", lossless=True),
    "BMP": saved(drawn(), "BMP"),
    "TIFF": saved(drawn(), "TIFF"),
    "GIF": saved(drawn(), "GIF"),
    "grey PNG": saved(drawn().convert("L")),
    "grey JPEG": saved(drawn().convert("L"), "JPEG"),
    "black and white": saved(drawn().convert("1")),
    "palette": saved(drawn().convert("P")),
    "upright by its metadata": saved(drawn(), "JPEG", exif=with_orientation(1)),
    "an orientation that is none": saved(drawn(), "JPEG", exif=with_orientation(9)),
    "one pixel": saved(drawn(1, 1)),
    "the longest side that is taken": saved(drawn(400, 2)),
    "text after its end": saved(drawn()) + b"more",
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_file_that_needs_nothing_is_kept_as_it_is(kind):
    picture = admit(KEPT[kind])
    assert picture.data is KEPT[kind]
    opened = picture.open()
    assert (opened.mode, opened.size) == ("RGB", (picture.width, picture.height))
    if kind in ("PNG", "WebP", "BMP", "TIFF"):
        assert opened.tobytes() == drawn().tobytes()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_photograph_is_turned_as_its_camera_was(orientation):
    upright = drawn()
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # of Transpose: what makes the stored image of the upright one
    for format in ("JPEG", "PNG", "WEBP", "TIFF"):
        raw = saved(upright.transpose(Image.Transpose(back)), format, exif=with_orientation(orientation))
        picture = admit(raw)
        assert (picture.width, picture.height) == upright.size
        assert np.abs(pixels(raw) - np.asarray(upright)).mean() < 12, format
        assert admit(picture.data).data is picture.data, "it isn't turned again"


def test_transparent_pixels_are_white():
    clear = drawn(8, 8, 4)
    clear.putalpha(Image.fromarray(np.repeat([[0, 128, 255, 255]], 8, 0).repeat(2, 1).astype(np.uint8)))
    expected = np.asarray(clear).astype(int)
    expected = (expected[..., :3] * expected[..., 3:] + 255 * (255 - expected[..., 3:])) / 255
    for raw in (saved(clear), saved(clear, "WEBP", lossless=True, exact=True), saved(clear, "TIFF")):
        assert np.abs(pixels(raw) - expected).max() <= 1
    grey = Image.merge("LA", (drawn().convert("L"), Image.new("L", (24, 16), 0)))
    assert (pixels(saved(grey)) == 255).all()
    palette = drawn().quantize(4)
    assert (pixels(saved(palette, transparency=bytes(4))) == 255).all()
    assert (pixels(saved(palette, "GIF", transparency=palette.getpixel((0, 0))))[0, 0] == 255).all()
    assert (pixels(saved(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))) == 255).all()


def test_sixteen_bits_keep_their_brightness():
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for format in ("PNG", "TIFF"):
        assert (pixels(saved(Image.fromarray(grey), format)) == (grey >> 8)[..., None]).all()
    big_endian = Image.frombytes("I;16B", (16, 16), grey.astype(">u2").tobytes())
    assert (pixels(saved(big_endian, "TIFF")) == (grey >> 8)[..., None]).all()


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_inks_become_light(format):
    assert (np.abs(pixels(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format)) - [255, 0, 0]) < 9).all()
    assert admit(saved(drawn().convert("YCbCr"), "TIFF")).open().size == (24, 16)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_kept(format):
    first, second = Image.new("RGB", (9, 7), "red"), Image.new("RGB", (9, 7), "blue")
    raw = saved(first, format, save_all=True, append_images=[second], **({"lossless": True} if format == "WEBP" else {}))
    picture = admit(raw)
    assert getattr(Image.open(io.BytesIO(picture.data)), "n_frames", 1) == 1
    assert (np.asarray(picture.open()) == [255, 0, 0]).all()


def test_a_camera_jpeg_of_two_pictures_is_kept():
    raw = saved(drawn(), "MPO", save_all=True, append_images=[drawn()])
    assert admit(raw).data is raw


REFUSED = {
    "nothing": (b"", "is empty"),
    "text": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no JPEG, PNG"),
    "HTML": (b"<!DOCTYPE html><h1>404</h1>", "is no JPEG, PNG"),
    "PDF": (saved(drawn(), "PDF"), "is no JPEG, PNG"),
    "a format of a less known decoder": (saved(drawn(), "TGA"), "is no JPEG, PNG"),
    "PostScript": (saved(drawn(), "EPS"), "is no JPEG, PNG"),
    "half a JPEG": (saved(drawn(200, 200), "JPEG")[:900], "can't be decoded: image file is truncated"),
    "half a PNG": (saved(drawn(200, 200))[:300], "can't be decoded: "),
    "half a WebP": (saved(drawn(200, 200), "WEBP")[:100], ""),
    "half a TIFF": (saved(drawn(200, 200), "TIFF")[:900], ""),
    "half a BMP": (saved(drawn(200, 200), "BMP")[:900], "can't be decoded: image file is truncated"),
    "half a GIF": (saved(drawn(200, 200), "GIF")[:900], "can't be decoded: "),
    "only a header": (saved(drawn())[:40], ""),
    "a PNG without pixels": (png_header(10, 10), "can't be decoded: "),
    "a damaged PNG": (KEPT["PNG"][:60] + b"\0\0\0" + KEPT["PNG"][63:], "can't be decoded: "),
    "a bomb": (png_header(100_000, 100_000), "has more than 64 million pixels"),
    "a small bomb": (png_header(9000, 9000), "has 9000 x 9000 pixels, more than 64 million"),
    "a bomb that is a TIFF": (saved(Image.new("1", (12_000, 12_000)), "TIFF", compression="group4"), "has 12000 x 12000 pixels"),
    "a line": (saved(drawn(20_000, 1)), "has 20000 x 1 pixels: one side is more than 200 times the other"),
    "a column": (saved(drawn(1, 201)), "has 1 x 201 pixels: one side is more than 200"),
    "no pixels at all": (png_header(0, 5), ""),
    "floating point": (saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "has pixels of 32 bits a channel (mode F)"),
    "32 bits": (saved(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "has pixels of 32 bits a channel (mode I)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_no_image_to_train_on_is_refused_with_the_reason(kind):
    raw, reason = REFUSED[kind]
    with pytest.raises(RowRejected) as refused:
        admit(raw)
    assert refused.value.reason.startswith(reason)
    assert " object at 0x" not in refused.value.reason


def test_a_file_that_is_too_large_is_not_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(RowRejected, match="is larger than"):
        admit(KEPT["PNG"] * 10)


@given(
    st.sampled_from(sorted(KEPT)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), max_size=4),
)
def test_a_damaged_file_is_an_image_or_refused(kind, damage):
    raw = bytearray(KEPT[kind])
    for where, data in damage:
        at = int(where * len(raw))
        raw[at : at + len(data)] = data
    try:
        picture = admit(bytes(raw))
    except RowRejected:
        return
    assert picture.open().size == (picture.width, picture.height)


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 50), (45, 22)), ((50, 100), (22, 45)), ((3000, 20), (391, 2)), ((31, 32), (31, 32))]
)
def test_a_larger_picture_is_scaled_down_to_max_pixels_in_its_ratio(size, expected):
    picture = admit(saved(drawn(*size)), 1024)
    assert (picture.width, picture.height) == picture.open().size == expected
    assert picture.width * picture.height <= 1024
    assert np.abs(np.asarray(picture.open()).mean((0, 1)) - np.asarray(drawn(*size)).mean((0, 1))).max() < 6


def test_turning_goes_before_scaling():
    picture = admit(saved(drawn(100, 50), "JPEG", exif=with_orientation(6)), 1024)
    assert (picture.width, picture.height) == (22, 45)
