import gc
import gzip
import json
import random
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from tests.conftest import DOCUMENTED, rows, with_fields, write_jsonl
from train_loop.data import parts
from train_loop.data.prepare import prepare_local
from train_loop.data.shards import PreparedDataset, ShardSet, split_bounds, split_place
from train_loop.data.sources import Credentials, filesystem_for, find_files
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import DatasetError
from train_loop.launch import describe
from train_loop.model.source import ModelPlaces
from train_loop.plan import make_plan, this_machine
from train_loop.spec import JobSpec

LOCAL = LocalFileSystem()


@pytest.fixture
def prepared_at(tokenizer):
    """Prepare the dataset of a job, into a folder."""

    def prepare(spec, run, source=LOCAL, files=None):
        chat = ChatTokenizer.of(spec, tokenizer)
        return prepare_local(spec, source, files or find_files(spec, source), LOCAL, str(run), chat)

    return prepare


@pytest.fixture
def prepare(prepared_at, tmp_path):
    """Write lines where a job has its dataset, and prepare it."""

    def write_and_prepare(job, lines):
        spec = JobSpec.model_validate(job)
        with open(spec.dataset_details.dataset_path, "w") as out:
            out.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        prepared = prepared_at(spec, tmp_path / "run")
        assert PreparedDataset.from_json((tmp_path / "run/data/index.json").read_text()) == prepared
        return prepared, ShardSet(prepared, tmp_path / "run/data")

    return write_and_prepare


def test_rejected_lines_have_their_numbers_whatever_the_ranges(local_job, prepare, tmp_path, monkeypatch):
    lines = [*rows(30), "{broken\n", "\n", {"conversations": []}, *rows(10)]
    job = local_job({"dataset_config.preprocessing.max_reject_ratio": 0.5})
    seen = []
    for size in (64, 1 << 20):
        monkeypatch.setattr(parts, "RANGE_BYTES", size)
        prepared, shards = prepare(job, lines)
        rejected = [json.loads(line) for line in (tmp_path / "run/rejected.jsonl").read_text().splitlines()]
        assert [(r["line"], r["reason"].split(":")[0]) for r in rejected] == [
            (31, "not JSON"),
            (33, "no assistant turn that answers a user"),
        ]
        assert rejected[0]["excerpt"] == "{broken"
        assert (prepared.num_lines, prepared.num_rows, prepared.num_rejected) == (42, 40, 2)
        seen.append([shards.conversation(i) for split in ("train", "eval") for i in shards.ids(split)])
        assert len(prepared.eval_lines) == prepared.counts["eval"] == len(shards.ids("eval"))
    assert seen[0] == seen[1]


def test_garbage_is_looked_for_afterwards_as_before(local_job, prepare):
    before = gc.get_threshold()
    prepare(local_job(), rows(3))
    with pytest.raises(DatasetError):
        prepare(local_job(), ["{broken\n"])
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)


@pytest.mark.parametrize("how", [{}, {"lazy_tokenize": False}, {"streaming": True}])
def test_rejected_answers_are_left_out_and_the_event_says_of_how_many_rows(local_job, prepare, how):
    preferences = [{"prompt": "Hi", "chosen": f"Hello {i}", "rejected": "Go away"} for i in range(3)]
    bad = {"prompt": "Hi", "chosen": "Hello", "rejected": ""}
    changes = {"dataset_details.dataset_format": "auto", "dataset_config.preprocessing.max_reject_ratio": 0.5}
    changes |= {f"dataset_config.preprocessing.{name}": value for name, value in how.items()}
    prepared, _ = prepare(local_job(changes), [*rows(4), *preferences, bad])
    assert (prepared.num_rows, prepared.num_rejected, prepared.num_preferences) == (7, 1, 3)
    assert "; of 3 preference rows the preferred answers are trained on, the others are left out" in describe(prepared)
    assert "preference" not in describe(prepare(local_job(changes), rows(4))[0])


def test_appending_rows_moves_no_row_between_splits(local_job, prepare):
    _, before = prepare(local_job(), rows(40))
    held_out = [before.conversation(i) for i in before.ids("eval")]
    _, after = prepare(local_job(), rows(80))
    assert held_out
    assert [after.conversation(i) for i in after.ids("eval")][: len(held_out)] == held_out


def test_another_seed_holds_out_other_rows(local_job, prepare):
    held_out = []
    for seed in (1, 2):
        _, shards = prepare(local_job({"train_config.hyperparameters.seed": seed}), rows(40))
        held_out.append([shards.source(int(i)) for i in shards.ids("eval")])
    assert all(held_out)
    assert held_out[0] != held_out[1]


def test_each_split_gets_its_share():
    ratios = [0.7, 0.2, 0.1]
    places = np.array([split_place(42, "", 37 * i) for i in range(20_000)])
    which = np.searchsorted(split_bounds(ratios, places), places, side="right")
    assert np.bincount(which) / len(places) == pytest.approx(ratios, abs=0.01)


@given(
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=30, unique=True),
    st.sampled_from([[0.9, 0.1], [0.98, 0.01, 0.01], [1.0]]),
)
def test_every_split_with_a_share_gets_a_row_when_there_are_enough(places, ratios):
    which = np.searchsorted(split_bounds(ratios, np.array(places)), places, side="right")
    counts = np.bincount(which, minlength=len(ratios))
    assert len(counts) == len(ratios)
    assert counts[0] >= 1
    if len(places) >= len(ratios):
        assert (counts >= 1).all()


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["\n", "\n"], "dataset_empty"),
        ([{"messages": []}] * 5, "no_usable_rows"),
        ([*rows(20), "broken\n"], "too_many_rejects"),
    ],
)
def test_a_dataset_without_enough_usable_rows_fails_with_the_reason(local_job, prepare, lines, code):
    with pytest.raises(DatasetError) as caught:
        prepare(local_job(), lines)
    assert caught.value.code == code


def test_as_many_rows_as_max_reject_ratio_allows_may_be_bad(local_job, prepare):
    job = local_job({"dataset_config.preprocessing.max_reject_ratio": 0.05})
    assert prepare(job, [*rows(19), "broken\n"])[0].num_rejected == 1
    with pytest.raises(DatasetError) as caught:
        prepare(job, [*rows(18), "broken\n"])
    assert caught.value.code == "too_many_rejects"


@pytest.fixture(scope="module")
def bucket(s3):
    client = s3.client()
    client.put_object(Bucket="tuneyard", Key="ds/rows.jsonl", Body=b"{}\n")
    client.put_object(Bucket="tuneyard", Key="ds/empty.jsonl", Body=b"")
    return s3


@pytest.mark.parametrize(
    ("path", "changes", "code"),
    [
        ("s3://tuneyard/ds/missing.jsonl", {}, "object_not_found"),
        ("s3://tuneyard/missing/", {}, "object_not_found"),
        ("s3://no-such-bucket/rows.jsonl", {}, "bucket_not_found"),
        ("s3://tuneyard/ds/empty.jsonl", {}, "dataset_empty"),
        ("s3://tuneyard/ds/rows.jsonl", {"secret_access_key": "wrong"}, "storage_access_denied"),
        ("s3://tuneyard/ds/rows.jsonl", {"access_key_id": "WRONG"}, "storage_access_denied"),
        ("s3://tuneyard/ds/rows.jsonl", {"endpoint_url": "http://127.0.0.1:1"}, "storage_unreachable"),
    ],
)
def test_storage_errors_say_what_to_mend_and_no_key(bucket, path, changes, code):
    secret = {
        "access_key_id": bucket.access_key_id,
        "secret_access_key": bucket.secret_access_key,
        "endpoint_url": bucket.endpoint_url,
    }
    keys = Credentials.from_secret(secret | changes)
    spec = JobSpec.model_validate(with_fields(DOCUMENTED, {"dataset_details.dataset_path": path}))
    with pytest.raises(DatasetError) as caught:
        find_files(spec, filesystem_for(path, keys)[0])
    assert caught.value.code == code
    assert bucket.secret_access_key not in caught.value.message + repr(keys)
    assert bucket.access_key_id not in caught.value.message + repr(keys)


def test_a_file_replaced_by_one_of_its_size_and_time_is_another(bucket):
    keys = Credentials(bucket.access_key_id, bucket.secret_access_key, endpoint_url=bucket.endpoint_url)
    uri = "s3://tuneyard/replaced.jsonl"
    filesystem, _ = filesystem_for(uri, keys)
    spec = JobSpec.model_validate(with_fields(DOCUMENTED, {"dataset_details.dataset_path": uri}))
    found = []
    for body in (b'{"a": 1}', b'{"a": 2}', b'{"a": 1}'):
        bucket.client().put_object(Bucket="tuneyard", Key="replaced.jsonl", Body=body)
        (file,) = find_files(spec, filesystem)
        found.append(replace(file, modified=""))
    assert found[0] == found[2] != found[1]


def write_types(folder, made):
    """The same rows as JSONL, as a prefix of plain and compressed JSONL, as an array and as Parquet; path and type of each."""
    text = "".join(json.dumps(row) + "\n" for row in made).encode()
    half = text.index(b"\n", len(text) // 2) + 1
    files = {
        "rows.jsonl": text,
        "prefix/1.jsonl": text[:half],
        "prefix/2.jsonl.gz": gzip.compress(text[half:]),
        "prefix/3.jsonl": b"",
        "rows.json": json.dumps(made, indent=1).encode(),
    }
    (folder / "prefix").mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    pq.write_table(pa.Table.from_pylist(made), folder / "rows.parquet", row_group_size=9)
    names = {"rows.jsonl": "jsonl", "prefix/": "jsonl", "rows.json": "json", "rows.parquet": "parquet"}
    return {f"{folder}/{name}": dataset_type for name, dataset_type in names.items()}


def test_every_type_gives_the_same_rows_and_plan(local_job, prepared_at, tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(parts, "RANGE_BYTES", 1000)
    made = [{"conversations": r["conversations"]} for r in rows(80) if "conversations" in r]
    seen = {}
    for path, dataset_type in write_types(tmp_path / "data", made).items():
        base = {"dataset_details.dataset_path": path, "dataset_details.dataset_type": dataset_type}
        spec = JobSpec.model_validate(local_job(base | {"dataset_config.split": {"type": "none"}}))
        run = tmp_path / f"run-{len(seen)}"
        prepared = prepared_at(spec, run)
        shards = ShardSet(prepared, run / "data")
        assert len(prepared.shards) > 1
        plan = make_plan(spec, ModelPlaces(str(mirror)), this_machine())
        seen[path] = [shards.conversation(i) for i in shards.ids("train")], plan
        where = [shards.source(int(i)) for i in shards.ids("train")]
        expected = [n - (20 if uri.endswith("2.jsonl.gz") else 0) for n, (uri, _) in enumerate(where, 1)]
        assert [line for _, line in where] == expected
    first = next(iter(seen.values()))
    assert len(first[0]) == len(made) == first[1]["rows"]["total"]
    assert all(found == first for found in seen.values())


@pytest.mark.parametrize("dataset_type", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_a_large_dataset_of_any_type_is_estimated_from_a_part_of_it(local_job, tmp_path, mirror, dataset_type):
    folder = tmp_path / "data"
    folder.mkdir()
    drawn = random.Random(0)
    for i in range(3):
        turns = [r["conversations"] for r in rows(9_000) if "conversations" in r]
        made = [{"conversations": c, "id": drawn.randbytes(100).hex()} for c in turns]
        if dataset_type == "parquet":
            pq.write_table(pa.Table.from_pylist(made), folder / f"{i}.parquet", row_group_size=999)
            continue
        text = json.dumps(made) if dataset_type == "json" else "".join(json.dumps(row) + "\n" for row in made)
        data = gzip.compress(text.encode(), 1) if dataset_type.endswith("gz") else text.encode()
        (folder / f"{i}.{dataset_type}").write_bytes(data)
    base = {"dataset_details.dataset_path": f"{folder}/", "dataset_details.dataset_type": dataset_type.removesuffix(".gz")}
    plan = make_plan(JobSpec.model_validate(local_job(base)), ModelPlaces(str(mirror)), this_machine())
    assert not plan["rows"]["exact"]
    assert plan["rows"]["read"] <= 9 * 32
    assert plan["rows"]["total"] == pytest.approx(13_500, rel=0.1)


def test_a_file_of_their_own_gives_the_rows_to_evaluate_on(local_job, prepared_at, tmp_path, mirror):
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", rows(20))
    write_jsonl(folder / "eval.jsonl", rows(50)[45:])
    split = {"dataset_config.split": {"type": "file", "eval_path": str(folder / "eval.jsonl")}}
    spec = JobSpec.model_validate(local_job(split | {"dataset_details.dataset_path": f"{folder}/"}))
    files = find_files(spec, LOCAL)
    assert [(f.name, f.is_eval) for f in files] == [("a.jsonl", False), ("", True)]
    prepared = prepared_at(spec, tmp_path / "run", LOCAL, files)
    shards = ShardSet(prepared, tmp_path / "run/data")
    assert prepared.counts == {"train": 20, "eval": 5}
    assert [shards.source(int(i))[1] for i in shards.ids("eval")] == [1, 2, 3, 4, 5] == prepared.eval_lines
    asked = [shards.conversation(int(i))["messages"][0]["content"] for i in shards.ids("eval")]
    assert asked == [f"What is {i} plus one?" for i in range(45, 50)]
    plan = make_plan(spec, ModelPlaces(str(mirror)), this_machine())
    assert (plan["rows"]["train"], plan["rows"]["eval"]) == (20, 5)

    (folder / "eval.jsonl").write_text("{}\n")
    with pytest.raises(DatasetError, match=r"no usable row in .*eval\.jsonl"):
        prepared_at(spec, tmp_path / "run")
    (folder / "a.jsonl").unlink()
    with pytest.raises(DatasetError, match="nothing is left to train on"):
        find_files(spec, LOCAL)


@pytest.mark.parametrize(
    ("data", "about", "hint"),
    [
        (json.dumps(rows(3)), "type", "that is dataset_type json."),
        (json.dumps(rows(3), indent=2), "type", "that is dataset_type json."),
        ("PAR1\x15\x04", "type", "that is dataset_type parquet."),
        (gzip.compress(json.dumps(rows(1)[0]).encode()), "path", "its name must end in .jsonl.gz."),
        (zstandard.compress(json.dumps(rows(1)[0]).encode()), "path", "its name must end in .jsonl.zst."),
        (json.dumps(rows(1)[0]).encode("utf-16"), "path", "write it as UTF-8."),
        (json.dumps(rows(1)[0], indent=2), "path", "write each on one."),
        ("prompt,completion\n1?,1", "path", "CSV and other text isn't read."),
        ("\n\n", "path", "has no rows, only blank lines."),
        ('{"input": "1?", "output": "1"}', "format", "it has input, output."),
    ],
)
def test_of_a_file_without_a_usable_row_it_is_told_what_it_seems_to_be(
    local_job, mirror, prepared_at, tmp_path, data, about, hint
):
    spec = JobSpec.model_validate(local_job({"dataset_details.dataset_format": "openai"}))
    (tmp_path / "rows.jsonl").write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(DatasetError) as looked_at:
        make_plan(spec, ModelPlaces(str(mirror)), this_machine())
    with pytest.raises(DatasetError) as prepared:
        prepared_at(spec, tmp_path / "run")
    for caught in (looked_at, prepared):
        assert caught.value.field == f"dataset_details.dataset_{about}"
        assert caught.value.message.endswith(hint)


def test_a_file_added_to_a_prefix_moves_no_row_between_splits(local_job, prepared_at, tmp_path):
    held_out = []
    for names in (["m"], ["a", "m", "z"]):
        folder = tmp_path / "data"
        for name in names:
            folder.mkdir(exist_ok=True)
            write_jsonl(folder / f"{name}.jsonl", rows(40))
        spec = JobSpec.model_validate(local_job({"dataset_details.dataset_path": f"{folder}/"}))
        prepared = prepared_at(spec, tmp_path / "run")
        shards = ShardSet(prepared, tmp_path / "run/data")
        sources = [shards.source(int(i)) for i in shards.ids("eval")]
        held_out.append([s for s in sources if s[0].endswith("m.jsonl")])
    assert held_out[0]
    assert held_out[0] == held_out[1]


def test_a_prefix_in_s3_is_read_as_a_folder_is(bucket, local_job, prepared_at, tmp_path):
    keys = Credentials(bucket.access_key_id, bucket.secret_access_key, endpoint_url=bucket.endpoint_url)
    text = "".join(json.dumps(row) + "\n" for row in rows(30)).encode()
    client = bucket.client()
    for name, data in {"b.jsonl": text, "a/x.jsonl.gz": gzip.compress(text), "_SUCCESS": b"", "c.txt": b"x"}.items():
        client.put_object(Bucket="tuneyard", Key=f"prefix/{name}", Body=data)
    at = {"dataset_path": "s3://tuneyard/prefix/", "source_type": "s3", "ownership": "public"}
    spec = JobSpec.model_validate(with_fields(local_job(), {"dataset_details": at}))
    filesystem, _ = filesystem_for("s3://tuneyard/prefix/", keys)
    files = find_files(spec, filesystem)
    assert [(f.name, f.uri) for f in files] == [(n, f"s3://tuneyard/prefix/{n}") for n in ("a/x.jsonl.gz", "b.jsonl")]
    assert prepared_at(spec, tmp_path / "run", filesystem, files).num_rows == 60
