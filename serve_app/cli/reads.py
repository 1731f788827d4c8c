"""What a job tells and leaves behind: metrics, logs, events, files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from serve_app.cli.common import AsJson, Org, RequestId, Token, Url, app, client_for, die, org_of, show

Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")]


@app.command()
def metrics(request_id: RequestId, org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Plot a job's loss."""
    org = org_of(org)
    answer = client_for(url, token, org).metrics(request_id, org)
    if as_json:
        show(answer)
        return
    points = answer["points"]
    curves = {name: [(p["step"], p[name]) for p in points if name in p] for name in ("loss", "eval_loss")}
    if not any(curves.values()):
        typer.echo("no metrics yet")
        return
    import plotext

    plotext.theme("clear")
    plotext.plot_size(min(100, plotext.terminal_width() or 100), 20)
    for name, curve in curves.items():
        if curve:
            steps, values = zip(*curve, strict=True)
            plotext.plot(steps, values, label=name, marker="braille" if name == "loss" else "x")
    plotext.xlabel("step")
    typer.echo(plotext.build())
    last = points[-1]
    typer.echo("  ".join(f"{k} {v:g}" for k, v in last.items() if isinstance(v, int | float) and k != "time"))


def _tell(entries: Iterable[dict[str, Any]], as_json: bool, text: Callable[[dict[str, Any]], str], request_id: str) -> None:
    try:
        for entry in entries:
            typer.echo(json.dumps(entry) if as_json else text(entry))
    except KeyboardInterrupt:
        typer.echo(f"\nNot following any more; the job goes on. Stop it with: tuneyard cancel {request_id}", err=True)
        raise typer.Exit(130) from None


@app.command()
def events(
    request_id: RequestId, follow: Follow = False, org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False
) -> None:
    """Show what happened to a job; JSON is one object a line."""
    org = org_of(org)
    client = client_for(url, token, org)
    entries = client.follow("events", request_id, org) if follow else client.events(request_id, org)["events"]
    _tell(entries, as_json, lambda e: f"{e['time'][:19]}  {e['kind']:<18} {e['message']}", request_id)


@app.command()
def logs(
    request_id: RequestId,
    follow: Follow = False,
    rank: Annotated[int | None, typer.Option(help="Only this worker's lines.")] = None,
    tail: Annotated[int | None, typer.Option(help="Only the last lines.")] = None,
    org: Org = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show what a job's workers logged; JSON is one object a line."""
    org = org_of(org)
    client = client_for(url, token, org)
    if follow:
        entries: Iterable[dict[str, Any]] = client.follow("logs", request_id, org, rank=rank, tail=tail)
    else:
        entries = client.logs(request_id, org, rank, tail)["logs"]
    _tell(entries, as_json, lambda e: f"{e['time'][:19]}  [{e['rank']}] {e['line']}", request_id)


@app.command()
def artifacts(request_id: RequestId, org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """List a job's files."""
    org = org_of(org)
    answer = client_for(url, token, org).artifacts(request_id, org)
    if as_json:
        show(answer)
        return
    for file in answer["files"]:
        typer.echo(f"{file['size_bytes']:>12,}  {(file['sha256'] or '')[:12]:<12}  {file['name']}")


@app.command()
def download(
    request_id: RequestId,
    folder: Annotated[Path | None, typer.Argument(help="Where to; default ./<request_id>.")] = None,
    org: Org = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a job's files, each checked against its sha256."""
    org = org_of(org)
    target = folder or Path(request_id)
    target.mkdir(parents=True, exist_ok=True)
    try:
        saved = client_for(url, token, org).download(request_id, org, target)
    except ValueError as error:
        die(str(error))
    if as_json:
        show({"files": [str(path) for path in saved]})
    else:
        typer.echo(f"{len(saved)} files in {target}" if saved else "the job has no files yet")
