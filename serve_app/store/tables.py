"""The tables. Times are UTC and aware on both databases."""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect


class UtcTime(sa.TypeDecorator[dt.datetime]):
    """An aware UTC time; SQLite stores it without its zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        utc = value.astimezone(dt.UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: Any, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        stored: dt.datetime = value
        return stored.replace(tzinfo=dt.UTC) if stored.tzinfo is None else stored.astimezone(dt.UTC)


def wire_time(value: dt.datetime) -> str:
    """RFC 3339, UTC, milliseconds."""
    return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")


metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)
BigId = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite counts up only in an INTEGER key

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("seq", BigId, primary_key=True, autoincrement=True),
    sa.Column("request_id", sa.String(36), nullable=False, unique=True),
    sa.Column("org_id", sa.String(36), nullable=False),
    sa.Column("experiment_name", sa.String(128), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("phase", sa.String(32), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    sa.Column("waiting_since", UtcTime, nullable=False),
    sa.Column("queue_position", sa.Integer),
    sa.Column("num_nodes", sa.Integer),
    sa.Column("actor_node", sa.String(64)),
    sa.Column("retry_at", UtcTime),
    sa.Column("faults", sa.Integer, nullable=False, server_default="0"),
    sa.Column("losses", sa.Integer, nullable=False, server_default="0"),
    sa.Column("fault_step", sa.Integer, nullable=False, server_default="0"),
    sa.Column("fault_cause", sa.String(64)),
    sa.Column("ran_s", sa.Float, nullable=False, server_default="0"),
    sa.Column("cancel_requested_at", UtcTime),
    sa.Column("yield_requested_at", UtcTime),
    sa.Column("worker_s", sa.Float, nullable=False, server_default="0"),
    sa.Column("journal_removed_at", UtcTime),
    sa.Column("checkpoints_removed_at", UtcTime),
    sa.Column("ray_job", sa.String(255)),
    sa.Column("ray_cursor", sa.String(64)),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("progress", sa.Float, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("total_steps", sa.Integer),
    sa.Column("epoch", sa.Float, nullable=False),
    sa.Column("eta_s", sa.Float),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("error_code", sa.String(64)),
    sa.Column("error_message", sa.Text),
    sa.Column("output_model_path", sa.Text),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("updated_at", UtcTime, nullable=False),
    sa.Column("started_at", UtcTime),
    sa.Column("completed_at", UtcTime),
    sa.Column("heartbeat_at", UtcTime),
)
OURS = jobs.c.ray_job.is_(None)  # not a run outside the service, which is shown alone
LIVE = sa.text("status IN ('QUEUED', 'RUNNING', 'COMPLETED') AND ray_job IS NULL")
sa.Index("uq_jobs_live_name", jobs.c.org_id, jobs.c.experiment_name, unique=True, sqlite_where=LIVE, postgresql_where=LIVE)
sa.Index("ix_jobs_status", jobs.c.status, jobs.c.seq)
ENDED = sa.text("completed_at IS NOT NULL")
sa.Index("ix_jobs_completed_at", jobs.c.completed_at, sqlite_where=ENDED, postgresql_where=ENDED)
sa.Index("ix_jobs_org", jobs.c.org_id, jobs.c.seq)
sa.Index("ix_jobs_org_status", jobs.c.org_id, jobs.c.status, jobs.c.seq)

job_events = sa.Table(
    "job_events",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    sa.Column("request_id", sa.String(36), nullable=False, index=True),
    sa.Column("time", UtcTime, nullable=False),
    sa.Column("kind", sa.String(64), nullable=False),
    sa.Column("message", sa.Text, nullable=False),
)

job_metrics = sa.Table(
    "job_metrics",
    metadata,
    sa.Column("request_id", sa.String(36), primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("point", sa.JSON, nullable=False),
)

job_logs = sa.Table(
    "job_logs",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    sa.Column("request_id", sa.String(36), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("time", UtcTime, nullable=False),
    sa.Column("line", sa.Text, nullable=False),
)
sa.Index("ix_job_logs_job", job_logs.c.request_id, job_logs.c.id)

secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("secret_id", sa.String(36), primary_key=True),
    sa.Column("org_id", sa.String(36), nullable=False, index=True),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("type", sa.String(16), nullable=False),
    sa.Column("ciphertext", sa.LargeBinary, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
)

webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("webhook_id", sa.String(36), primary_key=True),
    sa.Column("org_id", sa.String(36), nullable=False, index=True),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("events", sa.JSON, nullable=False),
    sa.Column("ciphertext", sa.LargeBinary, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
)

# What endpoints are still to be told. A row goes when it was delivered, or is given up.
webhook_messages = sa.Table(
    "webhook_messages",
    metadata,
    sa.Column("seq", BigId, primary_key=True, autoincrement=True),
    sa.Column("message_id", sa.String(64), nullable=False),
    sa.Column("webhook_id", sa.String(36), nullable=False, index=True),
    sa.Column("org_id", sa.String(36), nullable=False),
    sa.Column("request_id", sa.String(36), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("next_at", UtcTime, nullable=False, index=True),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("expires_at", UtcTime, nullable=False),
)

# What the dispatcher last saw of the cluster: the ingress refuses by it what could never run, without asking Ray.
capacity = sa.Table(
    "capacity",
    metadata,
    sa.Column("gpu_type", sa.String(64), primary_key=True),
    sa.Column("max_workers", sa.Integer, nullable=False),
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("org_id", sa.String(36), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("body_hash", sa.String(64), nullable=False),
    sa.Column("request_id", sa.String(36), nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
)

# The operator's switches. A row of this one means that no attempt starts.
pauses = sa.Table(
    "pauses",
    metadata,
    sa.Column("name", sa.String(16), primary_key=True),
    sa.Column("drains", sa.Boolean, nullable=False),
    sa.Column("since", UtcTime, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
)

# Limits of single organisations; null is what the settings say.
quotas = sa.Table(
    "quotas",
    metadata,
    sa.Column("org_id", sa.String(36), primary_key=True),
    sa.Column("max_running_jobs", sa.Integer),
    sa.Column("max_gpus", sa.Integer),
    sa.Column("max_queued_jobs", sa.Integer),
)

# Who did what. Triggers keep rows from being changed or removed.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    sa.Column("time", UtcTime, nullable=False, index=True),
    sa.Column("org_id", sa.String(36)),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("object", sa.Text),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("address", sa.String(64)),
)
sa.Index("ix_audit_org", audit.c.org_id, audit.c.id)

# One row: the oldest revision whose code may work on this schema.
oldest_code = sa.Table("oldest_code", metadata, sa.Column("revision", sa.String(32), primary_key=True))
