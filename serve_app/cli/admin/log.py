"""Who did what."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import asdict
from typing import Annotated

import typer

from serve_app.cli.admin.common import admin_app, opened
from serve_app.cli.common import AsJson, plain, uuid_of


@admin_app.command()
def audit(
    org: Annotated[str | None, typer.Option(help="Only what was about this organisation.")] = None,
    since: Annotated[dt.datetime | None, typer.Option(help="Only from then on (UTC).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the newest; default all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show who did what, when, and what came of it, oldest first; JSON is one object a line."""
    from serve_app.store.audit import read_entries

    org_id = None if org is None else uuid_of(org)
    _, store = opened()
    with store.read() as tx:
        found = read_entries(tx, org_id=org_id, since=since and since.replace(tzinfo=dt.UTC), limit=limit)
    for entry in found:
        if as_json:
            typer.echo(json.dumps(asdict(entry) | {"time": entry.time.isoformat(timespec="milliseconds").replace("+00:00", "Z")}))
            continue
        parts = (entry.who, entry.action, entry.object or "-", entry.outcome, entry.org_id or "-", entry.address or "-")
        typer.echo(plain(f"{entry.time:%Y-%m-%d %H:%M:%S}  {'  '.join(parts)}"))
