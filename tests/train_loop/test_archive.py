"""Zips that are wrong as a whole, and images in them that are: each is said, and costs no more than it must."""

import bz2
import gzip
import io
import json
import lzma
import stat
import struct
import subprocess
import sys
import tarfile
import unicodedata
import warnings
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow.fs import LocalFileSystem

from tests.train_loop.test_images import saved
from tests.train_loop.zips import FIELDS, Chat, jsonl, picture, row, zipped
from train_loop.data import archive, lines, parts
from train_loop.data.archive import Archive
from train_loop.data.formats import RowRejected
from train_loop.data.lines import WrongType
from train_loop.data.prepare import prepare_local
from train_loop.data.shards import PreparedDataset, ShardSet
from train_loop.data.sources import find_files
from train_loop.errors import DatasetError
from train_loop.spec import JobSpec

LOCAL = LocalFileSystem()
GOOD = picture()
ROWS = [row("a.png")] * 3


def member(name, *, mode=0, flags=0, method=zipfile.ZIP_DEFLATED):
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type = mode << 16, method
    info.flag_bits |= flags
    return info


def patched(data, name, *, flags=None, method=None, size=None, raw=None, unpacked=b""):
    """The zip with fields of a member's two headers written over, or its name, which stays as long."""
    made = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        info = zipped.getinfo(name)
        directory = data.index(b"PK\1\2", zipped.start_dir)
        while data[directory + 46 : directory + 46 + len(name)] != name.encode():
            directory = data.index(b"PK\1\2", directory + 4)
    for at, flag, how, length, where in (
        (info.header_offset, 6, 8, 22, 30),
        (directory, 8, 10, 24, 46),
    ):
        if flags is not None:
            made[at + flag : at + flag + 2] = struct.pack("<H", flags)
        if method is not None:
            made[at + how : at + how + 2] = struct.pack("<H", method)
        if size is not None:
            made[at + length : at + length + 4] = struct.pack("<I", size)
        if raw is not None:
            made[at + where : at + where + len(name)] = raw
    if unpacked:
        start = info.header_offset + 30 + len(name)
        made[start + 3 : start + 3 + len(unpacked)] = unpacked
    return bytes(made)


def twice(name, *contents):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name != "train.jsonl":
            zipped.writestr("train.jsonl", jsonl(ROWS))
        for data in contents:
            zipped.writestr(name, data)
    return out.getvalue()


def tar(suffix=""):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{suffix}") as made:
        info = tarfile.TarInfo("train.jsonl")
        made.addfile(info)
    return out.getvalue()


WHOLE = zipped(ROWS, {"a.png": GOOD})
PLAIN = zipped(ROWS, {"a.png": GOOD}, zipfile.ZIP_STORED)
# Archives that no row can be had of, and how that is said.
UNUSABLE = {
    "no zip": (b"\x89PNG" * 50, "it isn't a zip: it begins with b'\\x89PNG"),
    "JSONL": (jsonl(ROWS), "it isn't a zip: it begins with"),
    "gzip": (gzip.compress(WHOLE), "it is a gzip archive"),
    "tar": (tar(), "it is a tar archive"),
    "tar.gz": (tar("gz"), "it is a gzip archive"),
    "tar.bz2": (bz2.compress(tar()), "it is a bzip2 archive"),
    "tar.xz": (lzma.compress(tar()), "it is a xz archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(50), "it is a 7z archive"),
    "RAR": (b"Rar!\x1a\x07\x01\0" + bytes(50), "it is a RAR archive"),
    "cut off": (WHOLE[:-10], "it is cut off: the directory at its end is missing"),
    "half": (WHOLE[: len(WHOLE) // 2], "it is cut off: the directory at its end is missing"),
    "without its beginning": (WHOLE[40:], "its train.jsonl is damaged: an offset before its beginning"),
    "a damaged directory": (WHOLE.replace(b"PK\1\2", b"PK\1\3"), "Bad magic number for central directory"),
    "no train.jsonl": (zipped(None, {"a.png": GOOD}), "it has no train.jsonl at its root. "),
    "nothing in it": (zipped(None), "it has no train.jsonl at its root. "),
    "in a folder": (
        zipped(None, {"ds/train.jsonl": jsonl(ROWS), "ds/a.png": GOOD}),
        "it has no train.jsonl at its root, but ds/train.jsonl: zip what is in ds and not the folder itself",
    ),
    "what a Mac leaves": (zipped(None, {"__MACOSX/train.jsonl": b""}), "it has no train.jsonl at its root. "),
    "another name": (zipped(None, {"data.jsonl": jsonl(ROWS)}), "it has no train.jsonl at its root, but data.jsonl: rename it"),
    "a folder of the name": (zipped(None, {"train.jsonl/": b""}), "it has no train.jsonl at its root"),
    "two of them": (twice("train.jsonl", jsonl(ROWS), jsonl(ROWS)), "it has train.jsonl more than once"),
    "a link": (zipped(None, {member("train.jsonl", mode=stat.S_IFLNK): b"/etc/passwd"}), "its train.jsonl is a symbolic link"),
    "encrypted": (patched(WHOLE, "train.jsonl", flags=1), "its train.jsonl is encrypted"),
    "bzip2": (
        zipped(ROWS, compression=zipfile.ZIP_BZIP2),
        "its train.jsonl is compressed by bzip2, which isn't read: use deflate",
    ),
    "LZMA": (zipped(ROWS, compression=zipfile.ZIP_LZMA), "its train.jsonl is compressed by LZMA"),
    "Deflate64": (patched(WHOLE, "train.jsonl", method=9), "its train.jsonl is compressed by Deflate64"),
    "zstd": (patched(WHOLE, "train.jsonl", method=93), "its train.jsonl is compressed by zstd"),
    "a method of nobody": (patched(WHOLE, "train.jsonl", method=77), "its train.jsonl is compressed by method 77"),
    "a wrong checksum": (PLAIN.replace(b"What is it?", b"What is IT?", 1), "its train.jsonl is damaged: Bad CRC-32"),
    "damaged deflate": (patched(WHOLE, "train.jsonl", unpacked=b"\xff" * 9), "its train.jsonl is damaged: "),
    "a size that is too large": (patched(WHOLE, "train.jsonl", size=5000), "its train.jsonl is damaged: "),
    "a size that is too small": (patched(WHOLE, "train.jsonl", size=50), "its train.jsonl is damaged: "),
    "a bomb": (zipped([b" " * (65 << 20)]), "its train.jsonl unpacks to 68,157,440 bytes from "),
    "a name that isn't UTF-8": (patched(WHOLE, "a.png", flags=0x800, raw=b"\xff.png"), "'utf-8' codec can't decode byte 0xff"),
}


@pytest.fixture
def opened(tmp_path):
    def open_archive(data):
        (tmp_path / "it.zip").write_bytes(data)
        return Archive(LOCAL, str(tmp_path / "it.zip"))

    return open_archive


@pytest.fixture
def outcome(local_job, tmp_path):
    """Prepare a zip's rows: how many are kept, [(line, reason)] of the others."""

    def prepare(data, chat=None):
        (tmp_path / "it.zip").write_bytes(data)
        changes = {"dataset_details.dataset_path": str(tmp_path / "it.zip"), "dataset_config.preprocessing.max_reject_ratio": 1.0}
        spec = JobSpec.model_validate(local_job(FIELDS | changes))
        prepared = prepare_local(spec, LOCAL, find_files(spec, LOCAL), LOCAL, str(tmp_path / "run"), chat or Chat())
        listed = [json.loads(line) for line in (tmp_path / "run/rejected.jsonl").read_text().splitlines()]
        return prepared.num_rows, [(r["line"], r["reason"]) for r in listed]

    return prepare


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_archive_is_refused_with_the_reason(outcome, monkeypatch, kind):
    data, reason = UNUSABLE[kind]
    for size in (1 << 20, 200):
        monkeypatch.setattr(parts, "ZIPPED_RANGE_BYTES", size)
        with pytest.raises(DatasetError) as refused:
            outcome(data)
        assert refused.value.code == "wrong_dataset_type"
        assert f"it.zip can't be read as a zip of images with train.jsonl at its root: {reason}" in refused.value.message


def test_an_archive_without_a_row_is_empty(outcome):
    for data in (zipped([]), zipped([b"\n \n"])):
        with pytest.raises(DatasetError) as refused:
            outcome(data)
        assert refused.value.code == "dataset_empty"


# An image that a row names: what the archive has besides train.jsonl, and why the row is rejected; None: it isn't.
NAMED = {
    "there": ("a.png", {"a.png": GOOD}, None),
    "in a folder": ("x/y/a.png", {"x/y/a.png": GOOD}, None),
    "from here": ("./x//a.png", {"x/a.png": GOOD}, None),
    "from Windows": ("x\\a.png", {"x/a.png": GOOD}, None),
    "packed on Windows": ("x/a.png", {"x\\a.png": GOOD}, None),
    "accents of a Mac": (unicodedata.normalize("NFC", "é.png"), {unicodedata.normalize("NFD", "é.png"): GOOD}, None),
    "another alphabet": ("图/画.png", {"图/画.png": GOOD}, None),
    "missing": ("b.png", {"a.png": GOOD}, "isn't in the archive"),
    "of another case": ("A.png", {"a.png": GOOD}, "isn't in the archive"),
    "a folder": ("x", {"x/": b""}, "isn't in the archive"),
    "a folder by its slash": ("x/", {"x/": b""}, "isn't in the archive"),
    "out of it": ("../a.png", {"../a.png": GOOD}, "leads out of a folder by .."),
    "out and back": ("x/../a.png", {"a.png": GOOD}, "leads out of a folder by .."),
    "out on Windows": ("..\\a.png", {"a.png": GOOD}, "leads out of a folder by .."),
    "absolute": ("/etc/hostname", {"/etc/hostname": GOOD}, "is an absolute path"),
    "absolute on Windows": ("C:\\a.png", {"C:\\a.png": GOOD}, "is an absolute path"),
    "a file URI": ("file:///etc/hostname", {}, "isn't fetched by file://: put images into the zip"),
    "the web": ("https://example.com/a.png", {}, "isn't fetched by https://: put images into the zip"),
    "a bucket of a dataset that is in none": ("s3://bucket/a.png", {}, "isn't fetched by s3://"),
    "a link": ("a.png", {member("a.png", mode=stat.S_IFLNK | 0o777): b"/etc/hostname"}, "is a symbolic link"),
    "the rows themselves": ("train.jsonl", {}, "is no JPEG, PNG"),
    "no image": ("a.png", {"a.png": b"<html>"}, "is no JPEG, PNG"),
    "empty": ("a.png", {"a.png": b""}, "is empty"),
    "cut off": ("a.png", {"a.png": GOOD[: len(GOOD) // 2]}, "can't be decoded: "),
    "a bomb": ("a.bmp", {"a.bmp": b"BM" + bytes(17 << 20)}, "unpacks to 17,825,794 bytes from "),
    "a plain drawing": ("a.bmp", {"a.bmp": saved(Image.new("RGB", (900, 900)), "BMP")}, None),
    "bzip2": ("a.png", {member("a.png", method=zipfile.ZIP_BZIP2): GOOD}, "is compressed by bzip2"),
    "LZMA": ("a.png", {member("a.png", method=zipfile.ZIP_LZMA): GOOD}, "is compressed by LZMA"),
    "stored": ("a.png", {member("a.png", method=zipfile.ZIP_STORED): GOOD}, None),
    "what the processor refuses": ("a.png", {"a.png": picture(0, (66, 2))}, "a picture that the processor refuses"),
}


@pytest.mark.parametrize("kind", NAMED)
def test_an_image_is_had_or_its_row_rejected_with_number_and_reason(outcome, kind):
    name, members, reason = NAMED[kind]
    kept, rejected = outcome(zipped([row(), row(name), row()], members))
    if reason is None:
        assert (kept, rejected) == (3, [])
    else:
        assert (kept, [line for line, _ in rejected]) == (2, [2])
        said = rejected[0][1]
        assert said == reason if "processor" in reason else said.startswith(f"image {name} {reason}"), said


DAMAGED = {
    "encrypted": ({"flags": 1}, "is encrypted"),
    "Deflate64": ({"method": 9}, "is compressed by Deflate64"),
    "AES": ({"method": 99}, "is compressed by AES encryption"),
    "another size": ({"size": 5000}, "is damaged in the archive: "),
    "too small a size": ({"size": 20}, "is damaged in the archive: Bad CRC-32"),
    "too large a size": ({"size": 65 << 20}, "unpacks to"),
    "damaged bytes": ({"unpacked": b"\xff" * 9}, "is damaged in the archive: "),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_member_costs_the_rows_that_name_it(outcome, kind):
    change, reason = DAMAGED[kind]
    data = patched(zipped([row("a.png"), row("b.png"), row("a.png")], {"a.png": GOOD, "b.png": GOOD}), "b.png", **change)
    kept, rejected = outcome(data)
    assert (kept, [line for line, _ in rejected]) == (2, [2])
    assert rejected[0][1].startswith(f"image b.png {reason}")


def test_two_members_of_one_name_are_none(outcome):
    data = twice("a.png", GOOD, picture(1))
    with pytest.raises(DatasetError, match=r"no usable row .* line 1: image a\.png is in the archive more than once"):
        outcome(data)


def test_names_in_utf8_that_do_not_say_so_are_found(outcome):
    name = "é.png"
    data = zipped([row(name), row("b.png")], {"ab.png": GOOD, "b.png": GOOD})
    kept, rejected = outcome(patched(data, "ab.png", raw=name.encode()))
    assert (kept, rejected) == (2, [])
    old = patched(data, "ab.png", raw=b"\x82b.png")  # é as DOS had it
    kept, rejected = outcome(old)
    assert [line for line, _ in rejected] == [1]
    assert outcome(patched(zipped([row("éb.png")], {"ab.png": GOOD}), "ab.png", raw=b"\x82b.png")) == (1, [])


def test_members_that_no_row_names_are_not_looked_at(outcome):
    members = {"../out.png": b"x", "/abs": b"", member("link", mode=stat.S_IFLNK): b"/", "b.png": b"no image", "x/": b""}
    assert outcome(zipped(ROWS, {"a.png": GOOD} | members)) == (3, [])


def test_an_archive_after_other_data_is_one(outcome):
    assert outcome(b"#!/bin/sh\n" * 20 + WHOLE) == (3, [])
    assert outcome(PLAIN) == (3, [])


def test_an_archive_that_was_written_as_a_stream_is_read(outcome):
    class Pipe(io.BytesIO):
        def seekable(self):
            return False

        def tell(self):
            raise OSError

    out = Pipe()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as streamed:
        streamed.writestr("train.jsonl", jsonl(ROWS))
        streamed.writestr("a.png", GOOD)
    assert out.getvalue()[6] & 8, "sizes follow the data"
    assert outcome(out.getvalue()) == (3, [])


def test_zip64_is_read(outcome, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    data = zipped(ROWS, {"a.png": GOOD})
    assert b"PK\6\6" in data
    assert outcome(data) == (3, [])


def test_a_large_directory_is_refused_before_it_is_read(outcome, monkeypatch):
    monkeypatch.setattr(archive, "MAX_DIRECTORY_BYTES", 5000)
    data = zipped(ROWS, {f"{i}.png": b"" for i in range(100)})
    with pytest.raises(DatasetError, match="its directory is larger than 0 MiB: make several archives of it"):
        outcome(data)


def test_a_member_that_is_too_large_is_not_unpacked(outcome, monkeypatch):
    monkeypatch.setattr(archive, "MAX_BYTES", 1000)
    large = picture(0, (64, 64))
    kept, rejected = outcome(zipped([row(), row("a.png")], {"a.png": large}))
    assert (kept, rejected) == (1, [(2, "image a.png is larger than 0 MiB")])


@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=4))
def test_any_damage_is_told_as_what_it_is(tmp_path_factory, at, data):
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    path.write_bytes(WHOLE[:at] + data + WHOLE[at + len(data) :])
    try:
        with Archive(LOCAL, str(path)) as found:
            assert len(b"".join(found.row_chunks())) == found.rows_bytes
            found.read("a.png")
    except (WrongType, RowRejected):
        pass  # any other exception fails the test


@given(st.lists(st.text(max_size=30), min_size=1, max_size=20), st.integers(1, 300), st.sampled_from([0, 8]))
def test_every_line_is_in_one_part_whatever_the_ranges(tmp_path_factory, texts, size, method):
    path = tmp_path_factory.getbasetemp() / "lines.zip"
    text = "\n".join(t.replace("\n", " ").replace("\r", " ") for t in texts).encode()
    path.write_bytes(zipped([text], compression=method))
    with pytest.MonkeyPatch.context() as patch, Archive(LOCAL, str(path)) as found:
        patch.setattr(lines, "CHUNK_BYTES", 7)
        whole = [line.data for line in parts.split_lines(found.row_chunks())]
        ranges = [(at, min(at + size, len(text))) for at in range(0, max(1, len(text)), size)]
        cut = [line for a, b in ranges for line in parts.split_lines(found.row_chunks(max(0, a - 1)), a, b)]
    assert [line.data for line in cut] == whole


PEAK = """
import json, sys
from pathlib import Path
from pyarrow.fs import LocalFileSystem
from tests.train_loop.zips import Chat
from train_loop.data.prepare import prepare_local
from train_loop.data.sources import find_files
from train_loop.spec import JobSpec

def peak():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10

spec, local = JobSpec.model_validate_json(sys.argv[1]), LocalFileSystem()
before = peak()
prepared = prepare_local(spec, local, find_files(spec, local), local, sys.argv[2], Chat())
print(json.dumps([prepared.num_rows, prepared.num_rejected, peak() - before]))
"""


def test_images_of_any_number_and_bombs_take_a_bounded_memory(local_job, tmp_path):
    """180 MB of images, which are one block's, and a member that unpacks to 63 MB."""
    noise = picture(0, (1000, 1000), "BMP")
    members = {member(f"{i}.bmp", method=zipfile.ZIP_STORED): noise[:-4] + i.to_bytes(4, "big") for i in range(60)}
    rows = [row(f"{i}.bmp") for i in range(60)] + [row("bomb.bmp")]
    (tmp_path / "it.zip").write_bytes(zipped(rows, members | {"bomb.bmp": b"BM" + bytes(63 << 20)}))
    changes = {"dataset_details.dataset_path": str(tmp_path / "it.zip"), "dataset_config.preprocessing.max_reject_ratio": 0.5}
    spec = JobSpec.model_validate(local_job(FIELDS | changes))
    command = [sys.executable, "-c", PEAK, spec.model_dump_json(), str(tmp_path / "run")]
    kept, rejected, peak = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert (kept, rejected) == (60, 1)
    assert peak < 110 << 20
    assert (tmp_path / "run/data/images-00000-00000.arrow").stat().st_size > 180_000_000


def test_a_row_shows_what_it_names(tmp_path, outcome):
    outcome(zipped([row("a.png"), row(), row("b.png", "a.png")], {"a.png": GOOD, "b.png": picture(1)}))
    shards = ShardSet(PreparedDataset.from_json((tmp_path / "run/data/index.json").read_text()), tmp_path / "run/data")
    assert [[p.data for p in shards.pictures(i)] for i in range(3)] == [[GOOD], [], [picture(1), GOOD]]
