"""What an operator needs: pauses, quotas of single orgs, the audit log, jobs that give way, work done, what was removed."""

import sqlalchemy as sa
from alembic import op

from serve_app.store.tables import UtcTime

revision = "0005"
down_revision = "0004"

NEVER = "rows of the audit log are never changed or removed"
SQLITE = [
    f"""CREATE TRIGGER audit_no_{change.lower()} BEFORE {change} ON audit BEGIN SELECT RAISE(ABORT, '{NEVER}'); END"""
    for change in ("UPDATE", "DELETE")
]
POSTGRESQL = [
    f"""CREATE OR REPLACE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN RAISE EXCEPTION '{NEVER}'; END $$""",
    """CREATE TRIGGER audit_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
    FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()""",
]
BATCH = 500


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("yield_requested_at", UtcTime()))
        jobs.add_column(sa.Column("worker_s", sa.Float(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("journal_removed_at", UtcTime()))
        jobs.add_column(sa.Column("checkpoints_removed_at", UtcTime()))
    _count_work()
    op.create_table(
        "pauses",
        sa.Column("name", sa.String(length=16), nullable=False),
        sa.Column("drains", sa.Boolean(), nullable=False),
        sa.Column("since", UtcTime(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_pauses")),
    )
    op.create_table(
        "quotas",
        sa.Column("org_id", sa.String(length=36), nullable=False),
        sa.Column("max_running_jobs", sa.Integer()),
        sa.Column("max_gpus", sa.Integer()),
        sa.Column("max_queued_jobs", sa.Integer()),
        sa.PrimaryKeyConstraint("org_id", name=op.f("pk_quotas")),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("time", UtcTime(), nullable=False),
        sa.Column("org_id", sa.String(length=36)),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("object", sa.Text()),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("address", sa.String(length=64)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index(op.f("ix_audit_time"), "audit", ["time"])
    op.create_index("ix_audit_org", "audit", ["org_id", "id"])
    for statement in SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRESQL:
        op.execute(statement)
    # Whoever changes the schema in a way that this code can't work on writes a later revision here.
    oldest = op.create_table(
        "oldest_code",
        sa.Column("revision", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("revision", name=op.f("pk_oldest_code")),
    )
    op.bulk_insert(oldest, [{"revision": "0004"}])


def _count_work() -> None:
    """Of the jobs that there are, what is known: the time since submit or resume, by the workers of the last attempt."""
    jobs = sa.table(
        "jobs",
        *(sa.column("seq"), sa.column("ran_s"), sa.column("num_nodes"), sa.column("worker_s")),
        sa.column("spec", sa.JSON()),
    )
    last = 0
    while (
        found := op.get_bind()
        .execute(sa.select(jobs).where(jobs.c.ran_s > 0, jobs.c.seq > last).order_by(jobs.c.seq).limit(BATCH))
        .all()
    ):
        for job in found:
            infra = job.spec["infra_config"]
            worker_s = job.ran_s * infra["gpu_count"] * (job.num_nodes or infra["node_count"])
            op.execute(sa.update(jobs).where(jobs.c.seq == job.seq).values(worker_s=worker_s))
        last = found[-1].seq


def downgrade() -> None:
    for name in ("oldest_code", "audit", "quotas", "pauses"):
        op.drop_table(name)
    if op.get_bind().dialect.name != "sqlite":
        op.execute("DROP FUNCTION audit_is_append_only()")
    with op.batch_alter_table("jobs") as jobs:
        for name in ("checkpoints_removed_at", "journal_removed_at", "worker_s", "yield_requested_at"):
            jobs.drop_column(name)
