"""The service on this machine, and what belongs to its home: models, settings, schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve_app.cli.common import AsJson, app, die, show


@app.command()
def up(detach: Annotated[bool, typer.Option(help="Return once the service is ready.")] = False, as_json: AsJson = False) -> None:
    """Start everything on this machine: S3, job store, Ray, the service."""
    from serve_app import embedded

    raise typer.Exit(embedded.up(detach, as_json))


@app.command()
def down(as_json: AsJson = False) -> None:
    """Stop what `tuneyard up` started, all of it."""
    from serve_app import embedded

    raise typer.Exit(embedded.down(as_json))


@app.command()
def models(as_json: AsJson = False) -> None:
    """Put the embedded base models into the model mirror."""
    from serve_app.settings import Settings
    from train_loop.model.mirror import materialise

    found = list(materialise(Path(Settings.load().model_mirror)))
    show({"models": found}) if as_json else typer.echo("\n".join(found))


@app.command()
def settings(as_json: AsJson = False) -> None:
    """List every setting with its environment variable and default."""
    from serve_app.settings import Settings

    listed = [
        {
            "variable": f"TUNEYARD_{name.upper()}",
            "default": None if field.default_factory or field.default in (None, "") else str(field.default),
            "description": field.description or "",
        }
        for name, field in Settings.model_fields.items()
    ]
    if as_json:
        show({"settings": listed})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("environment variable", "default", "what it is")
    for setting in listed:
        table.add_row(setting["variable"], setting["default"] or "", setting["description"])
    Console().print(table)


db_app = typer.Typer(no_args_is_help=True, help="The job store's schema.")
app.add_typer(db_app, name="db")


@db_app.command("upgrade")
def db_upgrade(as_json: AsJson = False) -> None:
    """Bring the job store (TUNEYARD_DATABASE_URL) to this version's schema; again is harmless."""
    from serve_app.settings import Settings
    from serve_app.store.jobs import JobStore

    try:
        store = JobStore.open(Settings.load().database_url)
    except RuntimeError as error:
        die(str(error))
    store.migrate()
    show({"upgraded": True}) if as_json else typer.echo("the job store is up to date")
