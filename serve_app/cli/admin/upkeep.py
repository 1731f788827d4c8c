"""The store and the storage looked after: what is out of date, backups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve_app.cli.admin.common import admin_app, me, opened
from serve_app.cli.common import AsJson, die, show

WHAT = {
    "idempotency_keys": "idempotency keys that count no more",
    "journals": "jobs' log lines, events and points (TUNEYARD_KEEP_JOURNAL_DAYS)",
    "checkpoints": "completed jobs' checkpoints (TUNEYARD_KEEP_CHECKPOINTS_DAYS)",
    "cached_datasets": "prepared datasets beyond TUNEYARD_DATA_CACHE_BYTES",
    "uploads": "uploads that were cut off",
}


@admin_app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False, as_json: AsJson = False
) -> None:
    """Remove now what is out of date, as the dispatcher does every ten minutes."""
    from serve_app.housekeeping import clean
    from serve_app.store.audit import add_entry

    settings, store = opened()
    done = clean(settings, store, dry_run=dry_run)
    if not dry_run:
        with store.write() as tx:
            add_entry(tx, me(), "admin.gc", ", ".join(f"{name} {count}" for name, count in done.items() if count) or None)
    if as_json:
        show({"dry_run": dry_run, "removed": done})
        return
    for name, count in done.items():
        typer.echo(f"{count:>6}  {WHAT[name]}{' would go' if dry_run else ''}")


@admin_app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="A new file; .jsonl.zst says what it is.")], as_json: AsJson = False
) -> None:
    """Write all that the job store holds into one file, while the service runs or not.

    Secrets are in it as they are stored, sealed: without TUNEYARD_SECRET_KEY (embedded: secret.key in the home) nobody can open
    them, so keep that key too, elsewhere.
    """
    from serve_app.backup import back_up
    from serve_app.store.audit import add_entry

    _, store = opened()
    counts = back_up(store, file)
    with store.write() as tx:
        add_entry(tx, me(), "admin.backup", file.name)
    _tell(counts, file, as_json)


@admin_app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="What tuneyard admin backup wrote.", exists=True, dir_okay=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace what the database holds, all of it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a backup into the database of TUNEYARD_DATABASE_URL, of either kind; it makes the tables. Stop the service first.

    The database must be empty, or be replaced with --force. A backup of an earlier version gets this version's schema.
    """
    from serve_app.backup import restore as restored
    from serve_app.settings import Settings
    from serve_app.store.jobs import JobStore

    try:
        store = JobStore.open(Settings.load().database_url)
        counts = restored(store, file, me(), force=force)
    except RuntimeError as error:
        die(str(error))
    _tell(counts, file, as_json)


def _tell(counts: dict[str, int], file: Path, as_json: bool) -> None:
    if as_json:
        show({"file": str(file), "size_bytes": file.stat().st_size, "rows": counts})
        return
    typer.echo(f"{file}: {', '.join(f'{count:,} {name}' for name, count in counts.items() if count) or 'no rows'}")
