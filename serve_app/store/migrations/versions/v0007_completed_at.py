"""Jobs by when they ended: a dispatcher that starts reads those of the last hours, however many there are."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

ENDED = sa.text("completed_at IS NOT NULL")


def upgrade() -> None:
    op.create_index("ix_jobs_completed_at", "jobs", ["completed_at"], sqlite_where=ENDED, postgresql_where=ENDED)


def downgrade() -> None:
    op.drop_index("ix_jobs_completed_at", "jobs")
