"""The store in a file and back again, from and into both kinds of database."""

import datetime as dt
import json
import os
import threading

import pytest
import sqlalchemy as sa
import zstandard

from serve_app.backup import BackupError, back_up, restore
from serve_app.lifecycle import Status
from serve_app.secrets import SecretVault
from serve_app.store import schema
from serve_app.store.audit import By, read_entries
from serve_app.store.jobs import JobStore
from serve_app.store.journal import Notes
from serve_app.store.quotas import Quota, all_quotas, set_quota
from serve_app.store.tables import metadata
from serve_app.webhooks import Webhooks
from tests.conftest import CANARY, DOCUMENTED, ORG, with_fields
from train_loop.spec import JobSpec

ME = By("admin:tester")


def pytest_generate_tests(metafunc):
    """From both databases, and into both."""
    for fixture in {"store", "other"} & set(metafunc.fixturenames):
        metafunc.parametrize(fixture, ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def other(request, tmp_path):
    """Another database, without any tables."""
    if request.param == "sqlite":
        yield (there := JobStore.open(f"sqlite:///{tmp_path}/other.db"))
        there.engine.dispose()
        return
    url = sa.make_url(request.getfixturevalue("postgres"))
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text("CREATE DATABASE other"))
    yield (there := JobStore.open(url.set(database="other").render_as_string(hide_password=False)))
    there.engine.dispose()
    with admin.connect() as connection:
        connection.execute(sa.text("DROP DATABASE other"))
    admin.dispose()


def spec(name):
    return JobSpec.model_validate(with_fields(DOCUMENTED, {"experiment_name": name}))


def filled(store, settings):
    """A store with something in every table; what is in it."""
    done, waits = (store.insert(spec(name), "queued", name, "hash", by=ME)[0] for name in ("done", "waits"))
    vault = SecretVault.from_settings(store, settings)
    Webhooks.of(store, vault, settings).create(ORG, "https://hooks.example.com/x", ["job.completed"], ME)
    store.start_attempt(done.request_id, 0, 2)
    notes = Notes([("a", "grüße 🙂")], [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}], [(0, 1.5, "line"), (1, 2.5, "")])
    store.report(done.request_id, 1, notes, step=2, metrics={"last": {"loss": 2.5}}, ran_s=3.0)
    store.finish(done.request_id, 1, Status.COMPLETED, message="ok")
    keys = {"access_key_id": "AK", "secret_access_key": CANARY}
    vault.create(ORG, "keys", "aws", keys, ME)
    store.acquire_lease("dispatcher", "me", -1)
    store.set_capacity({"h100": 8})
    with store.write() as tx:
        set_quota(tx, ORG, Quota(max_gpus=3))
        tx.execute(sa.insert(metadata.tables["pauses"]).values(name="dispatch", drains=True, since=done.created_at, who="me"))
    return contents(store), waits


def contents(store):
    """Every row but the audit's and what is only true of a running cluster."""
    tables = [t for name, t in metadata.tables.items() if name not in ("audit", "leases", "capacity")]
    with store.read() as tx:
        return {t.name: sorted(map(repr, tx.execute(sa.select(t)))) for t in tables}


def lines(path):
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        return stream.read().splitlines(keepends=True)


def rewrite(path, kept):
    path.write_bytes(zstandard.compress(b"".join(kept)))


def test_all_comes_back_in_either_kind_of_database_and_goes_on(store, other, settings, tmp_path):
    held, waits = filled(store, settings)
    assert all(held.values()), held
    file = tmp_path / "backup.jsonl.zst"
    counts = back_up(store, file)
    assert os.stat(file).st_mode & 0o777 == 0o600
    assert CANARY.encode() not in b"".join(lines(file))
    assert restore(other, file, ME) == counts
    assert (contents(other), counts["jobs"], counts["job_logs"]) == (held, 2, 2)
    other.require_current()
    with other.read() as tx:
        assert [e.action for e in read_entries(tx)] == ["job.submit", "job.submit", "webhook.add", "secret.add", "admin.restore"]
        assert all_quotas(tx) == {ORG: Quota(max_gpus=3)}
    (secret,) = SecretVault.from_settings(other, settings).list(ORG)
    assert SecretVault.from_settings(other, settings).reveal(ORG, secret.secret_id)["secret_access_key"] == CANARY
    # Numbers go on after those that there are; what was there is found by its idempotency key.
    assert other.replay(ORG, "waits", "hash").request_id == waits.request_id
    assert other.insert(spec("new"), "queued")[0].seq == waits.seq + 1
    (event,) = other.journal.events(other.list_jobs(ORG)[0][0].request_id)
    assert event.id > max(e.id for e in store.journal.events(waits.request_id))


def test_a_backup_is_of_one_moment_though_jobs_are_written_meanwhile(store, tmp_path, monkeypatch):
    """Every job has its events, whatever is added while tables are read one after the other."""
    monkeypatch.setattr("serve_app.backup.BATCH", 2)
    for i in range(10):
        store.insert(spec(f"before-{i}"), "queued")
    stop, added = threading.Event(), []

    def write():
        while not stop.is_set():
            added.append(store.insert(spec(f"during-{len(added)}"), "queued")[0].request_id)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not added:
            stop.wait(0.01)
        counts = back_up(store, tmp_path / "backup")
        mid = len(added)
        while len(added) == mid:
            stop.wait(0.01)
    finally:
        stop.set()
        writer.join()
    assert 10 < counts["jobs"] == counts["job_events"] <= 10 + len(added)


def test_a_backup_of_an_earlier_version_gets_this_version_s_schema(store, other, tmp_path):
    store.insert(spec("old"), "queued")
    file = tmp_path / "backup"
    back_up(store, file)
    head, *rest = lines(file)
    earlier = JobStore.open(f"sqlite:///{tmp_path}/earlier.db")
    with earlier.write() as tx:
        schema.upgrade(tx, "0004")
        known = schema.reflected(tx).tables
    old = []
    for line in map(json.loads, rest):  # as that version would have written it
        if "table" not in line:
            line["rows"] = {name: count for name, count in line["rows"].items() if name in known}
        elif line["table"] in known:
            line["rows"] = [{k: v for k, v in row.items() if k in known[line["table"]].c} for row in line["rows"]]
        else:
            continue
        old.append(json.dumps(line).encode() + b"\n")
    rewrite(file, [json.dumps(json.loads(head) | {"schema": "0004"}).encode() + b"\n", *old])
    restore(other, file, ME)
    other.require_current()
    assert [job.worker_s for job in other.list_jobs(ORG)[0]] == [0.0]


def test_what_is_there_is_not_replaced_unless_that_is_asked_for(store, settings, tmp_path):
    held, _ = filled(store, settings)
    file = tmp_path / "backup"
    back_up(store, file)
    with pytest.raises(BackupError, match="exists already"):
        back_up(store, file)
    late = store.insert(spec("late"), "queued")[0]
    with pytest.raises(BackupError, match=r"isn't empty.*jobs"):
        restore(store, file, ME)
    assert store.get(late.request_id) == late
    store.acquire_lease("dispatcher", "me", 60)
    with pytest.raises(BackupError, match="stop the service first"):
        restore(store, file, ME, force=True)
    store.acquire_lease("dispatcher", "me", -1)
    restore(store, file, ME, force=True)
    assert contents(store) == held
    assert store.get(late.request_id) is None


@pytest.mark.parametrize("damage", ["cut off", "without its end", "a bit", "no backup", "a later schema"])
def test_a_file_that_is_not_whole_changes_nothing(store, settings, tmp_path, damage):
    held, _ = filled(store, settings)
    file = tmp_path / "backup"
    back_up(store, file)
    match damage:
        case "cut off":
            file.write_bytes(file.read_bytes()[:-20])
        case "without its end":
            rewrite(file, lines(file)[:-1])
        case "a bit":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        case "no backup":
            file.write_bytes(b"PK\x03\x04 something else")
        case "a later schema":
            first, *rest = lines(file)
            rewrite(file, [json.dumps(json.loads(first) | {"schema": "9999"}).encode() + b"\n", *rest])
    with pytest.raises(BackupError):
        restore(store, file, ME, force=True)
    assert contents(store) == held


def test_a_loss_that_is_no_number_comes_from_sqlite_into_postgresql(tmp_path, settings, postgres):
    laptop = JobStore.open(f"sqlite:///{tmp_path}/laptop.db")
    laptop.migrate()
    job = laptop.insert(spec("diverged"), "queued")[0]
    laptop.start_attempt(job.request_id, 0, 1)
    laptop.report(job.request_id, 1, Notes(points=[{"step": 1, "loss": float("nan")}]))
    back_up(laptop, tmp_path / "backup")
    cluster = JobStore.open(postgres)
    try:
        restore(cluster, tmp_path / "backup", ME)
        assert cluster.journal.points(job.request_id) == [{"step": 1, "loss": None}]
        assert cluster.get(job.request_id).created_at == job.created_at > dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    finally:
        cluster.downgrade(schema.BASE)
        cluster.engine.dispose()
