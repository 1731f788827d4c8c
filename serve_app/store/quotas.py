"""What single organisations may have in place of what the settings say, and what each has and had."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serve_app.lifecycle import FINAL, Status
from serve_app.store.tables import OURS, jobs, quotas


@dataclass(frozen=True)
class Quota:
    """Limits of one org; None is what the settings say."""

    max_running_jobs: int | None = None
    max_gpus: int | None = None
    max_queued_jobs: int | None = None

    def over(self, other: Quota) -> Quota:
        """These, and where there are none the other's."""
        mine = {name: value for name, value in asdict(self).items() if value is not None}
        return Quota(**asdict(other) | mine)


NO_QUOTA = Quota()
_COLUMNS = (quotas.c.max_running_jobs, quotas.c.max_gpus, quotas.c.max_queued_jobs)


def all_quotas(tx: Connection) -> dict[str, Quota]:
    """By org, of those that have one of their own."""
    return {org_id: Quota(*limits) for org_id, *limits in tx.execute(sa.select(quotas.c.org_id, *_COLUMNS))}


def quota_of(tx: Connection, org_id: str) -> Quota:
    """The org's own."""
    found = tx.execute(sa.select(*_COLUMNS).where(quotas.c.org_id == org_id)).one_or_none()
    return NO_QUOTA if found is None else Quota(*found)


def set_quota(tx: Connection, org_id: str, quota: Quota) -> None:
    """Let this be the org's own from now on, whatever it was; none at all is forgotten."""
    tx.execute(sa.delete(quotas).where(quotas.c.org_id == org_id))
    if quota != NO_QUOTA:
        tx.execute(sa.insert(quotas).values(org_id=org_id, **asdict(quota)))


@dataclass
class Use:
    """What an org has of the service now, and what it had in all."""

    queued: int = 0
    running: int = 0
    finished: int = 0
    workers: int = 0  # of attempts under way
    worker_hours: float = 0.0
    quota: Quota = field(default=NO_QUOTA)


def use_by_org(tx: Connection, workers: Iterable[tuple[str, int]]) -> dict[str, Use]:
    """Of every org that has jobs or a quota. `workers` are those of each attempt under way, with its org.

    Runs outside the service have nothing of it.
    """
    used: dict[str, Use] = defaultdict(Use)
    count, work = sa.func.count(), sa.func.sum(jobs.c.worker_s)
    ours = sa.select(jobs.c.org_id, jobs.c.status, count, work).where(OURS)
    for org_id, status, number, worker_s in tx.execute(ours.group_by(jobs.c.org_id, jobs.c.status)):
        use = used[org_id]
        use.worker_hours += (worker_s or 0.0) / 3600
        if status in FINAL:
            use.finished += number
        elif status == Status.QUEUED:
            use.queued += number
        else:
            use.running += number
    for org_id, quota in all_quotas(tx).items():
        used[org_id].quota = quota
    for org_id, held in workers:
        used[org_id].workers += held
    return dict(sorted(used.items()))
