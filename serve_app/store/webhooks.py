"""Webhooks in the store: who is to be told of an org's jobs, and what is still to be told to whom.

A message is written in the transaction that ends its job, so none is lost; it is gone once it was delivered or given up.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serve_app.lifecycle import Status
from serve_app.store.audit import By, add_entry
from serve_app.store.journal import add_event
from serve_app.store.tables import jobs, webhook_messages, webhooks, wire_time

if TYPE_CHECKING:
    from serve_app.store.jobs import Job, JobStore

EVENTS = {
    Status.COMPLETED: "job.completed",
    Status.FAILED: "job.failed",
    Status.CANCELED: "job.canceled",
}
MAX_DUE = 1000  # endpoints looked at in a pass


@dataclass(frozen=True)
class Webhook:
    """An endpoint of an org. `sealed` is the secret that its messages are signed with, encrypted."""

    webhook_id: str
    org_id: str
    url: str
    events: list[str]
    sealed: bytes
    created_at: dt.datetime


@dataclass(frozen=True)
class Message:
    """What an endpoint is still to be told."""

    seq: int
    message_id: str
    webhook: Webhook
    request_id: str
    body: str
    created_at: dt.datetime


def announce(tx: Connection, job: Job) -> None:
    """Write what the org's endpoints are to be told of a job that has just come to its final state, as part of that change."""
    event = EVENTS[job.status]
    found = tx.execute(sa.select(webhooks.c.webhook_id, webhooks.c.events).where(webhooks.c.org_id == job.org_id))
    told = [row.webhook_id for row in found if event in row.events]
    if not told:
        return
    now = job.completed_at or job.updated_at
    data = {
        "request_id": job.request_id,
        "org": job.org_id,
        "experiment_name": job.experiment_name,
        "status": job.status,
        "message": job.message,
        "error_code": job.error_code,
        "output_model_path": job.output_model_path,
        "attempt": job.attempt,
        "step": job.step,
        "total_steps": job.total_steps,
        "created_at": wire_time(job.created_at),
        "started_at": None if job.started_at is None else wire_time(job.started_at),
        "completed_at": wire_time(now),
    }
    body = message_body(event, now, data)
    same = {"org_id": job.org_id, "request_id": job.request_id, "body": body, "created_at": now, "next_at": now}
    rows = [{"message_id": new_message_id(), "webhook_id": webhook_id, **same} for webhook_id in told]
    tx.execute(sa.insert(webhook_messages), rows)


def new_message_id() -> str:
    """What every try of one message has in common."""
    return f"msg_{uuid.uuid4().hex}"


def message_body(event: str, now: dt.datetime, data: Mapping[str, object]) -> str:
    """A message's body, which all of its tries send byte by byte."""
    return json.dumps({"type": event, "timestamp": wire_time(now), "data": data}, separators=(",", ":"))


class WebhookStore:
    """The two tables. Safe to share between threads."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def add(self, webhook: Webhook, most: int, by: By | None = None) -> bool:
        """Store it; False where the org has `most` already."""
        row = {"webhook_id": webhook.webhook_id, "org_id": webhook.org_id, "url": webhook.url, "events": webhook.events}
        with self._store.write() as tx:
            mine = sa.select(sa.func.count()).select_from(webhooks).where(webhooks.c.org_id == webhook.org_id)
            if tx.execute(mine).scalar_one() >= most:
                return False
            tx.execute(sa.insert(webhooks).values(**row, ciphertext=webhook.sealed, created_at=webhook.created_at))
            if by is not None:
                add_entry(tx, by, "webhook.add", webhook.webhook_id, org_id=webhook.org_id)
            return True

    def of_org(self, org_id: str) -> list[Webhook]:
        """The org's, newest first."""
        query = sa.select(webhooks).where(webhooks.c.org_id == org_id).order_by(webhooks.c.created_at.desc())
        with self._store.read() as tx:
            return [_webhook(row) for row in tx.execute(query)]

    def find(self, org_id: str, webhook_id: str) -> Webhook | None:
        """The webhook, or None when the org has no such one."""
        mine = (webhooks.c.org_id == org_id) & (webhooks.c.webhook_id == webhook_id)
        with self._store.read() as tx:
            row = tx.execute(sa.select(webhooks).where(mine)).one_or_none()
        return None if row is None else _webhook(row)

    def remove(self, org_id: str, webhook_id: str, by: By | None = None) -> bool:
        """Remove it with what it was still to be told; False when the org has no such one."""
        mine = (webhooks.c.org_id == org_id) & (webhooks.c.webhook_id == webhook_id)
        with self._store.write() as tx:
            if tx.execute(sa.delete(webhooks).where(mine)).rowcount == 0:
                return False
            tx.execute(sa.delete(webhook_messages).where(webhook_messages.c.webhook_id == webhook_id))
            if by is not None:
                add_entry(tx, by, "webhook.delete", webhook_id, org_id=org_id)
            return True

    def due(self, now: dt.datetime, busy: Collection[str]) -> list[Message]:
        """The oldest message that is due of each endpoint that isn't `busy`, those first that have waited longest."""
        m = webhook_messages.c
        oldest = sa.select(sa.func.min(m.seq)).where(m.next_at <= now, m.webhook_id.not_in(busy)).group_by(m.webhook_id)
        query = (
            sa.select(webhook_messages, webhooks.c.url, webhooks.c.events, webhooks.c.ciphertext)
            .add_columns(webhooks.c.created_at.label("webhook_created_at"))
            .join(webhooks, webhooks.c.webhook_id == m.webhook_id)
            .where(m.seq.in_(oldest))
            .order_by(m.next_at)
            .limit(MAX_DUE)
        )
        with self._store.read() as tx:
            return [_message(row) for row in tx.execute(query)]

    def delivered(self, message: Message) -> None:
        """The endpoint has taken it."""
        with self._store.write() as tx:
            tx.execute(sa.delete(webhook_messages).where(webhook_messages.c.seq == message.seq))

    def postpone(self, message: Message, until: dt.datetime) -> None:
        """Try the message then, and no other of its endpoint's before."""
        m = webhook_messages.c
        later = sa.update(webhook_messages).where(m.webhook_id == message.webhook.webhook_id, m.next_at < until)
        with self._store.write() as tx:
            tx.execute(later.values(next_at=until))

    def give_up(self, message: Message, why: str) -> None:
        """Forget the message, and say so in the job's events."""
        with self._store.write() as tx:
            # A job's writers commit in the order of their events' ids.
            held = tx.execute(sa.select(jobs.c.seq).where(jobs.c.request_id == message.request_id).with_for_update()).scalar()
            gone = tx.execute(sa.delete(webhook_messages).where(webhook_messages.c.seq == message.seq)).rowcount
            if gone and held is not None:
                add_event(tx, message.request_id, "webhook_failed", why)


def _webhook(row: sa.Row[tuple[object, ...]]) -> Webhook:
    w = row._mapping
    return Webhook(w["webhook_id"], w["org_id"], w["url"], list(w["events"]), w["ciphertext"], w["created_at"])


def _message(row: sa.Row[tuple[object, ...]]) -> Message:
    m = row._mapping
    webhook = Webhook(m["webhook_id"], m["org_id"], m["url"], list(m["events"]), m["ciphertext"], m["webhook_created_at"])
    return Message(m["seq"], m["message_id"], webhook, m["request_id"], m["body"], m["created_at"])
