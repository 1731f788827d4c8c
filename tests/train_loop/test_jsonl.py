from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from train_loop.data import jsonl
from train_loop.data.jsonl import plan_ranges, read_lines
from train_loop.data.sources import SourceFile


def lines_of(path, target_bytes):
    file = SourceFile(str(path), str(path), path.stat().st_size, "")
    found = [line for part in plan_ranges([file], target_bytes) for line in read_lines(LocalFileSystem(), part)]
    return [(line.offset, line.data) for line in found]


@given(lines=st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")), min_size=1, max_size=12),
       end=st.sampled_from([b"\n", b"\r\n"]), last=st.booleans(), target=st.integers(1, 40))  # fmt: skip
def test_any_ranges_give_each_line_exactly_once(tmp_path_factory, lines, end, last, target):
    data = end.join(lines) + (end if last else b"")
    if not data:
        return
    path = tmp_path_factory.mktemp("jsonl") / "f"
    path.write_bytes(data)
    whole = data.split(b"\n")[: -1 if data.endswith(b"\n") else None]
    expected = [line.removesuffix(b"\r") for line in whole]
    expected[0] = expected[0].removeprefix(jsonl.BOM)
    found = lines_of(path, target)
    assert [line for _, line in found] == expected
    assert [offset for offset, _ in found] == [sum(len(w) + 1 for w in whole[:i]) for i in range(len(whole))]


def test_lines_longer_than_a_chunk_and_too_long_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 4)
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 20)
    path = tmp_path / "f"
    path.write_bytes(b"0123456789\n" + b"x" * 100 + b"\nend")
    assert [line for _, line in lines_of(path, 7)] == [b"0123456789", None, b"end"]
