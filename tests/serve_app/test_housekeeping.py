"""What is out of date goes, and nothing else."""

import datetime as dt
import os

import boto3
import pytest

from serve_app import housekeeping, retention
from serve_app.housekeeping import clean
from serve_app.lifecycle import Status
from serve_app.storage import Upload, abandoned_uploads
from serve_app.store.jobs import JobStore
from serve_app.store.journal import Notes
from tests.conftest import DOCUMENTED, ORG, with_fields
from train_loop.spec import JobSpec

NOTHING = ("idempotency_keys", "uploads", "cached_datasets", "journals", "checkpoints")


def test_idempotency_keys_go_after_a_day(store, settings):
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    clock = JobStore(store.engine, lambda: now)
    job, _ = clock.insert(JobSpec.model_validate(DOCUMENTED), "queued", "key", "hash")
    now += dt.timedelta(hours=23)
    assert clock.forget_expired_keys() == 0
    assert clock.replay(job.org_id, "key", "hash") == job
    now += dt.timedelta(hours=2)
    assert clock.forget_expired_keys(dry_run=True) == 1
    assert clock.forget_expired_keys() == 1
    assert clock.get(job.request_id) == job
    assert clean(settings, store) == dict.fromkeys(NOTHING, 0)


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
    assert clean(ours, store, dry_run=True)["uploads"] == 1
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
    assert clean(ours, store, dry_run=True)["cached_datasets"] == 1
    assert clean(ours, store)["cached_datasets"] == 1
    assert {str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("shard")} == {
        "org-b/data-cache/used",
        "org-a/data-cache/new",
        "org-a/run/data",
    }
    assert clean(ours, store)["cached_datasets"] == 0


class Past:
    """Jobs that ended some days ago, with journals and checkpoints."""

    def __init__(self, store, settings, folder):
        self.store, self.folder = store, folder
        self.settings = settings.model_copy(update={"storage_uri": str(folder)})

    def ended(self, name, days_ago, status=Status.COMPLETED):
        ended_at = dt.datetime.now(dt.UTC) - dt.timedelta(days=days_ago)
        then = JobStore(self.store.engine, lambda: ended_at)
        job, _ = then.insert(JobSpec.model_validate(with_fields(DOCUMENTED, {"experiment_name": name})), "queued")
        then.start_attempt(job.request_id, 0, 1)
        then.report(job.request_id, 1, Notes([("a", "b")], [{"step": 1}], [(0, 1.0, "line")]), step=1)
        if status is not Status.RUNNING:
            then.finish(job.request_id, 1, status, message="done")
        for file in ("checkpoints/step-1/state.json", "adapter/weights", "manifest.json"):
            path = self.folder / ORG / job.request_id / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        return job.request_id

    def rows(self, request_id):
        journal = self.store.journal
        return [len(found(request_id)) for found in (journal.events, journal.points, journal.log)]

    def files(self, request_id):
        folder = self.folder / ORG / request_id
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}

    def clean(self, dry_run=False, **days):
        done = clean(self.settings.model_copy(update=days), self.store, dry_run=dry_run)
        return done["journals"], done["checkpoints"]


ALL = {"checkpoints/step-1/state.json", "adapter/weights", "manifest.json"}


@pytest.mark.parametrize("store", ["sqlite", "postgresql"], indirect=True)
def test_journals_of_jobs_that_ended_long_ago_go_if_the_operator_says_so(store, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "BATCH", 2)
    past = Past(store, settings, tmp_path / "runs")
    old = [past.ended(f"old-{i}", 40, status) for i, status in enumerate([Status.COMPLETED, Status.FAILED] * 2)]
    kept = [past.ended("new", 20), past.ended("runs", 40, Status.RUNNING)]
    assert past.clean() == (0, 0)  # by default for ever
    assert past.clean(dry_run=True, keep_journal_days=30) == (4, 0)
    assert [past.rows(r) for r in (*old, *kept)] == [[4, 1, 1]] * 5 + [[3, 1, 1]]
    assert past.clean(keep_journal_days=30) == (4, 0)
    assert [past.rows(r) for r in (*old, *kept)] == [[1, 0, 0]] * 4 + [[4, 1, 1], [3, 1, 1]]
    (event,) = store.journal.events(old[0])
    assert "30 days after its end" in event.message
    assert past.clean(keep_journal_days=30) == (0, 0)
    assert all(past.files(r) == ALL for r in old)
    store.resume(old[1])  # and what comes then is kept as long again
    assert past.clean(keep_journal_days=30) == (0, 0)
    assert past.rows(old[1]) == [2, 0, 0]


@pytest.mark.parametrize("store", ["sqlite", "postgresql"], indirect=True)
def test_checkpoints_of_completed_jobs_go_if_the_operator_says_so_and_those_a_resume_needs_stay(store, settings, tmp_path):
    past = Past(store, settings, tmp_path / "runs")
    old, new = past.ended("old", 8), past.ended("new", 6)
    resumable = [past.ended("failed", 8, Status.FAILED), past.ended("runs", 8, Status.RUNNING)]
    assert past.clean(dry_run=True, keep_checkpoints_days=7) == (0, 1)
    assert past.files(old) == ALL
    assert past.clean(keep_checkpoints_days=7) == (0, 1)
    assert past.files(old) == {"adapter/weights", "manifest.json"}
    assert [past.files(r) for r in (new, *resumable)] == [ALL] * 3
    assert past.clean(keep_checkpoints_days=7) == (0, 0)
    assert past.rows(old) == [4, 1, 1]


def test_checkpoints_whose_removal_was_cut_off_are_removed_by_the_next_turn(store, settings, tmp_path, monkeypatch):
    past = Past(store, settings, tmp_path / "runs")
    old = past.ended("old", 8)

    def dies(*arguments):
        raise OSError("the process is gone")

    with monkeypatch.context() as patch:
        patch.setattr(retention, "delete_folder", dies)
        with pytest.raises(OSError, match="gone"):
            past.clean(keep_checkpoints_days=7)
    assert past.clean(keep_checkpoints_days=7) == (0, 1)
    assert "checkpoints/step-1/state.json" not in past.files(old)
