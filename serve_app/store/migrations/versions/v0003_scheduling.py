"""What scheduling needs: priority, placement, faults by kind, time run, places in the queue, the cluster's capacity."""

import sqlalchemy as sa
from alembic import op

from serve_app.store.tables import UtcTime

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("waiting_since", UtcTime()))
        jobs.add_column(sa.Column("queue_position", sa.Integer()))
        jobs.add_column(sa.Column("num_nodes", sa.Integer()))
        jobs.add_column(sa.Column("actor_node", sa.String(length=64)))
        jobs.add_column(sa.Column("retry_at", UtcTime()))
        jobs.add_column(sa.Column("faults", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("losses", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("fault_step", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("ran_s", sa.Float(), nullable=False, server_default="0"))
        jobs.drop_column("resumed_at_attempt")
    op.execute("UPDATE jobs SET waiting_since = created_at")
    with op.batch_alter_table("jobs") as jobs:
        jobs.alter_column("waiting_since", existing_type=UtcTime(), nullable=False)
    op.create_table(
        "capacity",
        sa.Column("gpu_type", sa.String(length=64), nullable=False),
        sa.Column("max_workers", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("gpu_type", name=op.f("pk_capacity")),
    )


def downgrade() -> None:
    op.drop_table("capacity")
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("resumed_at_attempt", sa.Integer(), nullable=False, server_default="0"))
        for name in (
            *("ran_s", "fault_step", "losses", "faults", "retry_at"),
            *("actor_node", "num_nodes", "queue_position", "waiting_since", "priority"),
        ):
            jobs.drop_column(name)
