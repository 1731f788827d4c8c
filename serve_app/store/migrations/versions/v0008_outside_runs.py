"""Runs that `ray job submit` started outside the service: rows of jobs that take no name."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

NAME = ["org_id", "experiment_name"]
BEFORE = sa.text("status IN ('QUEUED', 'RUNNING', 'COMPLETED')")
LIVE = sa.text("status IN ('QUEUED', 'RUNNING', 'COMPLETED') AND ray_job IS NULL")


def upgrade() -> None:
    op.drop_index("uq_jobs_live_name", "jobs")
    op.add_column("jobs", sa.Column("ray_job", sa.String(length=255)))
    op.add_column("jobs", sa.Column("ray_cursor", sa.String(length=64)))
    op.create_index("uq_jobs_live_name", "jobs", NAME, unique=True, sqlite_where=LIVE, postgresql_where=LIVE)


def downgrade() -> None:
    outside = "SELECT request_id FROM jobs WHERE ray_job IS NOT NULL"
    for table in ("job_events", "job_metrics", "job_logs"):
        op.execute(f"DELETE FROM {table} WHERE request_id IN ({outside})")
    op.execute("DELETE FROM jobs WHERE ray_job IS NOT NULL")  # the version before would take them for its own
    op.drop_index("uq_jobs_live_name", "jobs")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("ray_cursor")
        jobs.drop_column("ray_job")
    op.create_index("uq_jobs_live_name", "jobs", NAME, unique=True, sqlite_where=BEFORE, postgresql_where=BEFORE)
