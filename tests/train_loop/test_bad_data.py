"""A hundred and more ways in which a file is wrong. Each has one outcome, whatever parts and chunks it is read in."""

import codecs
import gzip
import io
import json
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from tests.conftest import TINY
from train_loop.data import lines, parts, prepare
from train_loop.data.prepare import MAX_LISTED, BlockSummary, Reject, prepare_local, with_first_rejects
from train_loop.data.sources import find_files
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import DatasetError
from train_loop.spec import JobSpec

LOCAL = LocalFileSystem()
ROW = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
GOOD = json.dumps(ROW).encode()
DEEP = 100_000
HTML = b"<!DOCTYPE html>\n<html><body>\n<h1>403 Forbidden</h1>\n</body></html>\n"
BINARY = bytes(range(256))
NOISE = random.Random(0).randbytes(3000)
NO_OBJECT = "a row must be a JSON object"
NO_ANSWER = "no assistant turn that answers a user"
TOO_LONG = "the row is longer than 0 MiB"  # of a limit that the tests lower


def turns(*pairs, **more):
    return json.dumps({"conversations": [{"from": a, "value": b} for a, b in pairs], **more}).encode()


def answer(text):
    """A row whose answer is `text`, which is JSON already."""
    return b'{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": %s}]}' % text


# A line between two good ones: how the reason begins for which it is rejected; None: it is kept; "": it counts for nothing.
LINES = {
    "empty": (b"", ""),
    "blanks": (b" \t ", ""),
    "carriage return": (b"\r", ""),
    "many empty": (b"\n" * 500, ""),
    "null": (b"null", NO_OBJECT),
    "true": (b"true", NO_OBJECT),
    "number": (b"12", NO_OBJECT),
    "string": (b'"Hi"', NO_OBJECT),
    "list": (b"[" + GOOD + b"]", NO_OBJECT),
    "empty list": (b"[]", NO_OBJECT),
    "empty object": (b"{}", 'no list "conversations"'),
    "null turns": (b'{"conversations": null}', 'no list "conversations"'),
    "no turns": (b'{"conversations": []}', NO_ANSWER),
    "turns as text": (b'{"conversations": "Hi"}', 'no list "conversations"'),
    "turns as an object": (b'{"conversations": {"from": "gpt", "value": "x"}}', 'no list "conversations"'),
    "a turn that is text": (b'{"conversations": ["Hi"]}', "a turn must be an object"),
    "a turn that is null": (b'{"conversations": [null]}', "a turn must be an object"),
    "an empty turn": (b'{"conversations": [{}]}', "a turn has neither"),
    "null value": (answer(b"null"), "value is not a string"),
    "number as value": (answer(b"5"), "value is not a string"),
    "list as value": (answer(b'["a"]'), "content parts other than text"),
    "NaN as value": (answer(b"NaN"), "value is not a string"),
    "value missing": (b'{"conversations": [{"from": "human"}, {"from": "gpt"}]}', "value is not a string"),
    "empty answer": (answer(b'""'), "empty assistant turn"),
    "blank answer": (answer(b'" \\n\\t"'), "empty assistant turn"),
    "unknown role": (turns(("robot", "Hi"), ("gpt", "x")), "unknown role"),
    "null role": (b'{"conversations": [{"from": null, "value": "x"}]}', 'a turn has neither "from" nor "role"'),
    "number as role": (b'{"conversations": [{"from": 1, "value": "x"}]}', "unknown role"),
    "only a question": (turns(("human", "Hi")), NO_ANSWER),
    "only an answer": (turns(("gpt", "Hi")), NO_ANSWER),
    "half a row": (GOOD[:30], "not JSON"),
    "half a string": (b'{"conversations": "', "not JSON: Unterminated string"),
    "two rows on a line": (GOOD + GOOD, "not JSON: Extra data"),
    "trailing comma": (GOOD + b",", "not JSON: Extra data"),
    "comma in an object": (b'{"a": 1,}', "not JSON"),
    "single quotes": (b"{'conversations': []}", "not JSON"),
    "no quotes": (b"{conversations: []}", "not JSON"),
    "Python's None": (b'{"conversations": None}', "not JSON"),
    "a comment": (b"// rows", "not JSON: Expecting value at column 1"),
    "CSV": (b"id,question,answer", "not JSON: Expecting value at column 1"),
    "YAML": (b"conversations:", "not JSON: Expecting value at column 1"),
    "HTML": (HTML.splitlines()[1], "not JSON: Expecting value at column 1"),
    "a control character in a string": (answer(b'"a\tb"'), "not JSON: Invalid control character"),
    "a null byte in a string": (answer(b'"a\0b"'), "not JSON: Invalid control character"),
    "null bytes": (b"\0" * 50, "not JSON"),
    "a bad escape": (answer(b'"\\x41"'), "not JSON: Invalid \\escape"),
    "half an escape": (answer(b'"\\u12"'), "not JSON: Invalid \\uXXXX escape"),
    "Latin-1": (answer('"é"'.encode("latin-1")), "not UTF-8"),
    "cut UTF-8": (answer('"é"'.encode()[:-2] + b'"'), "not UTF-8"),
    "overlong UTF-8": (answer(b'"\xc0\xaf"'), "not UTF-8"),
    "a surrogate in UTF-8": (answer(b'"\xed\xa0\x80"'), "not UTF-8"),
    "beyond Unicode": (answer(b'"\xf5\x80\x80\x80"'), "not UTF-8"),
    "Shift-JIS": (answer('"日本"'.encode("shift-jis")), "not UTF-8"),
    "UTF-16": (GOOD.decode().encode("utf-16-le"), "not JSON"),
    "UTF-16 with its mark": (GOOD.decode().encode("utf-16"), "not UTF-8"),
    "UTF-32": (GOOD.decode().encode("utf-32-le"), "not JSON"),
    "a byte order mark": (codecs.BOM_UTF8 + GOOD, "not JSON"),
    "gzip": (gzip.compress(b"x", mtime=0).replace(b"\n", b""), "not UTF-8"),
    "the first half of a pair": (answer(b'"\\ud83d"'), "a \\u escape is half of a character"),
    "the second half of a pair": (answer(b'"\\ude00"'), "a \\u escape is half of a character"),
    "a pair the wrong way round": (answer(b'"\\ude00\\ud83d"'), "a \\u escape is half of a character"),
    "half a pair in a key": (b'{"\\uD800": 1}', "a \\u escape is half of a character"),
    "half a pair elsewhere": (turns(("human", "a"), ("gpt", "b"), note="\ud800"), "a \\u escape is half of a character"),
    "nested lists": (b"[" * DEEP, "nested too deeply"),
    "nested lists, closed": (b"[" * DEEP + b"]" * DEEP, "nested too deeply"),
    "nested objects": (b'{"a":' * DEEP, "nested too deeply"),
    "nested in a field": (turns(("human", "a"), ("gpt", "b"))[:-1] + b', "x": ' + b"[" * DEEP + b"]" * DEEP + b"}", "nested too"),
    "a number of 5000 digits": (b'{"n": ' + b"9" * 5000 + b"}", "a number of more than 4300 digits"),
    "a number with leading zeros": (b'{"n": 007}', "not JSON"),
    "hexadecimal": (b'{"n": 0x10}', "not JSON"),
    "too long": (answer(b'"' + b"x" * 2_000_000 + b'"'), TOO_LONG),
    "too long and no JSON": (b"x" * 2_000_000, TOO_LONG),
    # What looks odd and is fine.
    "a pair as escapes": (answer(b'"\\ud83d\\ude00"'), None),
    "emoji": (answer('"😀 e\u0301 \u202e"'.encode()), None),
    "line separators": (answer('"a\u2028b\u0085"'.encode()), None),
    "an escaped null": (answer(b'"a\\u0000b"'), None),
    "blanks around": (b"  " + GOOD + b"  ", None),
    "carriage returns between": (GOOD.replace(b", ", b",\r"), None),
    "a key twice": (b'{"conversations": 5, "conversations": ' + GOOD.partition(b": ")[2], None),
    "a huge number elsewhere": (GOOD[:-1] + b', "n": 1e999}', None),
    "NaN elsewhere": (GOOD[:-1] + b', "n": NaN, "m": -Infinity}', None),
    "unknown fields": (GOOD[:-1] + b', "tools": null, "images": [], "x": {"y": []}}', None),
    "an answer first": (turns(("gpt", "Hi"), ("human", "Hi"), ("gpt", "x")), None),
    "a question last": (turns(("human", "Hi"), ("gpt", "x"), ("human", "?")), None),
}

ROWS = [GOOD] * 3
JSONL = b"\n".join(ROWS) + b"\n"


def table(**columns):
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, row_group_size=2)
    return out.getvalue()


def without_groups():
    """What a writer leaves that is closed before it was given a row: no group, where an empty table is one without rows."""
    out = io.BytesIO()
    pq.ParquetWriter(out, pa.schema([("conversations", pa.string())])).close()
    return out.getvalue()


def bad_text():
    """A text column whose second value isn't UTF-8, as writers that don't check leave it."""
    made = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    return table(conversations=[ROW["conversations"]] * 3, note=made)


# Whole files: name, bytes, and either how many rows are kept and (line, reason) of the others, or the code of the error.
FILES = {
    "no byte": ("f.jsonl", b"", "dataset_empty"),
    "only line ends": ("f.jsonl", b"\n\r\n\n", "dataset_empty"),
    "only a byte order mark": ("f.jsonl", codecs.BOM_UTF8, "dataset_empty"),
    "no final line end": ("f.jsonl", JSONL[:-1], (3, [])),
    "Windows line ends": ("f.jsonl", JSONL.replace(b"\n", b"\r\n"), (3, [])),
    "old Mac line ends": ("f.jsonl", JSONL.replace(b"\n", b"\r"), "no_usable_rows"),
    "a byte order mark first": ("f.jsonl", codecs.BOM_UTF8 + JSONL, (3, [])),
    "UTF-16 file": ("f.jsonl", JSONL.decode().encode("utf-16"), "no_usable_rows"),
    "an HTML page": ("f.jsonl", HTML, "no_usable_rows"),
    "every byte": ("f.jsonl", BINARY, "no_usable_rows"),
    "noise": ("f.jsonl", NOISE, "no_usable_rows"),
    "gzip named jsonl": ("f.jsonl", gzip.compress(JSONL), "no_usable_rows"),
    "Parquet named jsonl": ("f.jsonl", table(a=[1, 2]), "no_usable_rows"),
    "an array on one line": ("f.jsonl", json.dumps([ROW] * 3).encode(), "no_usable_rows"),
    "an array over lines": (
        "f.jsonl",
        b"[\n" + b",\n".join(ROWS) + b"\n]\n",
        (1, [(1, "not"), (2, "not"), (3, "not"), (5, "not")]),
    ),
    "one object over lines": ("f.jsonl", json.dumps(ROW, indent=1).encode(), "no_usable_rows"),
    "cut in a row": ("f.jsonl", JSONL[:-9], (2, [(3, "not JSON: ")])),
    "a line of a gigabyte, smaller": ("f.jsonl", JSONL + b"x" * 5_000_000 + b"\n" + JSONL, (6, [(4, TOO_LONG)])),
    "whole gzip": ("f.jsonl.gz", gzip.compress(JSONL), (3, [])),
    "gzip of nothing": ("f.jsonl.gz", gzip.compress(b""), "dataset_empty"),
    "plain text named gz": ("f.jsonl.gz", JSONL, "wrong_dataset_type"),
    "an HTML page named gz": ("f.jsonl.gz", HTML, "wrong_dataset_type"),
    "gzip cut in its header": ("f.jsonl.gz", gzip.compress(JSONL)[:6], "no_usable_rows"),
    "gzip without its checksum": ("f.jsonl.gz", gzip.compress(JSONL)[:-8], (3, [(4, "the file ends within its gzip data")])),
    "gzip with a wrong checksum": ("f.jsonl.gz", gzip.compress(JSONL)[:-8] + b"12345678", (3, [(4, "the gzip data is damaged")])),
    "gzip and then noise": ("f.jsonl.gz", gzip.compress(JSONL) + NOISE, (3, [(4, "the gzip data is damaged")])),
    "gzip and then zeros": ("f.jsonl.gz", gzip.compress(JSONL) + b"\0" * 512, (3, [])),
    "gzip of noise": ("f.jsonl.gz", gzip.compress(NOISE), "no_usable_rows"),
    "gzip twice": ("f.jsonl.gz", gzip.compress(gzip.compress(JSONL)), "no_usable_rows"),
    "a bad line in gzip": ("f.jsonl.gz", gzip.compress(JSONL + b"\n{\n" + JSONL), (6, [(5, "not JSON")])),
    "a gzip bomb": ("f.jsonl.gz", gzip.compress(JSONL + b"[" * 20_000_000), (3, [(4, TOO_LONG)])),
    "whole zstd": ("f.jsonl.zst", zstandard.compress(JSONL), (3, [])),
    "plain text named zst": ("f.jsonl.zst", JSONL, "wrong_dataset_type"),
    "gzip named zst": ("f.jsonl.zst", gzip.compress(JSONL), "wrong_dataset_type"),
    "cut zstd": ("f.jsonl.zst", zstandard.compress(JSONL) + zstandard.compress(JSONL)[:-5], (3, [(4, "the file ends within")])),
    "damaged zstd": ("f.jsonl.zst", zstandard.compress(JSONL) + NOISE, (3, [(4, "the zstd data is damaged")])),
    "a zstd bomb": ("f.jsonl.zst", zstandard.compress(JSONL + b"[" * 20_000_000), (3, [(4, TOO_LONG)])),
    "array": ("f.json", json.dumps([ROW] * 3).encode(), (3, [])),
    "indented array": ("f.json", codecs.BOM_UTF8 + json.dumps([ROW] * 3, indent=2).encode() + b"\r\n \n", (3, [])),
    "compressed array": ("f.json.gz", gzip.compress(json.dumps([ROW] * 3).encode()), (3, [])),
    "empty array": ("f.json", b"[]", "dataset_empty"),
    "blank array file": ("f.json", b" \n ", "dataset_empty"),
    "an object": ("f.json", GOOD, "wrong_dataset_type"),
    "an object around the array": ("f.json", b'{"data": [' + GOOD + b"]}", "wrong_dataset_type"),
    "lines named json": ("f.json", JSONL, "wrong_dataset_type"),
    "text for an array": ("f.json", b'"rows"', "wrong_dataset_type"),
    "an HTML page named json": ("f.json", HTML, "wrong_dataset_type"),
    "a UTF-16 array": ("f.json", json.dumps([ROW]).encode("utf-16"), "wrong_dataset_type"),
    "an array cut in a row": ("f.json", json.dumps([ROW] * 3).encode()[:-20], (2, [(3, "the file ends within the array")])),
    "an array cut in a string": ("f.json", b"[" + GOOD + b', {"a": "]}', (1, [(2, "the file ends within the array")])),
    "an array cut after a row": ("f.json", b"[" + GOOD, (1, [(2, "the file ends within the array")])),
    "an array cut after a comma": ("f.json", b"[" + GOOD + b", ", (1, [(2, "the file ends within the array")])),
    "an array closed by a brace": ("f.json", b"[" + GOOD + b"}", (1, [(2, "the array is closed by }")])),
    "a bad element": ("f.json", b"[" + GOOD + b", {broken}, " + GOOD + b"]", (2, [(2, "not JSON")])),
    "a null element": ("f.json", b"[" + GOOD + b", null]", (1, [(2, NO_OBJECT)])),
    "nothing between commas": ("f.json", b"[" + GOOD + b",, " + GOOD + b"]", (2, [(2, "nothing between two commas")])),
    "a trailing comma": ("f.json", b"[" + GOOD + b", ]", (1, [])),
    "two arrays": ("f.json", (b"[" + GOOD + b"]") * 2, (1, [(2, "more text after the end of the array")])),
    "a nested element": ("f.json", b"[" + b"[" * DEEP + b"]" * DEEP + b", " + GOOD + b"]", (1, [(1, "nested too deeply")])),
    "nesting without end": ("f.json", b"[" + GOOD + b", " + b"[" * DEEP, (1, [(2, "the file ends within the array")])),
    "brackets in strings": ("f.json", b"[" + answer(b'"]}{[,\\"]\\\\"') + b"," + GOOD + b"]", (2, [])),
    "a string without end": ("f.json", b"[" + GOOD + b', "' + b"x, " * 1_000_000, (1, [(2, "the file ends within the array")])),
    "a long element": ("f.json", b"[" + GOOD + b', "' + b"x" * 3_000_000 + b'", ' + GOOD + b"]", (2, [(2, TOO_LONG)])),
    "a cut compressed array": (
        "f.json.gz",
        gzip.compress(json.dumps([ROW] * 3).encode())[:-8],
        (3, [(4, "the file ends within its")]),
    ),
    "Parquet": ("f.parquet", table(conversations=[ROW["conversations"]] * 3), (3, [])),
    "Parquet without rows": ("f.parquet", table(conversations=[]), "dataset_empty"),
    "Parquet without row groups": ("f.parquet", without_groups(), "dataset_empty"),
    "Parquet with a null row": (
        "f.parquet",
        table(conversations=[ROW["conversations"], None, ROW["conversations"]]),
        (2, [(2, 'no list "conversations"')]),
    ),
    "Parquet of other columns": ("f.parquet", table(text=["a", "b"]), "no_usable_rows"),
    "Parquet with bytes for text": (
        "f.parquet",
        table(conversations=[[{"from": b"human", "value": b"Hi"}, {"from": b"gpt", "value": b"x"}]]),
        "no_usable_rows",
    ),
    "Parquet with a time": (
        "f.parquet",
        table(conversations=[ROW["conversations"]], at=pa.array([0], "timestamp[ns]")),
        (1, []),
    ),
    "Parquet with bad text": ("f.parquet", bad_text(), (2, [(2, "not UTF-8")])),
    "jsonl named parquet": ("f.parquet", JSONL, "wrong_dataset_type"),
    "cut Parquet": ("f.parquet", table(text=["a"] * 100)[:-20], "wrong_dataset_type"),
    "noise named parquet": ("f.parquet", b"PAR1" + NOISE + b"PAR1", "wrong_dataset_type"),
}


def malformed_job(path, *, max_length=512, lazy=True, limit=1.0):
    """A job on the file, of the type that its name says."""
    job = {
        "org": "0bf00b43-430a-4ca3-a8b3-b13cc8dc6d4f",
        "experiment_name": "x",
        "model_details": {"base_model": "a/b"},
        "dataset_config": {
            "preprocessing": {"max_reject_ratio": limit, "lazy_tokenize": lazy, "prompt": {"max_length": max_length}},
            "split": {"type": "none"},
        },
        "dataset_details": {
            "dataset_path": str(path),
            "dataset_type": path.name.split(".")[1],
            "source_type": "local",
            "ownership": "public",
        },
        "infra_config": {"gpu_type": "cpu"},
    }
    return JobSpec.model_validate(job)


def outcome(folder, tokenizer, name, data, **options):
    """(rows kept, [(line, reason)] of the others), or the error's code."""
    (folder / name).write_bytes(data)
    spec = malformed_job(folder / name, **options)
    chat = ChatTokenizer.of(spec, tokenizer)
    try:
        prepared = prepare_local(spec, LOCAL, find_files(spec, LOCAL), LOCAL, str(folder / "run"), chat)
    except DatasetError as error:
        return error.code
    more = prepared.num_rejected - len(listed(folder / "run"))
    last = (folder / "run/rejected.jsonl").read_text().splitlines()[-1:]
    assert (json.loads(*last).get("more", 0) if last else 0) == more
    return prepared.num_rows, listed(folder / "run")


def listed(run):
    """(line, reason) of the rejected rows that a run lists."""
    found = [json.loads(line) for line in (run / "rejected.jsonl").read_bytes().split(b"\n")[:-1]]
    return [(r["line"], r["reason"]) for r in found if "line" in r]


def outcome_in_any_parts(folder, tokenizer, monkeypatch, name, data):
    """The outcome, which must be one."""
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1_000_000)
    sizes = [(16 << 20, 1 << 20), (len(data) // 3 + 1, len(data) // 7 + 1), (max(100, len(data) // 50), 64 + len(data) // 100)]
    found = []
    for part, chunk in sizes:
        monkeypatch.setattr(parts, "RANGE_BYTES", part)
        monkeypatch.setattr(lines, "CHUNK_BYTES", chunk)
        found.append(outcome(folder, tokenizer, name, data))
    assert found[1:] == found[:-1]
    return found[0]


def test_the_corpus_is_large_enough():
    lines_at_fault = [line for line, (_, reason) in LINES.items() if reason]
    files_at_fault = [file for file, (*_, found) in FILES.items() if isinstance(found, str) or found[1]]
    assert len(lines_at_fault) + len(files_at_fault) >= 125  # the others look odd and are fine


@pytest.mark.parametrize("line", LINES)
def test_a_bad_line_between_good_ones(tmp_path, tokenizer, monkeypatch, line):
    data, reason = LINES[line]
    kept, rejected = outcome_in_any_parts(tmp_path, tokenizer, monkeypatch, "f.jsonl", GOOD + b"\n" + data + b"\n" + GOOD)
    assert kept == 2 + (reason is None)
    assert [number for number, _ in rejected] == ([2] if reason else [])
    assert all(said.startswith(reason) for _, said in rejected), rejected


@pytest.mark.parametrize("file", FILES)
def test_a_bad_file(tmp_path, tokenizer, monkeypatch, file):
    name, data, expected = FILES[file]
    found = outcome_in_any_parts(tmp_path, tokenizer, monkeypatch, name, data)
    if isinstance(expected, str) or isinstance(found, str):
        assert found == expected
        return
    assert (found[0], [number for number, _ in found[1]]) == (expected[0], [number for number, _ in expected[1]])
    assert all(said.startswith(reason) for (_, said), (_, reason) in zip(found[1], expected[1], strict=True)), found


@pytest.mark.parametrize("lazy", [True, False])
def test_rows_without_a_token_to_learn_are_rejected_where_they_are(tmp_path, tokenizer, lazy):
    long = turns(("human", "why " * 100), ("gpt", "so"))
    data = b"\n".join([GOOD, long, GOOD, turns(("human", ""), ("gpt", "Yes"))])
    found = outcome(tmp_path, tokenizer, "f.jsonl", data, max_length=32, lazy=lazy)
    assert found == (3, [(2, "no supervised token left after truncation to 32 tokens")])


def test_a_file_that_is_all_wrong_is_counted_in_full_and_listed_in_part(tmp_path, tokenizer):
    kept, shown = outcome(tmp_path, tokenizer, "f.jsonl", b"{}\n" * 30_000 + JSONL)
    assert kept == 3
    assert [number for number, _ in shown] == [*range(1, MAX_LISTED + 1), *range(20_001, 20_001 + MAX_LISTED)]


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=8).flatmap(lambda n: st.permutations(list(enumerate(n)))),
    st.integers(1, 20),
)
def test_the_first_rejected_rows_are_listed_however_their_blocks_come(blocks, limit):
    def summary(part, count):
        rejects = [Reject(line, f"part {part}", "") for line in range(1, count + 1)]
        return BlockSummary(part, 0, 0, count, 0, count, np.empty(0), np.empty(0), rejects, b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "MAX_LISTED_IN_ALL", limit)
        found = with_first_rejects(summary(*block) for block in blocks)
    everything = [(part, line) for part, count in sorted(blocks) for line in range(1, count + 1)]
    held = [(s.part, r.line) for s in found for r in s.rejects]
    assert held == everything[:limit]
    assert [s.part for s in found] == sorted(part for part, _ in blocks)


def test_what_is_not_listed_is_counted_on_the_last_line(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_LISTED_IN_ALL", 1_500)
    kept, shown = outcome(tmp_path, tokenizer, "f.jsonl", b"{}\n" * 30_000 + JSONL)
    assert (kept, len(shown)) == (3, 1_500)
    assert json.loads((tmp_path / "run/rejected.jsonl").read_text().splitlines()[-1]) == {"more": 28_500}


def many(count):
    """Rows of different lengths that gzip can't shorten much."""
    drawn = random.Random(1)
    return [turns(("human", "Hi"), ("gpt", drawn.randbytes(drawn.randrange(20, 200)).hex())) for _ in range(count)]


def lost_half(name):
    """A file of 1,000 rows whose second half can't be read, and the reason."""
    made = many(1000)
    half = b"[" + b", ".join(made[:500])
    if name == "an open string":
        return (
            "f.json",
            half + b', {"x": "' + b", ".join(m.replace(b'"', b"'") for m in made[500:]) + b"]",
            "the file ends within",
        )
    if name == "two arrays":
        return "f.json", half + b"]\n[" + b", ".join(made[500:]) + b"]", "more text after the end"
    if name == "a brace":
        return "f.json", half + b"}, " + b", ".join(made[500:]) + b"]", "the array is closed by }"
    text = b"[" + b", ".join(made) + b"]" if "array" in name else b"\n".join(made)
    suffix = "json" if "array" in name else "jsonl"
    if "zstd" in name:
        data = b"".join(zstandard.compress(text[i : i + 4000]) for i in range(0, len(text), 4000))
        return f"f.{suffix}.zst", data[: len(data) // 2] + b"\0" * (len(data) // 2), "the zstd data is damaged"
    data = gzip.compress(text, mtime=0)
    return f"f.{suffix}.gz", data[: len(data) // 2] + b"\xff" * (len(data) // 2), "the "  # read as noise, or damaged


@pytest.mark.parametrize("name", ["an open string", "two arrays", "a brace", "gzip", "zstd", "a gzip array"])
def test_half_a_file_is_not_lost_for_one_row(tmp_path, tokenizer, name):
    file, data, reason = lost_half(name)
    for limit, passes in ((0.01, False), (0.4, False), (0.6, True)):
        found = outcome(tmp_path, tokenizer, file, data, limit=limit)
        assert (found != "too_many_rejects") is passes
    assert 400 < found[0] < 600
    assert [said.startswith(reason) for _, said in found[1]] == [True]


@pytest.mark.parametrize("suffix", [b"", b", " + GOOD[:40]])
def test_a_file_that_is_cut_off_at_its_end_has_lost_a_row(tmp_path, tokenizer, suffix):
    kept, rejected = outcome(tmp_path, tokenizer, "f.json", b"[" + b", ".join(many(1000)) + suffix, limit=0.01)
    assert (kept, [line for line, _ in rejected]) == (1000, [1001])


PEAK = """
import json, sys
from pathlib import Path
from pyarrow.fs import LocalFileSystem
from train_loop.data.prepare import prepare_local
from train_loop.data.sources import find_files
from train_loop.data.tokenize import ChatTokenizer
from train_loop.model.tokenizer import load_tokenizer
from train_loop.spec import JobSpec

def peak():  # getrusage's would be the parent's, where that one is larger
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10

spec, local = JobSpec.model_validate_json(sys.argv[1]), LocalFileSystem()
chat = ChatTokenizer.of(spec, load_tokenizer(Path(sys.argv[2])))
before = peak()
prepared = prepare_local(spec, local, find_files(spec, local), local, sys.argv[3], chat)
print(json.dumps([prepared.num_rows, prepared.num_rejected, peak() - before]))
"""
GIB = 1 << 30


def gigabyte_line(path):
    with path.open("wb") as file:
        file.write(JSONL)
        file.truncate(len(JSONL) + GIB + 1)  # zeros, which take no disk
        file.seek(0, 2)
        file.write(b"\n" + JSONL)


def gigabyte_element(path):
    with path.open("wb") as file:
        begins = file.write(b"[" + b",".join([GOOD] * 3) + b', "')
        file.truncate(begins + GIB)
        file.seek(0, 2)
        file.write(b'", ' + b",".join([GOOD] * 3) + b"]")


def bomb(path):
    with gzip.open(path, "wb", 1) as file:
        file.write(JSONL)
        for _ in range(64):
            file.write(bytes(GIB >> 6))
        file.write(b"\n" + JSONL)


def many_values(path):
    path.write_bytes(JSONL + b"[" + b"[]," * ((lines.MAX_LINE_BYTES - 100) // 3) + b"[]]\n" + JSONL)


HUGE = {
    "a line": ("f.jsonl", gigabyte_line, "the row is longer than 64 MiB"),
    "an element": ("f.json", gigabyte_element, "the row is longer than 64 MiB"),
    "a bomb": ("f.jsonl.gz", bomb, "the row is longer than 64 MiB"),
    "many values": ("f.jsonl", many_values, "more than 4,000,000 values"),
}


@pytest.mark.parametrize("what", HUGE)
def test_a_huge_row_is_rejected_in_bounded_memory(what, tmp_path, mirror):
    name, write, reason = HUGE[what]
    write(tmp_path / name)
    arguments = [malformed_job(tmp_path / name).model_dump_json(), str(mirror / TINY), str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True, timeout=300)
    kept, rejected, grown_bytes = json.loads(done.stdout.splitlines()[-1])
    assert (kept, rejected) == (6, 1)
    assert listed(tmp_path / "run") == [(4, reason)]
    assert grown_bytes < 400 << 20
