"""Metric points and log lines; what resume needs; indices for lists and quotas."""

import sqlalchemy as sa
from alembic import op

from serve_app.store.tables import UtcTime

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "job_metrics",
        sa.Column("request_id", sa.String(length=36), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("point", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", "step", name=op.f("pk_job_metrics")),
    )
    op.create_table(
        "job_logs",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("request_id", sa.String(length=36), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("time", UtcTime(), nullable=False),
        sa.Column("line", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_logs")),
    )
    op.create_index("ix_job_logs_job", "job_logs", ["request_id", "id"])
    op.create_index("ix_jobs_org_status", "jobs", ["org_id", "status", "seq"])
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("resumed_at_attempt", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("resumed_at_attempt")
    op.drop_index("ix_jobs_org_status", "jobs")
    op.drop_index("ix_job_logs_job", "job_logs")
    op.drop_table("job_logs")
    op.drop_table("job_metrics")
