import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from tests.conftest import DOCUMENTED, rows, with_fields
from train_loop.data import parts
from train_loop.data.prepare import prepare_local
from train_loop.data.shards import PreparedDataset, ShardSet, split_bounds
from train_loop.data.sources import Credentials, filesystem_for, find_files
from train_loop.errors import DatasetError
from train_loop.spec import JobSpec

LOCAL = LocalFileSystem()


def prepare(job, tmp_path, lines):
    spec = JobSpec.model_validate(job)
    path = spec.dataset_details.dataset_path
    with open(path, "w") as out:
        out.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    run = str(tmp_path / "run")
    prepared = prepare_local(spec, LOCAL, find_files(spec, LOCAL), LOCAL, run, None)
    assert PreparedDataset.from_json((tmp_path / "run/data/index.json").read_text()) == prepared
    return prepared, ShardSet.open(prepared, LOCAL, f"{run}/data", tmp_path / "cache")


def test_rejected_lines_have_their_numbers_whatever_the_ranges(local_job, tmp_path, monkeypatch):
    lines = [*rows(30), "{broken\n", "\n", {"conversations": []}, *rows(10)]
    job = local_job({"dataset_config.preprocessing.max_reject_ratio": 0.5})
    seen = []
    for size in (64, 1 << 20):
        monkeypatch.setattr(parts, "RANGE_BYTES", size)
        prepared, shards = prepare(job, tmp_path, lines)
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


def test_appending_rows_moves_no_row_between_splits(local_job, tmp_path):
    _, before = prepare(local_job(), tmp_path, rows(40))
    held_out = [before.conversation(i) for i in before.ids("eval")]
    _, after = prepare(local_job(), tmp_path, rows(80))
    assert held_out
    assert [after.conversation(i) for i in after.ids("eval")][: len(held_out)] == held_out


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
def test_a_dataset_without_enough_usable_rows_fails_with_the_reason(local_job, tmp_path, lines, code):
    with pytest.raises(DatasetError) as caught:
        prepare(local_job(), tmp_path, lines)
    assert caught.value.code == code


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
