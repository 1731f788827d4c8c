"""A new version's schema under an old version's code, and the other way round."""

import datetime as dt
import uuid

import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory
from pydantic import ValidationError

from serve_app.job_actor import JobActor
from serve_app.lifecycle import Status
from serve_app.store import schema
from serve_app.store.jobs import JobStore
from serve_app.store.tables import UtcTime, jobs, oldest_code
from tests.conftest import DOCUMENTED, with_fields
from train_loop.spec import JobSpec

NEVER_CHANGED = {"audit"}


def pytest_generate_tests(metafunc):
    """Everything here holds on both databases."""
    if "store" in metafunc.fixturenames:
        metafunc.parametrize("store", ["sqlite", "postgresql"], indirect=True)


def revisions():
    """All of them, oldest first."""
    scripts: ScriptDirectory = schema._scripts()
    return [script.revision for script in scripts.walk_revisions()][::-1]


def at(store, revision):
    """The tables as that revision has them, in an empty store that is then brought to this version's schema."""
    store.downgrade("base")
    with store.write() as tx:
        schema.upgrade(tx, revision)
    with store.read() as connection:
        tables = schema.reflected(connection).tables
    store.migrate()
    return tables


def still_served(store):
    """The revisions whose code may work on this version's schema."""
    known = revisions()
    with store.read() as tx:
        oldest = tx.execute(sa.select(oldest_code.c.revision)).scalar_one()
    return known[known.index(oldest) : -1]


def some(column):
    """A value that such a column takes, another one each time."""
    kinds = {
        UtcTime: dt.datetime.now(dt.UTC),
        sa.JSON: {"a": [1]},
        sa.LargeBinary: b"x",
        sa.Boolean: True,
        sa.Float: 1.5,
        sa.Integer: uuid.uuid4().int % 2**31,
    }
    for kind, value in kinds.items():
        if isinstance(column.type, kind):
            return value
    return uuid.uuid4().hex[: column.type.length or 36]


def test_the_version_before_this_one_is_still_served(store):
    assert revisions()[-2] in still_served(store)


def test_code_of_an_earlier_version_writes_and_reads_its_tables_on_this_schema(store):
    for revision in still_served(store):
        tables = at(store, revision)
        assert "jobs" in tables
        for name, table in tables.items():
            if name in ("alembic_version", "oldest_code"):
                continue
            keys = list(table.primary_key)
            if [isinstance(key.type, sa.Integer) for key in keys] == [True]:
                keys = []  # the database counts it up
            given = {c.name: some(c) for c in table.columns if c in keys or not c.primary_key}
            with store.write() as tx:
                tx.execute(sa.insert(table).values(**given))
            with store.read() as tx:
                row = tx.execute(sa.select(table)).one()._mapping
            assert {k: row[k] for k in given} == given, f"{name} of {revision}"
            if name not in NEVER_CHANGED:
                changed = {c.name: some(c) for c in table.columns if not c.primary_key}
                with store.write() as tx:
                    tx.execute(sa.update(table).values(**changed))
                    assert tx.execute(sa.delete(table)).rowcount == 1


def test_a_job_that_an_earlier_version_took_and_ran_is_this_version_s_too(store):
    for revision in still_served(store):
        old = at(store, revision)["jobs"]
        mine = store.insert(JobSpec.model_validate(DOCUMENTED), "queued")[0]
        theirs = str(uuid.uuid4())
        with store.write() as tx:
            row = tx.execute(sa.select(old).where(old.c.request_id == mine.request_id)).one()._mapping
            known = {k: v for k, v in row.items() if k != "seq"}
            tx.execute(sa.insert(old).values(**known | {"request_id": theirs, "experiment_name": "theirs"}))
        assert store.start_attempt(theirs, 0, 1).open
        with store.write() as tx:  # its actor, of the earlier version, writes on
            tx.execute(sa.update(old).where(old.c.request_id == theirs).values(step=3, ran_s=9.0, heartbeat_at=mine.created_at))
        assert store.get(theirs).step == 3
        store.ask_to_yield(theirs, 1, "asked")
        assert store.give_back(theirs, 1).status is Status.QUEUED
        assert store.start_attempt(theirs, 1, 1).attempt == 2


def test_a_later_schema_is_worked_on_where_it_says_that_this_version_may(store):
    def as_if_at(revision, oldest):
        with store.write() as tx:
            tx.execute(sa.text("UPDATE alembic_version SET version_num = :to"), {"to": revision})
            tx.execute(sa.update(oldest_code).values(revision=oldest))

    as_if_at("9999", schema.head())
    store.require_current()
    store.migrate()  # as `tuneyard up` does: nothing is to be done
    with store.read() as tx:
        assert schema.revision_of(tx) == "9999"
    as_if_at("9999", "9998")
    for refused in (store.require_current, store.migrate):
        with pytest.raises(RuntimeError, match="of a later version"):
            refused()
    as_if_at(schema.head(), "0004")


def test_a_job_that_a_later_version_took_runs_without_what_this_one_does_not_know(store, settings):
    job = store.insert(JobSpec.model_validate(DOCUMENTED), "queued")[0]
    later = with_fields(
        job.spec,
        {
            "new_section": {"a": 1},
            "train_config.hyperparameters.new": None,
            "dataset_config.split.new": 1,
            "train_config.adapter_config.new.deep": [2],
        },
    )
    with store.write() as tx:
        tx.execute(sa.update(jobs).values(spec=later))
    store.start_attempt(job.request_id, 0, 1)
    actor = JobActor.__new__(JobActor)  # without Ray and its threads
    actor.open(settings, store, job.request_id, 1, "node")
    assert actor.spec == JobSpec.model_validate(DOCUMENTED)
    actor.report()
    (told,) = [e.message for e in store.journal.events(job.request_id) if e.kind == "unknown_fields"]
    for name in (
        "new_section",
        "train_config.hyperparameters.new",
        "dataset_config.split.new",
        "train_config.adapter_config.new",
    ):
        assert name in told
    with store.write() as tx:
        tx.execute(sa.update(jobs).values(spec=with_fields(later, {"infra_config.node_count": "many"})))
    with pytest.raises(ValidationError):
        actor.open(settings, store, job.request_id, 1, "node")


def test_work_done_before_it_was_counted_is_counted(store):
    at(store, "0004")
    job = store.insert(JobSpec.model_validate(with_fields(DOCUMENTED, {"infra_config.node_count": 2})), "queued")[0]
    store.start_attempt(job.request_id, 0, 1)
    store.report(job.request_id, 1, ran_s=10.0)
    store.downgrade("0004")
    store.migrate()
    assert store.get(job.request_id).worker_s == 10.0 * 2  # on one of its two nodes


def test_only_an_older_schema_is_to_be_upgraded(store):
    store.downgrade("0004")
    with pytest.raises(RuntimeError, match="run tuneyard db upgrade"):
        JobStore.require_current(store)
