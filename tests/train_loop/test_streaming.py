"""A streamed dataset: the same steps as any other, and no copy of its rows anywhere."""

import json
import re
import shutil
import threading

import psutil
import pytest
from pyarrow.fs import LocalFileSystem

from tests.conftest import TINY, rows, write_jsonl
from tests.train_loop.runs import STEPS, Watcher, adapter, curve, short
from train_loop.data.sources import Credentials, SourceFile
from train_loop.data.streaming import RowReader
from train_loop.errors import Cause, DatasetError, RunFault, Stopped
from train_loop.launch import launch_local
from train_loop.run_files import Keys, RunFiles
from train_loop.spec import JobSpec

HP = "train_config.hyperparameters"
PRE = "dataset_config.preprocessing"
ROWS = rows(40)
QUESTION = b"plus one?"


def answer(row):
    return row["conversations"][1]["value"] if "conversations" in row else row["conversation"][0]["assistant"]


def as_jsonl(folder):
    write_jsonl(folder / "rows.jsonl", ROWS)
    return "rows.jsonl"


def as_windows_wrote_it(folder):
    text = "".join(json.dumps(row) + "\r\n" for row in ROWS)
    (folder / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.removesuffix("\r\n").encode())
    return "rows.jsonl"


def as_array(folder):
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1))
    return "rows.json"


def as_files(folder):
    (folder / "part").mkdir()
    for i in range(0, len(ROWS), 10):
        write_jsonl(folder / f"part/{i:02d}.jsonl", ROWS[i : i + 10])
    return "part/"


@pytest.mark.parametrize("write", [as_jsonl, as_windows_wrote_it, as_array, as_files])
def test_a_streamed_run_takes_the_steps_of_any_other(local_job, tmp_path, launch, write):
    path = tmp_path / "dataset"
    path.mkdir()
    where = {"dataset_details.dataset_path": f"{path}/{write(path)}"}
    if write is as_array:
        where["dataset_details.dataset_type"] = "json"
    ways = {"lazy": {}, "eager": {f"{PRE}.lazy_tokenize": False}, "streamed": {f"{PRE}.streaming": True}}
    for name, changes in ways.items():
        launch(short(local_job, where | changes | {f"{HP}.dataloader_num_workers": 2}), name)
    assert curve(tmp_path / "lazy") == curve(tmp_path / "eager") == curve(tmp_path / "streamed")
    assert adapter(tmp_path / "lazy") == adapter(tmp_path / "eager") == adapter(tmp_path / "streamed")
    kept = {name: any(QUESTION in shard.read_bytes() for shard in (tmp_path / name).glob("data/*.arrow")) for name in ways}
    assert kept == {"lazy": True, "eager": False, "streamed": False}


def test_every_way_rejects_the_same_rows(local_job, tmp_path, launch):
    def said(*turns):
        return {"conversations": [{"from": role, "value": text} for role, text in turns]}

    long = said(("human", "Why?"), ("gpt", "so " * 200))
    bad = {
        "not JSON": "{broken",
        "no assistant turn that answers a user": said(("human", "Hi")),
        "each has weight 0": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
        "tokens, more than max_length 64": long,
        "the chat template refuses it: no shouting": said(("human", "HELP"), ("gpt", "Yes.")),
        "nothing to learn from": said(("human", "Hi"), ("gpt", "\x06")),  # of which this tokenizer makes no token
    }
    lines = [*map(json.dumps, ROWS)]
    for i, row in enumerate(bad.values()):
        lines.insert(3 + 5 * i, row if isinstance(row, str) else json.dumps(row))
    path = tmp_path / "rejects.jsonl"
    path.write_text("\n".join(lines))
    template = (
        "{% for m in messages %}{% if 'HELP' in m.content %}{{ raise_exception('no shouting') }}{% endif %}{{ m.role }}\n"
        "{% generation %}{{ m.content if m.role == 'assistant' }}{% endgeneration %}{{ m.content if m.role == 'user' }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    how = {"truncation": "reject", "prompt.max_length": 64, "prompt.template": template, "max_reject_ratio": 0.2}
    base = {"dataset_details.dataset_path": str(path), "dataset_details.dataset_format": "auto"}
    base |= {f"{PRE}.{name}": value for name, value in how.items()}
    ways = {"lazy": {}, "eager": {f"{PRE}.lazy_tokenize": False}, "streamed": {f"{PRE}.streaming": True}}
    counts, rejected = {}, {}
    for name, changes in ways.items():
        manifest = launch(short(local_job, base | changes), name)
        counts[name] = {k: v for k, v in manifest["dataset"].items() if k != "files"}
        rejected[name] = (tmp_path / name / "rejected.jsonl").read_text()
    for value in (counts, rejected, *({name: f(tmp_path / name) for name in ways} for f in (curve, adapter))):
        assert value["lazy"] == value["eager"] == value["streamed"]
    found = {r["line"]: r["reason"] for r in map(json.loads, rejected["lazy"].splitlines())}
    assert (counts["lazy"]["rows"], counts["lazy"]["rejected"]) == (len(ROWS), len(bad))
    assert all(reason in found[4 + 5 * i] for i, reason in enumerate(bad)), found

    for changes in ways.values():
        with pytest.raises(DatasetError) as caught:
            launch(short(local_job, base | changes | {f"{PRE}.max_reject_ratio": 0.1}), "too-many")
        assert caught.value.code == "too_many_rejects"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_whose_tokenizer_changed_after_the_preparation_is_named(local_job, tmp_path, mirror, workers):
    shutil.copytree(mirror / TINY, tmp_path / "mirror" / TINY)
    template = tmp_path / "mirror" / TINY / "chat_template.jinja"

    class Change(Watcher):
        def on_phase(self, name):
            if name == "loading_model":
                template.write_text("{{ raise_exception('no more') }}")

    spec = JobSpec.model_validate(short(local_job, {f"{HP}.dataloader_num_workers": workers, f"{HP}.eval_steps": 9}))
    with pytest.raises(RunFault, match=r"line \d+ of .*rows\.jsonl was found usable and now isn't: .*no more") as caught:
        launch_local(spec, "run", RunFiles(str(tmp_path / "run"), str(tmp_path / "mirror"), Keys), Change())
    assert caught.value.cause == Cause.INTERNAL


def test_a_streamed_run_resumes_at_every_step(local_job, tmp_path, launch):
    job = short(local_job, {f"{PRE}.streaming": True})
    launch(job, "whole")
    for step in range(STEPS):
        with pytest.raises(Stopped):
            launch(job, "cut", Watcher(stop_at=step))
    launch(job, "cut")
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")


def test_rows_are_streamed_from_object_storage_with_keys_that_are_asked_for_again(local_job, tmp_path, mirror, s3):
    import boto3

    keys = {"aws_access_key_id": s3.access_key_id, "aws_secret_access_key": s3.secret_access_key}
    client = boto3.client("s3", endpoint_url=s3.endpoint_url, region_name="us-east-1", **keys)
    client.create_bucket(Bucket="streamed")
    client.put_object(Bucket="streamed", Key="rows.jsonl", Body="".join(json.dumps(row) + "\n" for row in ROWS).encode())
    good = Credentials(s3.access_key_id, s3.secret_access_key, endpoint_url=s3.endpoint_url)
    expired = Credentials(s3.access_key_id, "gone" * 10, endpoint_url=s3.endpoint_url)
    details = {"dataset_path": "s3://streamed/rows.jsonl", "source_type": "s3", "ownership": "private", "secret_id": "keys"}
    job = short(local_job, {"dataset_details": details, f"{PRE}.streaming": True})
    files = RunFiles(str(tmp_path / "s3"), str(mirror), lambda: Keys(dataset=good))
    launch_local(JobSpec.model_validate(job), "run", files, Watcher())
    local = short(local_job, {"dataset_details.dataset_path": str(write_jsonl(tmp_path / "local.jsonl", ROWS))})
    launch_local(JobSpec.model_validate(local), "run", RunFiles(str(tmp_path / "local"), str(mirror), Keys), Watcher())
    assert curve(tmp_path / "s3") == curve(tmp_path / "local")

    spec, given = JobSpec.model_validate(job), [expired, good]
    opener = RunFiles(str(tmp_path), str(mirror), lambda: Keys(dataset=given.pop(0) if len(given) > 1 else given[0]))
    reader = RowReader(lambda: opener.source(spec), "sharegpt")
    file = SourceFile("streamed/rows.jsonl", "s3://streamed/rows.jsonl", 0, "")
    size = len(json.dumps(ROWS[0]))
    with pytest.raises(DatasetError, match="refused the keys"):
        reader.read(file, 0, size)  # keys that never were good are the user's to mend
    first = reader.read(file, 0, size)
    reader._open.clear()
    given[:] = [expired, good]
    reader._source = opener.source(spec)  # what was good has expired
    assert reader.read(file, 0, size) == first


def test_a_dataset_that_changes_under_a_run_is_told(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    reader = RowReader(LocalFileSystem, "sharegpt")
    file = SourceFile(str(path), str(path), path.stat().st_size, "")
    sizes = [len(json.dumps(row)) for row in ROWS]
    assert reader.read(file, sizes[0] + 1, sizes[1])["messages"][-1]["content"] == answer(ROWS[1])
    path.write_text("x" * 10_000)
    with pytest.raises(DatasetError, match=re.escape(f"{path} was changed while it was trained on: where a row was at byte 0")):
        reader.read(file, 0, sizes[0])
    path.unlink()
    with pytest.raises(DatasetError, match="there is no object"):
        RowReader(LocalFileSystem, "sharegpt").read(file, 0, sizes[0])


def test_more_files_than_are_held_open_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("train_loop.data.streaming.MAX_OPEN_FILES", 2)
    reader = RowReader(LocalFileSystem, "sharegpt")
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate(ROWS[:6])]
    for _ in range(2):
        for path, row in zip(paths, ROWS, strict=False):
            read = reader.read(SourceFile(str(path), str(path), 0, ""), 0, len(json.dumps(row)))
            assert read["messages"][-1]["content"] == answer(row)
    assert len(reader._open) <= 2


def test_a_compressed_file_below_a_prefix_can_not_be_streamed(local_job, tmp_path, launch):
    (tmp_path / "many").mkdir()
    write_jsonl(tmp_path / "many/a.jsonl", ROWS)
    (tmp_path / "many/b.jsonl.gz").write_bytes(b"\x1f\x8b")
    job = short(local_job, {f"{PRE}.streaming": True, "dataset_details.dataset_path": f"{tmp_path}/many/"})
    with pytest.raises(DatasetError, match=r"store .*b\.jsonl\.gz uncompressed"):
        launch(job)


def test_no_thread_outlives_a_streamed_run(local_job, launch):
    launch(short(local_job, {f"{PRE}.streaming": True, f"{HP}.dataloader_num_workers": 3}))
    for thread in threading.enumerate():
        if thread.name.startswith("rows"):
            thread.join(30)
            assert not thread.is_alive()


def test_rows_of_the_test_share_are_neither_trained_nor_evaluated_on(local_job, tmp_path, launch, monkeypatch):
    """Those that a run reads are all others: a streamed row that nobody asks for may be anything by then."""
    split = {"dataset_config.split.ratios": [0.6, 0.2, 0.2], f"{HP}.max_steps": 20, f"{PRE}.streaming": True}
    job = short(local_job, split)
    manifest = launch(job, "whole")
    counts = manifest["dataset"]["split"]
    assert sum(counts.values()) == len(ROWS)
    assert all(counts[name] > 0 for name in ("train", "eval", "test"))
    read = set()
    original = RowReader.read
    monkeypatch.setattr(
        RowReader, "read", lambda self, file, offset, size: read.add(offset) or original(self, file, offset, size)
    )
    launch(job, "again")
    assert len(read) == counts["train"] + counts["eval"]
    assert adapter(tmp_path / "again") == adapter(tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_tokenised_in_as_many_processes_as_asked(local_job, launch, workers):
    class Family(Watcher):
        most = 0

        def on_progress(self, progress):
            super().on_progress(progress)
            self.most = max(self.most, len(psutil.Process().children()))

    monitor, before = Family(), len(psutil.Process().children())
    launch(short(local_job, {f"{HP}.dataloader_num_workers": workers}), "run", monitor)
    assert monitor.most - before == workers
