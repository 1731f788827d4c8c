"""What each organisation has and had, and what it may have."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve_app.cli.admin.common import admin_app, me, opened
from serve_app.cli.common import AsJson, show, uuid_of

if TYPE_CHECKING:
    from serve_app.store.quotas import Quota, Use

LIMITED = {"queued": "max_queued_jobs", "running": "max_running_jobs", "workers": "max_gpus"}


@admin_app.command()
def orgs(as_json: AsJson = False) -> None:
    """List organisations: jobs, workers held, worker-hours used, and what each may have."""
    from serve_app.quota import default_quota
    from serve_app.store.quotas import use_by_org

    settings, store = opened()
    held = [(job.org_id, job.num_workers) for job in store.running() if job.open]
    with store.read() as tx:
        used = use_by_org(tx, held)
    default = default_quota(settings)
    listed = [_told(org, use, default) for org, use in used.items()]
    if as_json:
        show({"orgs": listed})
        return
    from rich.console import Console
    from rich.table import Column, Table

    # An id and five numbers: with a frame they would not fit on 80 columns.
    table = Table(Column("org", no_wrap=True), box=None, pad_edge=False, collapse_padding=True)
    for heading in (*LIMITED, "finished", "worker-\nhours"):
        table.add_column(heading, justify="right", overflow="fold", min_width=len(heading.splitlines()[0]))
    for row in listed:
        limited = [f"{row[name]}/{_shown(row['quota'][limit], limit in row['own_quota'])}" for name, limit in LIMITED.items()]
        table.add_row(row["org"], *limited, str(row["finished"]), f"{row['worker_hours']:.1f}")
    Console().print(table)
    typer.echo("now/at most; * is set by tuneyard admin quota, the others are the settings', - is no limit")


def _told(org: str, use: Use, default: Quota) -> dict[str, Any]:
    counts = {"queued": use.queued, "running": use.running, "finished": use.finished, "workers": use.workers}
    return {"org": org, **counts, "worker_hours": round(use.worker_hours, 3), **_limits(use.quota, default)}


def _limits(own: Quota, default: Quota) -> dict[str, Any]:
    mine = {name: value for name, value in asdict(own).items() if value is not None}
    return {"quota": asdict(own.over(default)), "own_quota": mine}


def _shown(limit: int | None, own: bool) -> str:
    return f"{'-' if limit is None else limit}{'*' if own else ''}"


@admin_app.command()
def quota(
    org: Annotated[str, typer.Argument(help="Organisation (UUID).")],
    max_running_jobs: Annotated[int | None, typer.Option(min=1, help="In place of TUNEYARD_MAX_RUNNING_JOBS_PER_ORG.")] = None,
    max_gpus: Annotated[int | None, typer.Option(min=1, help="In place of TUNEYARD_MAX_GPUS_PER_ORG.")] = None,
    max_queued_jobs: Annotated[int | None, typer.Option(min=1, help="In place of TUNEYARD_MAX_QUEUED_JOBS_PER_ORG.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Back to the settings; limits given beside it are set anew.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show or set what one organisation may have; it counts at once, for what is submitted and for what starts."""
    from serve_app.quota import default_quota
    from serve_app.store.audit import add_entry
    from serve_app.store.quotas import NO_QUOTA, quota_of, set_quota

    org = uuid_of(org)
    settings, store = opened()
    limits = {"max_running_jobs": max_running_jobs, "max_gpus": max_gpus, "max_queued_jobs": max_queued_jobs}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if clear or given:
        with store.write() as tx:
            own = replace(NO_QUOTA if clear else quota_of(tx, org), **given)
            set_quota(tx, org, own)
            said = ", ".join(f"{name} {limit}" for name, limit in asdict(own).items() if limit is not None)
            add_entry(tx, me(), "admin.quota", said or "the settings'", org_id=org)
    else:
        with store.read() as tx:
            own = quota_of(tx, org)
    told = {"org": org, **_limits(own, default_quota(settings))}
    if as_json:
        show(told)
        return
    for name, limit in told["quota"].items():
        whose = "its own" if name in told["own_quota"] else "the settings'"
        typer.echo(f"{name:<17} {'no limit' if limit is None else limit}  ({whose})")
