"""Webhooks: added, listed, tested, deleted."""

from __future__ import annotations

from typing import Annotated

import typer

from serve_app.cli.common import AsJson, Org, Token, Url, app, client_for, die, nothing, org_of, plain, show

webhook_app = typer.Typer(no_args_is_help=True, help="Endpoints that are told, in signed messages, when jobs end.")
app.add_typer(webhook_app, name="webhook")

WebhookId = Annotated[str, typer.Argument(help="The webhook's id.")]


@webhook_app.command("add")
def webhook_add(
    endpoint: Annotated[str, typer.Argument(help="Where to post: https://host/path.")],
    event: Annotated[
        list[str] | None, typer.Option(help="job.completed, job.failed or job.canceled, several times for several; default all.")
    ] = None,
    org: Org = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Have an endpoint told when jobs end; print its id, and the secret to verify its messages with, which no one shows again."""
    org = org_of(org)
    made = client_for(url, token, org).create_webhook(org, endpoint, event or None)
    if as_json:
        show(made)
        return
    typer.echo(made["webhook_id"])
    typer.echo(made["secret"])


@webhook_app.command("list")
def webhook_list(org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """List webhooks, without their secrets."""
    org = org_of(org)
    found = client_for(url, token, org).list_webhooks(org)
    if as_json:
        show(found)
        return
    if not found["webhooks"]:
        nothing("webhooks")
    for w in found["webhooks"]:
        typer.echo(f"{w['webhook_id']}  {plain(w['url'])}  {' '.join(w['events'])}")


@webhook_app.command("test")
def webhook_test(webhook_id: WebhookId, org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Send a test message now; exit with 1 unless the endpoint took it."""
    org = org_of(org)
    done = client_for(url, token, org).test_webhook(webhook_id, org)
    if as_json:
        show(done)
    elif done["delivered"]:
        typer.echo("delivered")
    if not done["delivered"]:
        die(f"not delivered: {plain(done['error'])}")


@webhook_app.command("delete")
def webhook_delete(webhook_id: WebhookId, org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Delete a webhook, with what it was still to be told."""
    org = org_of(org)
    gone = client_for(url, token, org).delete_webhook(webhook_id, org)
    show(gone) if as_json else typer.echo(f"{webhook_id} is deleted")
