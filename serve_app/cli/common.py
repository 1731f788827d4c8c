"""What every command shares: the app, the options, who to act for, the client."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from serve_app.client import Client

EXIT_CODES = "Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 the service can't be reached, 130 interrupted."
app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Start the service on this machine, submit jobs to any, follow them, talk to the result.",
    epilog=EXIT_CODES,
)

Org = Annotated[str | None, typer.Option(help="Organisation (UUID); default TUNEYARD_ORG, then the last one used.")]
Url = Annotated[str | None, typer.Option(envvar="TUNEYARD_URL", help="The service; default the one running here.")]
Token = Annotated[str | None, typer.Option(envvar="TUNEYARD_TOKEN", help="Bearer token; default one minted here.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
RequestId = Annotated[str, typer.Argument(help="The job's request_id.")]


def die(message: str, code: int = 1) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)


def _memory() -> Path:
    from serve_app.settings import Settings

    return Settings.load().home / "cli.json"


def _uuid(text: str) -> str:
    import uuid

    try:
        return str(uuid.UUID(text))
    except ValueError:
        die(f"{text!r} isn't an organisation: it must be a UUID", 2)


def org_of(given: str | None) -> str:
    """The org to act for; remembers one that was given."""
    path = _memory()
    org = given or os.environ.get("TUNEYARD_ORG")
    if org:
        org = _uuid(org)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"org": org}))
        return org
    try:
        return str(json.loads(path.read_text())["org"])
    except (OSError, ValueError, KeyError):
        die("which organisation? Give --org UUID, or set TUNEYARD_ORG.", 2)


def home_url() -> str | None:
    """The URL of the service that runs from this home, if one does."""
    from serve_app.embedded.lifetime import read_state
    from serve_app.settings import Settings

    state = read_state(Settings.load().home) or {}
    return state["url"] if state.get("ready") else None


def client_for(url: str | None, token: str | None, org: str) -> Client:
    """The client of the service that is meant, with the token that is meant."""
    from serve_app.auth import mint_token
    from serve_app.client import Client
    from serve_app.settings import Settings

    settings = Settings.load()
    here = home_url()
    url = url or here
    if url is None:
        die("Tuneyard isn't running here; start it with: tuneyard up --detach (or give --url and --token)")
    if token is None:
        # A token signed with this home's key opens this home's service, so nobody else gets to see one.
        if url.rstrip("/") != here:
            die(f"no token for {url}: give --token or set TUNEYARD_TOKEN")
        try:
            token = mint_token(settings, org, "cli", 3600)
        except RuntimeError:
            die("this home has no token key: give --token or set TUNEYARD_TOKEN")
    try:
        return Client(url, token)
    except ValueError as error:
        die(str(error), 2)


def show(value: dict[str, Any]) -> None:
    """Print JSON alone."""
    typer.echo(json.dumps(value))
