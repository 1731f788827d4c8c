"""Secrets: added, listed, removed; never shown."""

from __future__ import annotations

from typing import Annotated

import typer

from serve_app.cli.common import AsJson, Org, Token, Url, app, client_for, org_of, plain, show

secret_app = typer.Typer(no_args_is_help=True, help="Keys to buckets, stored encrypted in the service.")
app.add_typer(secret_app, name="secret")


@secret_app.command("add")
def secret_add(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    access_key_id: Annotated[str, typer.Option(envvar="AWS_ACCESS_KEY_ID", prompt=True)],
    secret_access_key: Annotated[str, typer.Option(envvar="AWS_SECRET_ACCESS_KEY", prompt=True, hide_input=True)],
    type_: Annotated[str, typer.Option("--type", help="aws, or s3 for anything S3-compatible.")] = "s3",
    session_token: Annotated[str | None, typer.Option(envvar="AWS_SESSION_TOKEN", help="Of temporary keys.")] = None,
    endpoint_url: Annotated[str | None, typer.Option(envvar="AWS_ENDPOINT_URL", help="Of an s3 secret.")] = None,
    region: Annotated[str | None, typer.Option(help="Region of the buckets.")] = None,
    org: Org = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Store keys; print the secret_id."""
    data = {"access_key_id": access_key_id, "secret_access_key": secret_access_key}
    data |= {k: v for k, v in (("session_token", session_token), ("endpoint_url", endpoint_url), ("region", region)) if v}
    if type_ == "aws":
        data.pop("endpoint_url", None)  # from the environment, perhaps; AWS has its own
    org = org_of(org)
    made = client_for(url, token, org).create_secret(org, name, type_, data)
    show(made) if as_json else typer.echo(made["secret_id"])


@secret_app.command("list")
def secret_list(org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """List secrets, without values."""
    org = org_of(org)
    found = client_for(url, token, org).list_secrets(org)
    if as_json:
        show(found)
        return
    for s in found["secrets"]:
        typer.echo(f"{s['secret_id']}  {s['type']:<4} {plain(s['name'])}")


@secret_app.command("remove")
def secret_remove(
    secret_id: Annotated[str, typer.Argument(help="The secret's id.")],
    org: Org = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Delete a secret. Jobs that name it and haven't started will fail."""
    org = org_of(org)
    gone = client_for(url, token, org).delete_secret(secret_id, org)
    show(gone) if as_json else typer.echo(f"{secret_id} is deleted")
