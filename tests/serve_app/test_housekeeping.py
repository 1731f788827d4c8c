"""What is out of date goes, and nothing else."""

import datetime as dt
import os

import boto3

from serve_app import housekeeping
from serve_app.housekeeping import clean
from serve_app.storage import Upload, abandoned_uploads
from serve_app.store.jobs import JobStore
from tests.conftest import DOCUMENTED
from train_loop.spec import JobSpec


def test_idempotency_keys_go_after_a_day(store, settings):
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    clock = JobStore(store.engine, lambda: now)
    job, _ = clock.insert(JobSpec.model_validate(DOCUMENTED), "queued", "key", "hash")
    now += dt.timedelta(hours=23)
    assert clock.forget_expired_keys() == 0
    assert clock.replay(job.org_id, "key", "hash") == job
    now += dt.timedelta(hours=2)
    assert clock.forget_expired_keys() == 1
    assert clock.get(job.request_id) == job
    assert clean(settings, store) == {"idempotency_keys": 0, "uploads": 0, "cached_datasets": 0}


def test_uploads_that_were_cut_off_are_given_up(store, settings, s3, monkeypatch):
    keys = {"aws_access_key_id": s3.access_key_id, "aws_secret_access_key": s3.secret_access_key}
    client = boto3.client("s3", endpoint_url=s3.endpoint_url, region_name="us-east-1", **keys)
    client.create_bucket(Bucket="runs")
    ours = settings.model_copy(
        update={
            "storage_uri": "s3://runs/ours",
            "storage_endpoint_url": s3.endpoint_url,
            "storage_access_key_id": s3.access_key_id,
            "storage_secret_access_key": type(settings.jwt_secret)(s3.secret_access_key),
        }
    )
    begun = {key: client.create_multipart_upload(Bucket="runs", Key=key)["UploadId"] for key in ("ours/a", "ours-too/b")}
    for key, upload_id in begun.items():
        client.upload_part(Bucket="runs", Key=key, UploadId=upload_id, PartNumber=1, Body=b"x")
    now = dt.datetime.now(dt.UTC)
    assert list(abandoned_uploads(ours, now + dt.timedelta(minutes=1))) == [Upload("ours/a", begun["ours/a"])]
    assert clean(ours, store)["uploads"] == 0  # it may be under way
    monkeypatch.setattr(housekeeping, "UPLOAD_AGE", -dt.timedelta(minutes=1))
    assert clean(ours, store)["uploads"] == 1
    assert clean(ours, store)["uploads"] == 0
    left = client.list_multipart_uploads(Bucket="runs").get("Uploads", [])
    assert [u["Key"] for u in left] == ["ours-too/b"]
    client.put_object(Bucket="runs", Key="ours/whole", Body=b"x")
    assert list(abandoned_uploads(ours, now + dt.timedelta(minutes=1))) == []


def test_prepared_rows_that_were_used_longest_ago_go_when_they_are_too_many(store, settings, tmp_path):
    ours = settings.model_copy(update={"storage_uri": str(tmp_path), "data_cache_bytes": 250})
    for at, entry in enumerate(["org-a/data-cache/old", "org-b/data-cache/used", "org-a/data-cache/new", "org-a/run/data"]):
        folder = tmp_path / entry
        folder.mkdir(parents=True)
        for name in ("index.json", "shard"):
            (folder / name).write_bytes(b"x" * 50)
            os.utime(folder / name, (at, at))
    (tmp_path / "org-b/data-cache/used/used").touch()
    assert clean(ours, store)["cached_datasets"] == 1
    assert {str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("shard")} == {
        "org-b/data-cache/used",
        "org-a/data-cache/new",
        "org-a/run/data",
    }
    assert clean(ours, store)["cached_datasets"] == 0
