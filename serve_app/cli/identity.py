"""Who a command speaks for: a token made, a token read."""

from __future__ import annotations

import datetime as dt
import shlex
from typing import Annotated, Any

import typer

from serve_app.cli.common import (
    NOT_HERE,
    AsJson,
    Org,
    Token,
    Url,
    app,
    credentials,
    die,
    home_url,
    org_of,
    plain,
    service_here,
    show,
    uuid_of,
)

DAY_S = 86_400


@app.command()
def token(
    org: Annotated[str, typer.Option(help="Organisation (UUID) the token speaks for.")],
    subject: Annotated[str, typer.Option(help="Who it is for.")] = "dev",
    ttl_s: Annotated[int, typer.Option(min=1, help="Seconds until it expires.")] = DAY_S,
    scope: Annotated[str | None, typer.Option(help="Scopes, separated by blanks; default jobs and secrets.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a bearer token, signed with this home's key."""
    made = _minted(uuid_of(org), subject, ttl_s, scope)
    show({"token": made}) if as_json else typer.echo(made)


@app.command()
def env(org: Org = None, as_json: AsJson = False) -> None:
    """Print what curl and S3 tools need of the service that runs here, a token of a day among it: eval "$(tuneyard env)"."""
    state, org = service_here(), org_of(org)
    if state is None:
        die(NOT_HERE)
    said = {"ORG": org, "URL": state["url"], "TOKEN": _minted(org)}
    said |= {f"AWS_{name.upper()}": state[f"s3_{name}"] for name in ("endpoint_url", "access_key_id", "secret_access_key")}
    if as_json:
        show(said)
        return
    for name, value in said.items():
        typer.echo(f"export {name}={shlex.quote(value)}")


def _minted(org: str, subject: str = "dev", ttl_s: int = DAY_S, scope: str | None = None) -> str:
    from serve_app.auth import mint_token
    from serve_app.settings import Settings

    try:
        return mint_token(Settings.load(), org, subject, ttl_s, scope)
    except RuntimeError as error:
        die(str(error))


@app.command()
def whoami(org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Show what the token says: subject, organisations, scopes, expiry. Its signature isn't checked, and nobody is asked."""
    if token is None:
        url, token = credentials(url, token, org_of(org))
    said = read_claims(token) | {"url": url or home_url()}
    if as_json:
        show(said)
        return
    for name, value in said.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else value
        typer.echo(f"{name:<11} {plain(shown)}")


def read_claims(token: str) -> dict[str, Any]:
    """What a token says of itself, unverified: subject, orgs, scopes (as the service would take them), expires_at, expired."""
    import jwt

    from serve_app.auth import DEFAULT_SCOPES

    try:
        claims = jwt.decode(token.strip(), options={"verify_signature": False})
    except jwt.PyJWTError:
        die("that isn't a JWT")
    orgs, scope = claims.get("orgs", [claims.get("org")]), claims.get("scope", sorted(DEFAULT_SCOPES))
    try:
        expires = dt.datetime.fromtimestamp(claims["exp"], dt.UTC)
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        expires = None
    return {
        "subject": claims.get("sub"),
        "orgs": [o for o in orgs if o is not None] if isinstance(orgs, list) else [orgs],
        "scopes": scope.split() if isinstance(scope, str) else scope,
        "expires_at": expires and expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "expired": expires is None or expires < dt.datetime.now(dt.UTC),
    }
