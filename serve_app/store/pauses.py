"""The operator's switch: while a pause lasts no attempt starts; a drain is one that sends what runs back to the queue."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serve_app.store.audit import By
from serve_app.store.tables import pauses

DISPATCH = "dispatch"
PAUSED = sa.exists().where(pauses.c.name == DISPATCH)  # for a query about something else: no question of its own


@dataclass(frozen=True)
class Pause:
    """Since when, by whom, and whether running jobs are to save and wait too."""

    drains: bool
    since: dt.datetime
    who: str


def current(tx: Connection) -> Pause | None:
    """The pause under way, if there is one."""
    found = tx.execute(sa.select(pauses.c.drains, pauses.c.since, pauses.c.who).where(pauses.c.name == DISPATCH)).one_or_none()
    return None if found is None else Pause(**found._mapping)


def begin(tx: Connection, by: By, *, drains: bool) -> Pause:
    """Pause; a pause that is there becomes this one, but keeps its beginning."""
    before = current(tx)
    pause = Pause(drains, before.since if before else dt.datetime.now(dt.UTC), by.who)
    tx.execute(sa.delete(pauses))
    tx.execute(sa.insert(pauses).values(name=DISPATCH, drains=pause.drains, since=pause.since, who=pause.who))
    return pause


def end(tx: Connection) -> bool:
    """Let attempts start again; whether there was a pause."""
    return tx.execute(sa.delete(pauses)).rowcount > 0
