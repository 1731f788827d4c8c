"""Runs of `ray job submit` beside the service: what the dispatcher hears of them, and what others see."""

import datetime as dt
import uuid

import pytest
import sqlalchemy as sa

from serve_app.auth import mint_token
from serve_app.backup import back_up, restore
from serve_app.lifecycle import Status
from serve_app.meter import QueueMeter
from serve_app.outside import Listener, RayJob
from serve_app.retention import remove_checkpoints, remove_journals
from serve_app.store import outside
from serve_app.store.audit import By
from serve_app.store.jobs import JobStore, NotResumable
from serve_app.store.quotas import use_by_org
from serve_app.store.tables import jobs
from tests.conftest import DOCUMENTED, ORG, OTHER_ORG, with_fields
from tests.serve_app.test_metrics import recorded  # noqa: F401 - a fixture
from train_loop.errors import DatasetError, Stopped
from train_loop.record import About, Record, completed, cut_short
from train_loop.spec import JobSpec

MANIFEST = {"adapter_uri": "s3://b/a", "adapter_files": [1], "merged_uri": None, "merged_files": [], "steps": 4}
MANIFEST["metrics"] = {"last": {"step": 4, "loss": 1.0}}


def pytest_generate_tests(metafunc):
    """Everything here holds on both databases."""
    if "store" in metafunc.fixturenames:
        metafunc.parametrize("store", ["sqlite", "postgresql"], indirect=True)


def spec(name="outside", org=ORG):
    return JobSpec.model_validate(with_fields(DOCUMENTED, {"experiment_name": name, "org": org, "infra_config.gpu_type": "cpu"}))


class Outside:
    """A cluster of Ray jobs that exists only in memory; the records of the runs are real."""

    def __init__(self):
        self.records, self.ray_jobs, self.stopped = {}, {}, []

    def begin(self, ray_job="my-run", request_id=None, **changes):
        request_id = request_id or str(uuid.uuid4())
        self.records[request_id] = Record(About(request_id, ray_job, spec(**changes).model_dump(mode="json")))
        self.ray_jobs[ray_job] = RayJob("RUNNING", "")
        return request_id

    def end(self, request_id, ray_job="my-run", status="SUCCEEDED", message=""):
        """The process is gone, and its monitor with it."""
        del self.records[request_id]
        self.ray_jobs[ray_job] = RayJob(status, message)

    def alive(self):
        return set(self.records)

    def told(self, cursors):
        return {request_id: self.records[request_id].since(cursor) for request_id, cursor in cursors.items()}

    def ray_job(self, submission_id):
        return self.ray_jobs.get(submission_id)

    def stop(self, submission_id):
        self.stopped.append(submission_id)


@pytest.fixture
def ray():
    return Outside()


@pytest.fixture
def listener(store, ray):
    return Listener(store, ray)


def test_a_run_is_listed_with_its_progress_and_completes(store, ray, listener):
    request_id = ray.begin()
    record = ray.records[request_id]
    listener.run()
    job = store.get(request_id, ORG)
    assert (job.status, job.phase, job.attempt, job.ray_job) == (Status.RUNNING, "preparing_data", 1, "my-run")
    record.phase("training")
    record.progress({"step": 2, "total_steps": 4, "progress": 0.5, "points": [{"step": 1}, {"step": 2}]})
    record.lines(0, [(5.0, "hello")])
    record.event("prepared", "9 rows")
    listener.run()
    listener.run()
    job = store.get(request_id)
    assert (job.phase, job.step, job.total_steps, job.progress) == ("training", 2, 4, 0.5)
    assert [point["step"] for point in store.journal.points(request_id)] == [1, 2]
    assert [(line.attempt, line.line) for line in store.journal.log(request_id)] == [(1, "hello")]
    said, last = completed(MANIFEST)
    record.end({"status": "COMPLETED"} | said, last)
    assert not record.is_read()
    listener.run()
    assert record.is_read()  # so its process needn't wait any longer
    ray.end(request_id)
    listener.run()
    job = store.get(request_id)
    assert (job.status, job.phase, job.step, job.progress) == (Status.COMPLETED, "done", 4, 1.0)
    assert (job.message, job.output_model_path) == ("Adapter saved: 1 files at s3://b/a.", "s3://b/a")
    assert job.completed_at is not None
    kinds = [event.kind for event in store.journal.events(request_id)]
    assert kinds == ["started", "prepared", "completed"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(DatasetError("no rows", code="dataset_empty"), Status.FAILED, "dataset_empty"), (Stopped(), Status.CANCELED, None)],
)
def test_a_run_that_is_cut_short_says_why_even_if_it_was_never_asked_before(store, ray, listener, error, status, code):
    request_id = ray.begin()
    ray.records[request_id].end(cut_short(error), {})
    listener.run()
    job = store.get(request_id)
    assert (job.status, job.error_code) == (status, code)
    assert ray.records[request_id].is_read()


@pytest.mark.parametrize(
    ("ends", "status", "code", "said"),
    [
        (("SUCCEEDED", ""), Status.COMPLETED, None, "ray job logs my-run"),
        (("STOPPED", ""), Status.CANCELED, None, "Stopped"),
        (("FAILED", "exit code -9, last available logs (x):\nAKIA..."), Status.FAILED, "worker_died", "Ray says: exit code -9. "),
        (None, Status.FAILED, "cluster_away", "the cluster was restarted"),
    ],
)
def test_a_run_that_went_without_a_word_has_ended_as_ray_says(store, ray, listener, ends, status, code, said):
    request_id = ray.begin()
    listener.run()
    del ray.records[request_id]
    listener.run()
    assert store.get(request_id).status is Status.RUNNING  # Ray says so still
    if ends is None:
        ray.ray_jobs.clear()
    else:
        ray.ray_jobs["my-run"] = RayJob(*ends)
    for _ in range(2):
        listener.run()
    job = store.get(request_id)
    assert (job.status, job.error_code, said in job.message, "AKIA" in job.message) == (status, code, True, False)
    assert len(store.journal.events(request_id)) == 2


def test_a_cancel_stops_the_ray_job_and_is_over_when_that_is(store, ray, listener):
    request_id = ray.begin()
    listener.run()
    assert store.request_cancel(request_id).status is Status.RUNNING
    listener.run()
    assert ray.stopped == ["my-run"]
    assert store.get(request_id).status is Status.RUNNING
    ray.records[request_id].end(cut_short(Stopped()), {})
    listener.run()
    assert store.get(request_id).status is Status.CANCELED
    assert store.request_cancel(request_id).status is Status.CANCELED


def test_going_on_is_ray_job_submit_s_and_goes_on_with_the_row(store, ray, listener):
    request_id = ray.begin()
    ray.records[request_id].lines(0, [(1.0, "first")])
    listener.run()
    with pytest.raises(NotResumable, match=f"--request-id {request_id}"):
        store.ask_to_yield(request_id, 1, "requeue")
    ray.records[request_id].end(cut_short(Stopped()), {"step": 2})
    listener.run()
    with pytest.raises(NotResumable, match=f"Ray job my-run.*--request-id {request_id}"):
        store.resume(request_id)
    ray.end(request_id, status="STOPPED")
    ray.begin("again", request_id)
    ray.records[request_id].lines(0, [(2.0, "second")])
    listener.run()
    job = store.get(request_id)
    assert (job.status, job.attempt, job.ray_job, job.step) == (Status.RUNNING, 2, "again", 2)
    assert (job.completed_at, job.cancel_requested) == (None, False)
    assert [(line.attempt, line.line) for line in store.journal.log(request_id)] == [(1, "first"), (2, "second")]
    said, last = completed(MANIFEST)
    ray.records[request_id].end({"status": "COMPLETED"} | said, last)
    listener.run()
    ray.begin("once-more", request_id)  # finds all done
    ray.records[request_id].end({"status": "COMPLETED"} | said, last)
    listener.run()
    assert ray.records[request_id].is_read()
    job = store.get(request_id)
    assert (job.status, job.attempt, job.ray_job) == (Status.COMPLETED, 2, "again")


def test_two_dispatchers_write_each_note_once(store, ray):
    request_id = ray.begin()
    ray.records[request_id].lines(0, [(1.0, "once")])

    class Slow(Outside):
        """One that another dispatcher overtakes while it asks."""

        def told(self, cursors):
            answers = ray.told(cursors)
            Listener(store, ray).run()
            return answers

    slow = Slow()
    slow.records = ray.records
    for _ in range(2):
        Listener(store, slow).run()
        ray.records[request_id].lines(0, [(2.0, "more")])
    Listener(store, ray).run()
    assert [line.line for line in store.journal.log(request_id)] == ["once", "more", "more"]
    assert store.get(request_id).attempt == 1


def test_one_run_that_tells_nonsense_keeps_nobody_from_being_heard(store, ray, listener):
    ids = sorted(str(uuid.uuid4()) for _ in range(3))
    for request_id in ids:
        ray.begin(request_id=request_id)
    broken = ray.records[ids[1]]
    broken.event("x" * 65, "a kind that no column holds")
    broken_since = broken.since
    for nonsense in (broken_since, lambda cursor: b"{", lambda cursor: b'{"request_id": "x"}'):
        broken.since = nonsense
        listener.run()
    assert [store.get(request_id) is not None for request_id in ids] == [True, False, True]


def test_a_job_of_the_service_is_nobody_else_s_whatever_a_run_says(store, ray, listener):
    mine, _ = store.insert(spec("mine"), "queued")
    theirs = ray.begin()
    listener.run()
    ray.begin("fake", mine.request_id)
    ray.records[theirs] = Record(About(theirs, "fake", spec(org=OTHER_ORG).model_dump(mode="json")))
    listener.run()
    assert store.get(mine.request_id) == store.get(mine.request_id, ORG)
    assert (store.get(mine.request_id).status, store.get(mine.request_id).ray_job) == (Status.QUEUED, None)
    assert (store.get(theirs).org_id, store.get(theirs).ray_job) == (ORG, "my-run")


def test_what_only_has_such_a_name_or_was_started_by_hand_is_not_listed(store, ray, listener):
    request_id = str(uuid.uuid4())
    ray.records[request_id] = Record(About(request_id, None, spec().model_dump(mode="json")))
    listener.run()
    assert store.list_jobs(ORG) == ([], None)


def test_the_service_schedules_and_counts_nothing_of_it(store, ray, listener, recorded):  # noqa: F811
    request_id = ray.begin(name="taken")
    listener.run()
    mine, _ = store.insert(spec("taken"), "queued")  # its name is free
    assert [job.request_id for job in store.waiting(10)] == [mine.request_id]
    assert store.running() == []
    with store.read() as tx:
        assert [job.request_id for job in outside.running(tx)] == [request_id]
        use = use_by_org(tx, [])[ORG]
    assert (use.running, use.queued, use.worker_hours) == (0, 1, 0.0)
    QueueMeter(store).passed(0.1)
    assert {value for (name, labels), value in recorded.items() if ("state", "running") in labels} >= {1}
    (row,) = list(store.list_jobs(ORG, status=Status.RUNNING)[0])
    assert (row.request_id, row.open) == (request_id, False)


def test_code_of_the_version_before_leaves_a_run_alone(store, ray, listener):
    """It knows of no such runs, and judges by the other columns."""
    request_id = ray.begin()
    listener.run()
    with store.read() as tx:
        row = tx.execute(sa.select(jobs).where(jobs.c.request_id == request_id)).one()
    between_attempts, due = row.retry_at is not None, row.retry_at <= dt.datetime.now(dt.UTC) + dt.timedelta(days=365)
    assert (row.status, between_attempts, due) == ("RUNNING", True, False)


def test_taking_the_schema_back_takes_such_runs_away_and_leaves_jobs(store, ray, listener):
    request_id = ray.begin()
    ray.records[request_id].lines(0, [(1.0, "line")])
    listener.run()
    mine, _ = store.insert(spec("mine"), "queued")
    store.downgrade("0007")
    store.migrate()
    assert [job.request_id for job in store.list_jobs(ORG)[0]] == [mine.request_id]
    assert store.journal.log(request_id) == []


def test_a_backup_has_it_and_a_restored_one_has_ended(store, ray, listener, tmp_path):
    request_id = ray.begin()
    listener.run()
    back_up(store, tmp_path / "file")
    before = store.get(request_id)
    restore(store, tmp_path / "file", By("tester"), force=True)
    assert store.get(request_id) == before
    Listener(store, Outside()).run()  # another cluster
    assert store.get(request_id).error_code == "cluster_away"


def test_its_journal_goes_with_the_others_and_its_checkpoints_are_its_owner_s(store, ray, settings, tmp_path):
    past = JobStore(store.engine, lambda: dt.datetime.now(dt.UTC) - dt.timedelta(days=9))
    request_id = ray.begin()
    said, last = completed(MANIFEST)
    ray.records[request_id].end({"status": "COMPLETED"} | said, last)
    Listener(past, ray, past._now).run()
    ours = settings.model_copy(update={"storage_uri": str(tmp_path), "keep_journal_days": 1.0, "keep_checkpoints_days": 1.0})
    assert (remove_journals(ours, store), remove_checkpoints(ours, store)) == (1, 0)


def test_the_org_s_webhooks_are_told_of_its_end(store, ray, listener, settings, http):
    answer = http.post("/webhook/", json={"org": ORG, "url": "https://hooks.example.com/x", "events": ["job.failed"]})
    assert answer.status_code == 200
    request_id = ray.begin()
    ray.records[request_id].end(cut_short(DatasetError("no rows")), {})
    listener.run()
    with store.read() as tx:
        told = tx.execute(sa.text("SELECT request_id FROM webhook_messages")).scalars().all()
    assert told == [request_id]


def test_over_http_it_is_like_a_job_but_for_its_queue(store, ray, listener, settings, http):
    request_id, named = ray.begin(), {"org_id": ORG}
    ray.records[request_id].progress({"step": 1, "points": [{"step": 1, "loss": 2.0}]})
    listener.run()
    (listed,) = http.get("/job/list/", params=named).json()["jobs"]
    assert (listed["request_id"], listed["status"], listed["ray_job"]) == (request_id, "RUNNING", "my-run")
    assert listed["message"] == "Running outside the service, as Ray job my-run."
    assert http.get(f"/job/{request_id}/metrics").json() == {"points": [{"step": 1, "loss": 2.0}]}
    assert http.get(f"/job/{request_id}/artifacts").json() == {"files": []}
    refused = http.post(f"/job/{request_id}/resume")
    assert (refused.status_code, "ray job submit it again" in refused.json()["detail"]) == (409, True)
    assert http.post(f"/job/{request_id}/cancel").json()["status"] == "RUNNING"
    listener.run()
    assert ray.stopped == ["my-run"]
    http.headers["Authorization"] = f"Bearer {mint_token(settings, OTHER_ORG, 'stranger', 600)}"
    statuses = [
        http.get(f"/job/{request_id}").status_code,
        http.get(f"/job/{request_id}/logs").status_code,
        http.get(f"/job/{request_id}/events").status_code,
        http.post(f"/job/{request_id}/cancel").status_code,
        http.post(f"/job/{request_id}/resume").status_code,
    ]
    assert statuses == [404] * 5
    assert http.get("/job/list/", params={"org_id": OTHER_ORG}).json()["jobs"] == []
