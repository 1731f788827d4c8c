"""`tuneyard ...`: start the service on this machine, submit jobs to any, follow them, talk to the result."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from serve_app.client import Client

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help=__doc__)
secret_app = typer.Typer(no_args_is_help=True, help="Keys to buckets, stored encrypted in the service.")
app.add_typer(secret_app, name="secret")

Org = Annotated[str | None, typer.Option(help="Organisation (UUID); default TUNEYARD_ORG, then the last one used.")]
Url = Annotated[str | None, typer.Option(envvar="TUNEYARD_URL", help="The service; default the one running here.")]
Token = Annotated[str | None, typer.Option(envvar="TUNEYARD_TOKEN", help="Bearer token; default one minted here.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]


def _die(message: str, code: int = 1) -> NoReturn:
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
        _die(f"{text!r} isn't an organisation: it must be a UUID", 2)


def _org(given: str | None) -> str:
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
        _die("which organisation? Give --org UUID, or set TUNEYARD_ORG.", 2)


def _client(url: str | None, token: str | None, org: str) -> Client:
    from serve_app.auth import mint_token
    from serve_app.client import Client
    from serve_app.embedded.lifetime import read_state
    from serve_app.settings import Settings

    settings = Settings.load()
    state = read_state(settings.home) or {}
    here: str | None = state["url"] if state.get("ready") else None
    url = url or here
    if url is None:
        _die("Tuneyard isn't running here; start it with: tuneyard up --detach (or give --url and --token)")
    if token is None:
        # A token signed with this home's key opens this home's service, so nobody else gets to see one.
        if url.rstrip("/") != here:
            _die(f"no token for {url}: give --token or set TUNEYARD_TOKEN")
        try:
            token = mint_token(settings, org, "cli", 3600)
        except RuntimeError:
            _die("this home has no token key: give --token or set TUNEYARD_TOKEN")
    try:
        return Client(url, token)
    except ValueError as error:
        _die(str(error), 2)


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
        _die("--org must be a UUID", 2)
    except RuntimeError:
        _die("this home has no token key yet: start the service once with tuneyard up --detach")


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
    org = _org(org)
    made = _client(url, token, org).create_secret(org, name, type_, data)
    typer.echo(json.dumps(made) if as_json else made["secret_id"])


@secret_app.command("list")
def secret_list(org: Org = None, url: Url = None, token: Token = None) -> None:
    """List secrets, without values."""
    org = _org(org)
    for s in _client(url, token, org).list_secrets(org)["secrets"]:
        typer.echo(f"{s['secret_id']}  {s['type']:<4} {s['name']}")


def _yaml_loader() -> Any:
    """YAML 1.2's scalars, which are JSON's: PyYAML's own would read 1e-4 as a string and 2026-01-01 as a date.

    A name given twice is an error, as it is in the service's JSON.
    """
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    for kind, pattern, first in (
        ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
        ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
        ("int", r"-?(?:0|[1-9][0-9]*)", list("-0123456789")),
        ("float", r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?", list("-0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^{pattern}$"), first)
    return Loader


def read_spec(file: Path, overrides: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """The job of a YAML or JSON file, with flags (dotted name → value) and `a.b.c=value` assignments on top."""
    import yaml

    try:
        spec = yaml.load(file.read_text(encoding="utf-8"), _yaml_loader())
    except OSError as error:
        _die(f"{file} can't be read: {error.strerror}", 2)
    except UnicodeDecodeError:
        _die(f"{file} isn't UTF-8 text", 2)
    except yaml.YAMLError as error:
        _die(f"{file} is neither YAML nor JSON: {' '.join(str(error).split())}", 2)
    if not isinstance(spec, dict):
        _die(f"{file} must hold an object with org, experiment_name and the five sections", 2)
    changes = {k: v for k, v in overrides.items() if v is not None}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            _die(f"--set {text}: write it as name=value", 2)
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = value
    for name, value in changes.items():
        at = spec
        *parents, last = name.split(".")
        for i, parent in enumerate(parents):
            if at.get(parent) is None:  # an empty section in YAML is null
                at[parent] = {}
            at = at[parent]
            if not isinstance(at, dict):
                _die(f"{name} can't be set: {'.'.join(parents[: i + 1])} isn't an object", 2)
        at[last] = value
    return spec


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="The job: the JSON body of POST /job/, as YAML or JSON.")],
    name: Annotated[str | None, typer.Option(help="experiment_name")] = None,
    base_model: Annotated[str | None, typer.Option()] = None,
    dataset: Annotated[str | None, typer.Option(help="dataset_path")] = None,
    secret_id: Annotated[str | None, typer.Option()] = None,
    epochs: Annotated[float | None, typer.Option()] = None,
    max_steps: Annotated[int | None, typer.Option()] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    gpu_type: Annotated[str | None, typer.Option()] = None,
    gpu_count: Annotated[int | None, typer.Option()] = None,
    node_count: Annotated[int | None, typer.Option()] = None,
    assign: Annotated[list[str] | None, typer.Option("--set", help="Any field: a.b.c=value")] = None,
    org: Org = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Submit a job."""
    hp = "train_config.hyperparameters"
    overrides = {
        "org": org,
        "experiment_name": name,
        "model_details.base_model": base_model,
        "dataset_details.dataset_path": dataset,
        "dataset_details.secret_id": secret_id,
        f"{hp}.num_epochs": epochs,
        f"{hp}.max_steps": max_steps,
        f"{hp}.learning_rate": learning_rate,
        "infra_config.gpu_type": gpu_type,
        "infra_config.gpu_count": gpu_count,
        "infra_config.node_count": node_count,
    }
    spec = read_spec(file, overrides, assign or [])
    spec["org"] = _org(spec.get("org"))
    answer = _client(url, token, spec["org"]).submit(spec)
    if as_json:
        typer.echo(json.dumps(answer))
    else:
        typer.echo(
            f"{answer['request_id']}  {answer['status']}\n{answer['message']}\nFollow it: tuneyard watch {answer['request_id']}"
        )


RequestId = Annotated[str, typer.Argument(help="The job's request_id.")]


@app.command()
def status(request_id: RequestId, org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Show a job."""
    org = _org(org)
    job = _client(url, token, org).get(request_id, org)
    if as_json:
        typer.echo(json.dumps(job))
    else:
        from serve_app.progress import describe, summary

        typer.echo(f"{job['experiment_name']}  {describe(job)}")
        typer.echo(summary(job))


@app.command("list")
def list_(
    status: Annotated[str | None, typer.Option(help="Only jobs with this status.")] = None,
    limit: Annotated[int, typer.Option()] = 20,
    org: Org = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    org = _org(org)
    page = _client(url, token, org).list_jobs(org, status=status, limit=limit)
    if as_json:
        typer.echo(json.dumps(page))
        return
    for job in page["jobs"]:
        typer.echo(f"{job['request_id']}  {job['status']:<9} {job['created_at'][:19]}  {job['experiment_name']}")


@app.command()
def cancel(request_id: RequestId, org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Stop a job; what it has trained is kept as a checkpoint."""
    org = _org(org)
    job = _client(url, token, org).cancel(request_id, org)
    typer.echo(json.dumps(job) if as_json else f"{job['status']}: it stops at its next step")


@app.command()
def watch(request_id: RequestId, org: Org = None, url: Url = None, token: Token = None) -> None:
    """Follow a job to its end; exit 0 only if it COMPLETED."""
    from serve_app.progress import follow

    org = _org(org)
    try:
        job = follow(_client(url, token, org).watch(request_id, org))
    except KeyboardInterrupt:
        typer.echo(f"\nNot watching any more; the job goes on. Stop it with: tuneyard cancel {request_id}", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(0 if job["status"] == "COMPLETED" else 1)


@app.command()
def chat(
    request_id: RequestId,
    prompt: Annotated[str | None, typer.Option(help="Ask this once; without it, ask as long as you like.")] = None,
    max_new_tokens: Annotated[int, typer.Option()] = 64,
    org: Org = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Compare the base model's answers with those of the adapter a job made."""
    org = _org(org)
    job = _client(url, token, org).get(request_id, org)
    if job["status"] != "COMPLETED":
        _die(f"job {request_id} is {job['status']}: there is no adapter to talk to")
    with tempfile.TemporaryDirectory(prefix="tuneyard-") as folder:
        answers = _chat_model(job, Path(folder))
        if prompt is not None:
            _show(prompt, answers(prompt, max_new_tokens), as_json)
            return
        while True:
            try:
                _show(asked := typer.prompt("you"), answers(asked, max_new_tokens), as_json)
            except (EOFError, KeyboardInterrupt, typer.Abort):
                return


def _chat_model(job: dict[str, Any], folder: Path) -> Any:
    from pyarrow.fs import LocalFileSystem, copy_files

    from serve_app.settings import Settings
    from serve_app.storage import storage_credentials
    from train_loop.chat import Comparison
    from train_loop.data.sources import filesystem_for
    from train_loop.model.load import model_folder
    from train_loop.spec import ModelDetails

    settings = Settings.load()
    source, path = filesystem_for(job["output_model_path"], storage_credentials(settings))
    try:
        copy_files(path, str(folder), source_filesystem=source, destination_filesystem=LocalFileSystem())
    except OSError as error:
        _die(f"the adapter at {job['output_model_path']} can't be read: {str(error).splitlines()[0]}")
    details = ModelDetails.model_validate(job["model_details"])
    return Comparison.load(model_folder(details, Path(settings.model_mirror)), folder, details.quantization).answer


def _show(prompt: str, answers: tuple[str, str], as_json: bool) -> None:
    base, tuned = answers
    if as_json:
        typer.echo(json.dumps({"prompt": prompt, "base": base, "tuned": tuned}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("base model", "your adapter", title=prompt, expand=True, show_lines=True)
    table.add_row(base, tuned)
    Console().print(table)


def main() -> None:
    """Entry point; expected failures are one sentence on stderr and exit code 1."""
    import httpx
    from pydantic import ValidationError

    from serve_app.client import ApiError
    from train_loop.errors import UserError

    try:
        app()
    except ApiError as error:
        sys.exit(str(error))
    except httpx.TransportError as error:
        sys.exit(f"the service can't be reached: {error}")
    except UserError as error:
        sys.exit(error.message)
    except ValidationError as error:
        if error.title != "Settings":
            raise
        # Without the values: a setting may be a secret.
        sys.exit("\n".join(f"TUNEYARD_{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()))


if __name__ == "__main__":
    main()
