"""What every command shares: the app, the options, who to act for, the client."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from serve_app.cli.failures import EXIT_CODES, FAILED, INTERRUPTED

if TYPE_CHECKING:
    from serve_app.client import Client

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Start the service on this machine, submit jobs to any, follow them, talk to the result.",
    epilog=f"Exit codes: {', '.join(f'{code} {what}' for code, what in EXIT_CODES.items())}.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"tuneyard {version('tuneyard')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


Org = Annotated[str | None, typer.Option(help="Organisation (UUID); default TUNEYARD_ORG, then the last one used.")]
Url = Annotated[str | None, typer.Option(envvar="TUNEYARD_URL", help="The service; default the one running here.")]
Token = Annotated[str | None, typer.Option(envvar="TUNEYARD_TOKEN", help="Bearer token; default one minted here.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
RequestId = Annotated[str, typer.Argument(help="The job's request_id.")]
NOT_HERE = "Tuneyard isn't running here; start it with: tuneyard up --detach"

CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # all but the tab


def die(message: str, code: int = FAILED) -> NoReturn:
    """Say it on stderr and exit."""
    typer.echo(message, err=True)
    raise typer.Exit(code)


def _memory() -> Path:
    from serve_app.settings import Settings

    return Settings.load().home / "cli.json"


def uuid_of(given: Any, what: str = "an organisation") -> str:
    """The canonical UUID of what was given."""
    import uuid

    try:
        return str(uuid.UUID(str(given)))
    except ValueError:
        die(f"{given!r} isn't {what}: it must be a UUID", 2)


def org_of(given: Any) -> str:
    """The org to act for, from a flag or a file; remembers one that was given."""
    path = _memory()
    org = given or os.environ.get("TUNEYARD_ORG")
    if org:
        org = uuid_of(org)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"org": org}))
        return org
    try:
        return str(json.loads(path.read_text())["org"])
    except (OSError, ValueError, KeyError, TypeError):
        die("which organisation? Give --org UUID, or set TUNEYARD_ORG.", 2)


def service_here() -> dict[str, Any] | None:
    """What the service that runs from this home says of itself, if one does."""
    from serve_app.embedded.lifetime import read_state
    from serve_app.settings import Settings

    state = read_state(Settings.load().home) or {}
    return state if state.get("ready") else None


def home_url() -> str | None:
    """Its URL."""
    return state["url"] if (state := service_here()) else None


def credentials(url: str | None, token: str | None, org: str) -> tuple[str, str]:
    """The URL of the service that is meant, and the token for it: the one given, or one minted for this home's own service."""
    here = home_url()
    url = url or here
    if url is None:
        die(f"{NOT_HERE} (or give --url and --token)")
    if token is not None:
        return url, token
    # A token signed with this home's key opens this home's service, so nobody else gets to see one.
    if url.rstrip("/") != here:
        die(f"no token for {url}: give --token or set TUNEYARD_TOKEN")
    from serve_app.auth import mint_token
    from serve_app.settings import Settings

    try:
        return url, mint_token(Settings.load(), org, "cli", 3600)
    except RuntimeError as error:
        die(f"{error}. Give a token by --token or TUNEYARD_TOKEN.")


def client_for(url: str | None, token: str | None, org: str) -> Client:
    """The client of the service that is meant, with the token that is meant."""
    from serve_app.client import Client

    try:
        return Client(*credentials(url, token, org))
    except ValueError as error:
        die(str(error), 2)


@contextlib.contextmanager
def while_it_goes_on(request_id: str) -> Iterator[None]:
    """Let Ctrl-C end the looking at a job, and say that it doesn't end the job."""
    try:
        yield
    except KeyboardInterrupt:
        said = f"\nNot looking any more; the job goes on. Stop it with: tuneyard cancel {request_id}"
        die(said, INTERRUPTED)


def plain(text: object) -> str:
    """Text for a terminal, without the control characters by which what was logged could steer it."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))


def nothing(what: str) -> None:
    """Say that there is none of it, where a script reads on."""
    typer.echo(f"no {what}", err=True)


def show(value: Mapping[str, Any]) -> None:
    """Print JSON alone."""
    typer.echo(json.dumps(value))
