"""The service on this machine, and what belongs to its home: keys, models, settings, schema."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from serve_app.cli.common import AsJson, Token, Url, app, die, show


@app.command()
def up(detach: Annotated[bool, typer.Option(help="Return once the service is ready.")] = False, as_json: AsJson = False) -> None:
    """Start everything on this machine: S3, job store, Ray, the service."""
    from serve_app import embedded

    raise typer.Exit(embedded.up(detach, as_json))


@app.command()
def down() -> None:
    """Stop what `tuneyard up` started, all of it."""
    from serve_app import embedded

    raise typer.Exit(embedded.down())


@app.command()
def models() -> None:
    """Put the embedded base models into the model mirror."""
    from serve_app.settings import Settings
    from train_loop.model.mirror import materialise

    for model_id in materialise(Path(Settings.load().model_mirror)):
        typer.echo(model_id)


@app.command()
def token(
    org: Annotated[str, typer.Option(help="Organisation (UUID) the token speaks for.")],
    subject: Annotated[str, typer.Option(help="Who it is for.")] = "dev",
    ttl_s: Annotated[int, typer.Option(help="Seconds until it expires.")] = 86_400,
    scope: Annotated[str | None, typer.Option(help="Scopes, separated by blanks; default jobs and secrets.")] = None,
) -> None:
    """Print a bearer token, signed with this home's key."""
    import uuid

    from serve_app.auth import mint_token
    from serve_app.settings import Settings

    try:
        typer.echo(mint_token(Settings.load(), str(uuid.UUID(org)), subject, ttl_s, scope))
    except ValueError:
        die("--org must be a UUID", 2)
    except RuntimeError:
        die("this home has no token key yet: start the service once with tuneyard up --detach")


@app.command()
def settings() -> None:
    """List every setting with its environment variable and default."""
    from rich.console import Console
    from rich.table import Table

    from serve_app.settings import Settings

    table = Table("environment variable", "default", "what it is")
    for name, field in Settings.model_fields.items():
        default = "" if field.default_factory or field.default in (None, "") else str(field.default)
        table.add_row(f"TUNEYARD_{name.upper()}", default, field.description or "")
    Console().print(table)


db_app = typer.Typer(no_args_is_help=True, help="The job store's schema.")
app.add_typer(db_app, name="db")


@db_app.command("upgrade")
def db_upgrade() -> None:
    """Bring the job store (TUNEYARD_DATABASE_URL) to this version's schema; again is harmless."""
    from serve_app.settings import Settings
    from serve_app.store.jobs import JobStore

    JobStore.open(Settings.load().database_url).migrate()
    typer.echo("the job store is up to date")


@app.command()
def whoami(url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Show what TUNEYARD_TOKEN says: subject, organisations, scopes, expiry. Doesn't check its signature."""
    import jwt

    from serve_app.cli.common import home_url

    if token is None:
        die("no token: give --token or set TUNEYARD_TOKEN (without one, commands mint their own for the service running here)")
    try:
        claims = jwt.decode(token.strip(), options={"verify_signature": False})
    except jwt.PyJWTError:
        die("that isn't a JWT")
    expires = claims.get("exp")
    said = {
        "subject": claims.get("sub"),
        "orgs": claims.get("orgs") or [claims.get("org")],
        "scope": claims.get("scope"),
        "expires_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(expires)) if isinstance(expires, int | float) else None,
        "expired": isinstance(expires, int | float) and expires < time.time(),
        "url": url or home_url(),
    }
    if as_json:
        show(said)
    else:
        for name, value in said.items():
            typer.echo(f"{name:<11} {'-' if value is None else value}")
