"""Secrets: added, listed, removed; never shown."""

from __future__ import annotations

import getpass
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from serve_app.cli.common import AsJson, Org, Token, Url, app, client_for, die, nothing, org_of, plain, show
from train_loop.trackers.tracker import ENVIRONMENT

secret_app = typer.Typer(no_args_is_help=True, help="Keys to buckets, stored encrypted in the service.")
app.add_typer(secret_app, name="secret")


class Kind(StrEnum):
    """What opens the bucket or the repository, or the tracker that metrics go to."""

    aws = "aws"
    s3 = "s3"
    gcs = "gcs"
    hf = "hf"
    mlflow = "mlflow"
    wandb = "wandb"


@secret_app.command("add")
def secret_add(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    kind: Annotated[
        Kind, typer.Option("--type", help="s3 is anything S3-compatible, hf the Hugging Face hub; mlflow and wandb are trackers.")
    ] = Kind.s3,
    role_arn: Annotated[str | None, typer.Option(help="Of an aws or s3 secret: a role to assume, in place of keys.")] = None,
    endpoint_url: Annotated[str | None, typer.Option(help="Of an s3 secret; default AWS_ENDPOINT_URL.")] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="Of a gcs secret: the service account's key; default GOOGLE_APPLICATION_CREDENTIALS.")
    ] = None,
    region: Annotated[str | None, typer.Option(help="Region of the buckets.")] = None,
    org: Org = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Store keys; print the secret_id.

    The values come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN; AWS_EXTERNAL_ID of a role;
    HF_TOKEN; MLFLOW_TRACKING_URI and the others of MLflow; WANDB_API_KEY, WANDB_PROJECT, WANDB_ENTITY, WANDB_BASE_URL) or are
    asked for: what a command line holds, everyone on the machine can read.
    """
    for flag, given, kinds in (
        ("--role-arn", role_arn, (Kind.aws, Kind.s3)),
        ("--endpoint-url", endpoint_url, (Kind.s3,)),
        ("--key-file", key_file, (Kind.gcs,)),
        ("--region", region, (Kind.aws, Kind.s3)),
    ):
        if given is not None and kind not in kinds:
            die(f"{flag} is of secrets of type {' or '.join(kinds)}, not of {kind}", 2)
    match kind:
        case Kind.aws | Kind.s3:
            data = _role(role_arn) if role_arn else _keys()
            if kind is Kind.s3:
                data["endpoint_url"] = endpoint_url or os.environ.get("AWS_ENDPOINT_URL", "")
        case Kind.gcs:
            data = {"service_account_json": _key_file(key_file)}
        case Kind.hf:
            data = {"token": _value("HF_TOKEN", "Hub token")}
        case Kind.mlflow | Kind.wandb:
            data = {
                name: _value(variable, name.replace("_", " ").capitalize()) if needed else os.environ.get(variable, "")
                for name, (variable, needed) in ENVIRONMENT[kind].items()
            }
    data |= {"region": region or ""}
    org = org_of(org)
    made = client_for(url, token, org).create_secret(org, name, kind, {k: v for k, v in data.items() if v})
    show(made) if as_json else typer.echo(made["secret_id"])


def _value(variable: str, asked: str, *, needed: bool = True) -> str:
    """The environment's, or what is typed unseen, or the next line of a pipe."""
    if given := os.environ.get(variable):
        return given
    # Not typer's prompt, which writes on stdout what belongs to the terminal alone.
    if sys.stdin.isatty():
        given = getpass.getpass(f"{asked} ({variable} is not set): ")
    elif needed:
        given = sys.stdin.readline().strip()
    if needed and not given:
        die(f"no {asked.lower()}: set {variable}, or type it in", 2)
    return given or ""


def _keys() -> dict[str, str]:
    # A session's token belongs to the keys that stand next to it, not to any that are typed in.
    together = os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY")
    return {
        "access_key_id": _value("AWS_ACCESS_KEY_ID", "Access key id"),
        "secret_access_key": _value("AWS_SECRET_ACCESS_KEY", "Secret access key"),
        "session_token": os.environ.get("AWS_SESSION_TOKEN", "") if together else "",
    }


def _role(role_arn: str) -> dict[str, str]:
    return {"role_arn": role_arn, "external_id": _value("AWS_EXTERNAL_ID", "External id, empty for none", needed=False)}


def _key_file(given: Path | None) -> str:
    path = given or os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if not path:
        die("which key? Give --key-file FILE, or set GOOGLE_APPLICATION_CREDENTIALS.", 2)
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        die(f"{path} isn't UTF-8 text", 2)
    except OSError as error:
        die(f"{path} can't be read: {error.strerror}", 2)


@secret_app.command("list")
def secret_list(org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """List secrets, without values."""
    org = org_of(org)
    found = client_for(url, token, org).list_secrets(org)
    if as_json:
        show(found)
        return
    if not found["secrets"]:
        nothing("secrets")
    for s in found["secrets"]:
        typer.echo(f"{s['secret_id']}  {s['type']:<6} {plain(s['name'])}")


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
