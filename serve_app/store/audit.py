"""The audit log: who did what, when, to what, and what came of it. Rows are only ever added; no secret's value is in them."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serve_app.store.tables import audit

MAX_CHARS = 500
DONE = "done"


@dataclass(frozen=True)
class By:
    """Who asked: the token's subject, or `admin:<os user>`; and from where, if that is known."""

    who: str
    address: str | None = None


@dataclass(frozen=True)
class Entry:
    """One line of the log."""

    id: int
    time: dt.datetime
    org_id: str | None
    who: str
    action: str
    object: str | None
    outcome: str
    address: str | None


def add_entry(
    tx: Connection, by: By, action: str, object_: str | None = None, *, org_id: str | None = None, outcome: str = DONE
) -> None:
    """Append an entry as part of the change that it tells of."""
    address = by.address and _storable(by.address, 64)
    told = {"who": _storable(by.who), "action": action, "object": object_ and _storable(object_), "outcome": _storable(outcome)}
    tx.execute(sa.insert(audit).values(time=dt.datetime.now(dt.UTC), org_id=org_id, address=address, **told))


def read_entries(
    tx: Connection, *, org_id: str | None = None, since: dt.datetime | None = None, limit: int | None = None
) -> list[Entry]:
    """The newest `limit` entries, oldest first."""
    query = sa.select(audit).order_by(audit.c.id.desc()).limit(limit)
    if org_id is not None:
        query = query.where(audit.c.org_id == org_id)
    if since is not None:
        query = query.where(audit.c.time >= since)
    return [Entry(**row._mapping) for row in tx.execute(query)][::-1]


def _storable(text: str, most: int = MAX_CHARS) -> str:
    """What an issuer wrote into a token as both databases can hold it."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()[:most]
