"""From files of every type to rows: each row once, where it is, whatever the parts and chunks."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from tests.conftest import rows
from train_loop.data import compressed, lines, parts
from train_loop.data.json_array import split_array
from train_loop.data.jsonl import split_lines
from train_loop.data.prepare import decode_row
from train_loop.data.sources import SourceFile, find_files
from train_loop.errors import DatasetError
from train_loop.spec import JobSpec

LOCAL = LocalFileSystem()


def lines_of(path, dataset_type="jsonl"):
    file = SourceFile(str(path), str(path), path.stat().st_size, "")
    return [line for part in parts.plan_parts(LOCAL, [file], dataset_type) for line in parts.read_part(LOCAL, part)]


@given(made=st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")), min_size=1, max_size=12),
       end=st.sampled_from([b"\n", b"\r\n"]), last=st.booleans(), target=st.integers(1, 40))  # fmt: skip
def test_any_ranges_give_each_line_exactly_once(made, end, last, target):
    data = end.join(made) + (end if last else b"")
    whole = data.split(b"\n")[: -1 if data.endswith(b"\n") else None] if data else []
    expected = [line.removesuffix(b"\r") for line in whole]
    if expected:
        expected[0] = expected[0].removeprefix(lines.BOM)
    ranges = [(start, min(start + target, len(data))) for start in range(0, len(data), target)]
    found = [line for start, end in ranges for line in split_lines([data[max(0, start - 1) :]], start, end)]
    assert [line.data for line in found] == expected
    assert [line.offset for line in found] == [sum(len(w) + 1 for w in whole[:i]) for i in range(len(whole))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(['"', "\\", '\\"', "[", "},{", "]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(values=st.lists(JSON, max_size=5), indent=st.sampled_from([None, 1]), ascii=st.booleans(), size=st.integers(1, 9))
def test_an_array_is_its_elements_whatever_the_chunks(values, indent, ascii, size):
    data = json.dumps(values, indent=indent, ensure_ascii=ascii).encode()
    found = list(split_array(data[i : i + size] for i in range(0, len(data), size)))
    assert [json.loads(line.data) for line in found] == values
    assert all(line.fault is None and data[line.offset :].startswith(line.data) for line in found)


@given(cut=st.integers(1, 400), size=st.integers(1, 50))
def test_a_truncated_array_keeps_what_is_whole_and_its_tail_is_one_fault(cut, size):
    values = [{"a": [i, {"b": "]},"}], "c": "x" * i} for i in range(12)]
    data = json.dumps(values).encode()[:cut]
    *found, tail = split_array(data[i : i + size] for i in range(0, len(data), size))
    ends = [i + 1 for i, value in enumerate(values) if len(json.dumps(values[: i + 1])) - 1 <= cut]
    assert [json.loads(line.data) for line in found] == values[: len(ends)]
    assert tail.fault == "the file ends within the array"


def test_lines_and_elements_longer_than_a_chunk_and_too_long_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "CHUNK_BYTES", 4)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 20)
    monkeypatch.setattr(parts, "RANGE_BYTES", 7)
    path = tmp_path / "f"
    path.write_bytes(b"0123456789\n" + b"x" * 100 + b"\nend")
    assert [(line.data, bool(line.fault)) for line in lines_of(path)] == [(b"0123456789", False), (b"", True), (b"end", False)]
    path.write_bytes(b'["0123456789", "' + b"x" * 100 + b'", "end"]')
    found = lines_of(path, "json")
    assert [(line.data, bool(line.fault)) for line in found] == [(b'"0123456789"', False), (b"", True), (b'"end"', False)]
    assert [line.offset for line in found][2] == 119


@pytest.mark.parametrize("dataset_type", ["jsonl", "json"])
def test_the_longest_row_is_as_long_whatever_the_chunks(tmp_path, monkeypatch, dataset_type):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 20)
    path = tmp_path / "f"
    path.write_bytes({"jsonl": b"%s\n%s\n", "json": b"[%s,%s]"}[dataset_type] % (b"1" * 20, b"2" * 21))
    for size in range(1, 50):
        monkeypatch.setattr(lines, "CHUNK_BYTES", size)
        monkeypatch.setattr(parts, "RANGE_BYTES", size)
        assert [bool(line.fault) for line in lines_of(path, dataset_type)] == [False, True]


def noise(size):
    return random.Random(1).randbytes(size)


def two_members(data):
    return gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]) + b"\0" * 100


PACKED = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    "2.gz": two_members,
    "2.zst": lambda data: zstandard.compress(data[:10]) + zstandard.compress(data[10:]),
    "stream.zst": lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("data", [b"", b"one\ntwo\n", b"a line of text\n" * 300_000, noise(3_000_000)], ids=len)
def test_compressed_bytes_come_back_in_small_pieces(tmp_path, name, data):
    path = tmp_path / f"f{name}"
    path.write_bytes(PACKED[name](data))
    found = list(compressed.read_chunks(LOCAL, str(path)))
    assert b"".join(found) == data
    assert not name.endswith(".gz") or max(map(len, found), default=0) <= 1 << 20


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("dataset_type", ["jsonl", "json"])
def test_a_truncated_file_gives_its_whole_rows_and_one_fault(tmp_path, suffix, dataset_type):
    made = rows(3000)
    text = "".join(json.dumps(r) + "\n" for r in made) if dataset_type == "jsonl" else json.dumps(made)
    whole = PACKED[suffix](text.encode())
    path = tmp_path / f"f{suffix}"
    path.write_bytes(whole[: len(whole) * 9 // 10])
    *found, tail = lines_of(path, dataset_type)
    assert [decode_row(line) for line in found] == made[: len(found)]
    assert len(found) > 1000
    assert tail.fault == f"the file ends within its {'gzip' if suffix == '.gz' else 'zstd'} data"


def write_parquet(path, made, **options):
    pq.write_table(pa.Table.from_pylist(made), path, **options)
    return path


def test_parquet_rows_are_python_objects_and_row_groups_are_read_apart(tmp_path):
    made = [{"messages": r.get("conversations"), "nested": {"a": [i], "b": None}, "at": i} for i, r in enumerate(rows(25))]
    path = write_parquet(tmp_path / "f", made, row_group_size=10)
    file = SourceFile(str(path), str(path), path.stat().st_size, "")
    assert [(p.start, p.end) for p in parts.plan_parts(LOCAL, [file], "parquet")] == [(0, 10), (10, 20), (20, 25)]
    found = lines_of(path, "parquet")
    assert [decode_row(line) for line in found] == made
    assert [line.offset for line in found] == list(range(25))


@pytest.mark.parametrize(
    ("mebibytes", "number", "longest"),
    [(0, 0, 0), (1, 1, 1), (16, 1, 16), (17, 2, 8.5), (512, 32, 16), (1024, 32, 32), (50 << 10, 400, 128)],
)
def test_ranges_are_alike_and_longer_where_there_are_many(mebibytes, number, longest):
    size = mebibytes << 20
    file = SourceFile("rows.jsonl", "rows.jsonl", size, "")
    ranges = [(part.start, part.end) for part in parts.plan_parts(LOCAL, [file], "jsonl")]
    assert len(ranges) == number
    assert [0, *(end for _, end in ranges)] == [*(start for start, _ in ranges), size]
    lengths = [end - start for start, end in ranges]
    assert max(lengths, default=0) == longest * 2**20
    assert max(lengths, default=0) - min(lengths, default=0) < max(1, number)


@pytest.mark.parametrize("damage", ["head", "middle", "tail"])
def test_damaged_parquet_is_told_from_storage_that_is_away(tmp_path, damage):
    path = write_parquet(tmp_path / "f", [{"text": "abc" * i} for i in range(100)])
    data = bytearray(path.read_bytes())
    at = {"head": 4, "middle": len(data) // 4, "tail": len(data) - 40}[damage]
    data[at : at + 30] = b"\xff" * 30
    path.write_bytes(data)
    with pytest.raises(DatasetError) as caught:
        lines_of(path, "parquet")
    assert caught.value.code == "wrong_dataset_type"


def found_in(folder, **details):
    job = {
        "org": "0bf00b43-430a-4ca3-a8b3-b13cc8dc6d4f",
        "experiment_name": "x",
        "model_details": {"base_model": "a/b"},
        "dataset_details": {"dataset_path": str(folder), "source_type": "local", "ownership": "public"} | details,
        "infra_config": {"gpu_type": "cpu"},
    }
    return [f.name for f in find_files(JobSpec.model_validate(job), LOCAL)]


def test_a_prefix_is_its_files_of_the_type_in_name_order(tmp_path):
    for name in ["b.jsonl", "a/2.jsonl.gz", "a/10.jsonl", "c.jsonl.zst", "notes.md", ".hidden.jsonl", "_tmp/x.jsonl", "d.json"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty.jsonl").touch()
    assert found_in(tmp_path) == ["a/10.jsonl", "a/2.jsonl.gz", "b.jsonl", "c.jsonl.zst"]
    assert found_in(tmp_path, dataset_type="json") == ["d.json"]
    with pytest.raises(DatasetError, match=r"holds no file that ends in \.parquet"):
        found_in(tmp_path, dataset_type="parquet")
    with pytest.raises(DatasetError, match="is empty"):
        found_in(tmp_path / "empty.jsonl")
