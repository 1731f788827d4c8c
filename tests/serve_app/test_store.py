"""The job store on real SQLite and real PostgreSQL."""

import datetime as dt
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from serve_app.lifecycle import FINAL, TRANSITIONS, IllegalTransition, Status, check
from serve_app.settings import Settings
from serve_app.store.jobs import AlreadyFinal, IdempotencyMismatch, JobStore, NameTaken, QueueFull, StaleAttempt, utc_now
from serve_app.store.journal import Notes
from serve_app.store.tables import metadata
from tests.conftest import DOCUMENTED, ORG, OTHER_ORG, with_fields
from train_loop.errors import Cause
from train_loop.spec import JobSpec


def pytest_generate_tests(metafunc):
    """Everything here holds on both databases."""
    if "store" in metafunc.fixturenames:
        metafunc.parametrize("store", ["sqlite", "postgresql"], indirect=True)


def spec(name="job", org=ORG):
    return JobSpec.model_validate(with_fields(DOCUMENTED, {"experiment_name": name, "org": org}))


def submit(store, name="job", **more):
    return store.insert(spec(name), "queued", **more)[0]


def test_migrations_make_exactly_the_tables_of_the_code(store):
    with store.engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), metadata)
    assert [d for d in found if "alembic_version" not in str(d)] == []


def test_migrations_go_down_and_up_again_over_rows(store):
    job = submit(store)
    store.downgrade("0001")
    with pytest.raises(RuntimeError, match="tuneyard db upgrade"):
        store.require_current()
    store.migrate()
    store.require_current()
    assert store.get(job.request_id) == job
    with pytest.raises(NameTaken):  # the index over live names is there again
        submit(store)


def test_a_service_on_several_machines_refuses_sqlite(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="TUNEYARD_DATABASE_URL"):
        Settings(embedded=False).require_shared_store(1)
    with pytest.raises(RuntimeError, match="SQLite"):
        Settings(embedded=True).require_shared_store(2)
    Settings(embedded=True).require_shared_store(1)
    Settings(database_url="postgresql+psycopg://db/x").require_shared_store(5)


def test_log_lines_of_a_job_are_bounded_and_the_newest_stay(store, monkeypatch):
    monkeypatch.setattr("serve_app.store.journal.MAX_LOG_LINES", 3)
    job = submit(store)
    store.start_attempt(job.request_id, 0, 1)
    for i in range(5):
        store.report(job.request_id, 1, Notes(lines=[(0, float(i), f"line {i}")]))
    assert [entry.line for entry in store.journal.log(job.request_id)] == ["line 2", "line 3", "line 4"]


def test_a_job_lives_from_queued_to_completed(store):
    job = submit(store)
    assert (job.status, job.attempt, store.queue_positions([job])[job.request_id]) == (Status.QUEUED, 0, 1)
    started = store.start_attempt(job.request_id, 0, 1)
    assert (started.status, started.attempt) == (Status.RUNNING, 1)
    store.report(job.request_id, 1, phase="training", step=3, progress=0.3, metrics={"last": {"loss": 1.0}})
    done = store.finish(job.request_id, 1, Status.COMPLETED, message="ok", output_model_path="s3://b/a")
    again = store.finish(job.request_id, 1, Status.COMPLETED, message="ok", output_model_path="s3://b/a")
    assert done == again
    assert (done.step, done.output_model_path, done.metrics) == (3, "s3://b/a", {"last": {"loss": 1.0}})
    assert done.completed_at >= done.started_at >= done.created_at
    assert [e.kind for e in store.journal.events(job.request_id)] == ["queued", "started", "completed"]


def test_the_work_of_the_last_hours_is_that_of_every_job_that_had_an_attempt_then(store):
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    clock = [start]
    store = JobStore(store.engine, lambda: clock[0])
    names = ("ended-long-ago", "ended", "never-began", "canceled-in-the-queue", "under-way", "between-two", "given-back")
    ids = {name: submit(store, name).request_id for name in names}
    store.start_attempt(ids["ended-long-ago"], 0, 1)
    store.finish(ids["ended-long-ago"], 1, Status.COMPLETED, message="ok")
    since = clock[0] = start + dt.timedelta(hours=1)
    for name in ("ended", "under-way", "between-two", "given-back"):
        store.start_attempt(ids[name], 0, 1)
    store.finish(ids["ended"], 1, Status.FAILED, message="no")
    store.request_cancel(ids["canceled-in-the-queue"])
    store.record_fault(ids["between-two"], 1, Cause.WORKER_DIED, "died.")
    store.ask_to_yield(ids["given-back"], 1, "asked")
    store.give_back(ids["given-back"], 1)
    worked = {"ended", "under-way", "between-two", "given-back"}
    assert {job.request_id for job in store.worked_since(since)} == {ids[name] for name in worked}
    assert store.worked_since(since + dt.timedelta(seconds=1)) == []


def test_an_older_attempt_can_not_write(store):
    job = submit(store)
    store.start_attempt(job.request_id, 0, 1)
    store.record_fault(job.request_id, 1, Cause.WORKER_DIED, "it died.")
    store.start_attempt(job.request_id, 1, 1)
    with pytest.raises(StaleAttempt):
        store.report(job.request_id, 1, step=5)
    with pytest.raises(StaleAttempt):
        store.finish(job.request_id, 1, Status.COMPLETED, message="late")
    assert store.get(job.request_id).attempt == 2
    assert store.get(job.request_id).step == 0


def test_a_dispatcher_that_slept_can_not_start_an_attempt_again(store):
    job = submit(store)
    for attempt in (0, 1):
        store.start_attempt(job.request_id, attempt, 1)
        store.record_fault(job.request_id, attempt + 1, Cause.PREEMPTED, "gone.")
    assert store.start_attempt(job.request_id, 0, 1) is None
    assert store.get(job.request_id).attempt == 2


def test_a_fault_closes_the_attempt_and_says_what_comes(store):
    job = submit(store)
    store.start_attempt(job.request_id, 0, 2)
    store.report(job.request_id, 1, step=4)
    closed = store.record_fault(job.request_id, 1, Cause.WORKER_DIED, "A worker died.")
    assert (closed.status, closed.open, closed.faults, closed.fault_step) == (Status.RUNNING, False, 1, 4)
    assert closed.message == "Attempt 1 ended: A worker died. Retry 1 of 3."
    assert [j.request_id for j in store.waiting(10)] == [job.request_id]
    for write in (
        lambda: store.report(job.request_id, 1),
        lambda: store.finish(job.request_id, 1, Status.COMPLETED, message="x"),
    ):
        with pytest.raises(StaleAttempt):
            write()
    again = store.start_attempt(job.request_id, 1, 1)
    assert (again.attempt, again.retry_at, again.num_workers) == (2, None, 2)
    assert store.waiting(10) == []


def test_out_of_memory_at_the_same_step_again_fails_the_job_with_the_advice(store):
    job = submit(store)
    for attempt, step, retried in [(1, 4, True), (2, 6, True), (3, 6, False)]:
        store.start_attempt(job.request_id, attempt - 1, 1)
        store.report(job.request_id, attempt, step=step)
        ended = store.record_fault(job.request_id, attempt, Cause.OUT_OF_MEMORY, "Memory ran out. Lower something.")
        assert (ended.status is Status.RUNNING) == retried
    assert ended.error_code == "out_of_memory"
    assert ended.error_message.startswith("Memory ran out. Lower something. Giving up: ")
    store.resume(job.request_id)
    store.start_attempt(job.request_id, 3, 1)
    assert store.record_fault(job.request_id, 4, Cause.OUT_OF_MEMORY, "Memory ran out.").status is Status.RUNNING


def test_too_many_faults_fail_the_job_with_the_cause_and_lost_machines_do_not(store):
    job = submit(store)
    for attempt in range(1, 7):
        store.start_attempt(job.request_id, attempt - 1, 1)
        assert store.record_fault(job.request_id, attempt, Cause.NODE_LOST, "gone.").status is Status.RUNNING
    for attempt in range(7, 11):
        store.start_attempt(job.request_id, attempt - 1, 1)
        failed = store.record_fault(job.request_id, attempt, Cause.HANG, "No step for an hour.")
    assert (failed.status, failed.error_code) == (Status.FAILED, "hang")
    assert failed.error_message == "No step for an hour. Giving up after 4 faults (infra_config.max_retries = 3)."
    assert store.resume(job.request_id).faults == 0


def test_an_attempt_that_got_less_far_than_one_before_is_no_progress(store):
    job = submit(store)
    for attempt, step in enumerate([6, 5, 6, 5], 1):
        store.start_attempt(job.request_id, attempt - 1, 1)
        store.report(job.request_id, attempt, step=step)
        closed = store.record_fault(job.request_id, attempt, Cause.NODE_LOST, "gone.")
    assert (closed.losses, closed.fault_step) == (4, 6)  # in a row without a step beyond the sixth


def test_want_of_room_is_no_fault_and_leaves_the_job_its_place_and_its_record(store):
    job = submit(store)
    store.start_attempt(job.request_id, 0, 1)
    before = store.record_fault(job.request_id, 1, Cause.OUT_OF_MEMORY, "Memory ran out.")
    for attempt in range(2, 50):
        store.start_attempt(job.request_id, attempt - 1, 1)
        closed = store.record_fault(job.request_id, attempt, Cause.NO_ROOM, "No room for 2 workers.")
    kept = ("status", "faults", "losses", "fault_step", "fault_cause", "waiting_since")
    assert [getattr(closed, name) for name in kept] == [getattr(before, name) for name in kept]
    assert closed.retry_at > before.retry_at
    assert closed.message == "Attempt 49 ended: No room for 2 workers. The job is back in the queue; that counts for nothing."


def test_what_has_waited_longest_is_seen_behind_any_number_of_higher_ones(store):
    old = submit(store, "old").request_id
    soon = [with_fields(DOCUMENTED, {"experiment_name": f"u{i}", "infra_config.priority": 5}) for i in range(3)]
    urgent = [store.insert(JobSpec.model_validate(job), "queued")[0].request_id for job in soon]
    assert [j.request_id for j in store.waiting(1)] == [old, urgent[0]]


def test_the_queue_shows_each_org_by_its_foremost_jobs(store):
    names = [submit(store, f"a{i}").request_id for i in range(4)]
    other = store.insert(spec("b", OTHER_ORG), "queued")[0].request_id
    assert [j.request_id for j in store.waiting(2)] == [*names[:2], other]
    store.set_queue_positions({names[0]: 3, names[1]: 7})
    jobs = [store.get(r) for r in names]
    assert store.queue_positions(jobs) == {names[0]: 3, names[1]: 7, names[2]: 3, names[3]: 4}


def test_only_one_of_many_starts_an_attempt(store):
    job = submit(store)
    won = []
    threads = [threading.Thread(target=lambda: won.append(store.start_attempt(job.request_id, 0, 1))) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len([w for w in won if w is not None]) == 1


def test_cancel(store):
    queued, running, done = (submit(store, n) for n in ("a", "b", "c"))
    assert store.request_cancel(queued.request_id).status is Status.CANCELED
    assert store.request_cancel(queued.request_id).status is Status.CANCELED
    assert store.start_attempt(queued.request_id, 0, 1) is None
    store.start_attempt(running.request_id, 0, 1)
    assert store.request_cancel(running.request_id).status is Status.RUNNING
    assert store.report(running.request_id, 1, step=1).cancel_requested
    store.start_attempt(done.request_id, 0, 1)
    store.finish(done.request_id, 1, Status.FAILED, message="x")
    with pytest.raises(AlreadyFinal):
        store.request_cancel(done.request_id)


def test_names_are_unique_among_live_jobs_of_an_org(store):
    first = submit(store, "same")
    with pytest.raises(NameTaken) as caught:
        submit(store, "same")
    assert caught.value.other == first.request_id
    store.insert(spec("same", OTHER_ORG), "queued")
    store.request_cancel(first.request_id)
    submit(store, "same")


@pytest.mark.parametrize("resumes", [False, True])
def test_a_name_whose_holder_ends_while_it_is_looked_up_is_free(store, monkeypatch, resumes):
    mine = submit(store, "same") if resumes else None
    if mine:
        store.request_cancel(mine.request_id)
    first = submit(store, "same")
    holder = store._holder

    def ends_just_before(*arguments):
        store.request_cancel(first.request_id)
        return holder(*arguments)

    monkeypatch.setattr(store, "_holder", ends_just_before)
    got = store.resume(mine.request_id) if mine else submit(store, "same")
    assert (got.status, store.get(first.request_id).status) == (Status.QUEUED, Status.CANCELED)


def test_a_full_queue_takes_no_resumed_job(store):
    ended = submit(store, "ended")
    store.request_cancel(ended.request_id)
    submit(store, "waiting")
    with pytest.raises(QueueFull):
        store.resume(ended.request_id, max_queued=1)
    assert store.resume(ended.request_id, max_queued=2).status is Status.QUEUED


def test_many_submissions_at_once_fill_the_queue_and_no_more(store):
    sa.event.listen(store.engine, "commit", lambda _: time.sleep(0.05))  # so that they overlap

    def ask(i):
        try:
            return store.insert(spec(f"job-{i}"), "queued", max_queued=4)
        except QueueFull:
            return None

    with ThreadPoolExecutor(10) as pool:
        made = [job for job in pool.map(ask, range(10)) if job is not None]
    assert len(made) == len(store.list_jobs(ORG, status=Status.QUEUED)[0]) == 4


def test_an_idempotency_key_gives_the_same_job_again(store):
    one, created = store.insert(spec(), "queued", "key", "hash")
    two, again = store.insert(spec(), "queued", "key", "hash")
    assert (one.request_id, created, again) == (two.request_id, True, False)
    with pytest.raises(IdempotencyMismatch):
        store.insert(spec("other"), "queued", "key", "another hash")
    theirs, created = store.insert(spec(org=OTHER_ORG), "queued", "key", "another hash")  # whose keys are their own
    assert (created, theirs.org_id, theirs.request_id != one.request_id) == (True, OTHER_ORG, True)


def test_an_idempotency_key_is_free_again_after_a_day(store, monkeypatch):
    first = store.insert(spec(), "queued", "key", "hash")[0]
    monkeypatch.setattr(store, "_now", lambda: utc_now() + dt.timedelta(hours=23, minutes=59))
    assert store.insert(spec(), "queued", "key", "hash")[0].request_id == first.request_id
    monkeypatch.setattr(store, "_now", lambda: utc_now() + dt.timedelta(hours=24, minutes=1))
    assert store.replay(ORG, "key", "hash") is None
    again, created = store.insert(spec("other"), "queued", "key", "another hash")
    assert (created, again.request_id != first.request_id) == (True, True)
    assert store.replay(ORG, "key", "another hash").request_id == again.request_id


def test_pages_are_stable_under_inserts(store):
    names = [f"job-{i}" for i in range(7)]
    for name in names:
        submit(store, name)
    page, cursor = store.list_jobs(ORG, limit=3)
    submit(store, "late")
    seen = [j.experiment_name for j in page]
    while cursor:
        page, cursor = store.list_jobs(ORG, limit=3, cursor=cursor)
        seen += [j.experiment_name for j in page]
    assert seen == names[::-1]
    assert store.list_jobs(OTHER_ORG) == ([], None)
    assert len(store.list_jobs(ORG, status=Status.QUEUED)[0]) == 8
    ended = store.list_jobs(ORG, experiment_name="job-3")[0]
    store.request_cancel(ended[0].request_id)
    assert [j.experiment_name for j in store.list_jobs(ORG, status=Status.CANCELED)[0]] == ["job-3"]
    assert len(store.list_jobs(ORG, status=Status.QUEUED)[0]) == 7


def test_the_lease_has_one_owner_at_a_time(store):
    assert store.acquire_lease("d", "one", 60) == 1
    assert store.acquire_lease("d", "two", 60) is None
    assert store.acquire_lease("d", "one", -1) == 1
    assert store.acquire_lease("d", "two", 60) == 2


def test_nothing_leaves_a_final_state():
    for old in Status:
        for new in Status:
            if new in TRANSITIONS[old]:
                check(old, new)
            else:
                with pytest.raises(IllegalTransition):
                    check(old, new)
    assert {Status.COMPLETED, Status.FAILED, Status.CANCELED} == FINAL


def test_sqlite_runs_in_wal_mode(tmp_path):
    store = JobStore.open(f"sqlite:///{tmp_path}/jobs.db")
    with store.engine.connect() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
