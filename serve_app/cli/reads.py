"""What a job tells and leaves behind: metrics, logs, events, files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from serve_app.cli.common import (
    AsJson,
    Org,
    RequestId,
    Token,
    Url,
    app,
    client_for,
    nothing,
    org_of,
    plain,
    show,
    while_it_goes_on,
)

if TYPE_CHECKING:
    from serve_app.client import Client, EventEntry, LogEntry

Entry = TypeVar("Entry", bound=Mapping[str, Any])
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")]


def _pages(fetch: Callable[[int | None], list[Entry]], key: str) -> list[Entry]:
    """All entries of what the service gives in pages, each asked for after the last one's `key`."""
    found: list[Entry] = []
    while page := [e for e in fetch(found[-1][key] if found else None) if not found or e[key] > found[-1][key]]:
        found += page
    return found


@app.command()
def metrics(
    request_id: RequestId,
    after_step: Annotated[int | None, typer.Option(help="Only later steps.")] = None,
    org: Org = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Plot a job's loss."""
    org = org_of(org)
    client = client_for(url, token, org)
    points = _pages(lambda last: client.metrics(request_id, org, after_step if last is None else last)["points"], "step")
    show({"points": points}) if as_json else typer.echo(plot(points))


def plot(points: Sequence[Mapping[str, Any]]) -> str:
    """Training and evaluation loss over steps as a picture in characters, and the last point's numbers."""
    curves = {name: [(p["step"], p[name]) for p in points if _is_number(p.get(name))] for name in ("loss", "eval_loss")}
    if not any(curves.values()):
        return "no metrics yet"
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(min(100, shutil.get_terminal_size((100, 24)).columns), 20)
    for name, curve in curves.items():
        if curve:
            steps, values = zip(*curve, strict=True)
            plotext.plot(steps, values, label=name, marker="braille" if name == "loss" else "x")
    plotext.xlabel("step")
    picture = plotext.uncolorize(plotext.build())
    numbers = "  ".join(f"{k} {v:g}" for k, v in points[-1].items() if _is_number(v) and k != "time")
    return f"{picture}\n{numbers}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tell(entries: Iterable[Entry], as_json: bool, text: Callable[[Entry], str], request_id: str) -> None:
    with while_it_goes_on(request_id):
        for entry in entries:
            typer.echo(json.dumps(entry) if as_json else plain(text(entry)))


@app.command()
def events(
    request_id: RequestId, follow: Follow = False, org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False
) -> None:
    """Show what happened to a job; JSON is one object a line."""
    org = org_of(org)
    client = client_for(url, token, org)
    entries: Iterable[EventEntry] = client.follow_events(request_id, org) if follow else _events(client, request_id, org)
    _tell(entries, as_json, lambda e: f"{e['time'][:19]}  {e['kind']:<18} {e['message']}", request_id)


def _events(client: Client, request_id: str, org: str) -> list[EventEntry]:
    return _pages(lambda last: client.events(request_id, org, last)["events"], "id")


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
        entries: Iterable[LogEntry] = client.follow_logs(request_id, org, rank=rank, tail=tail)
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
    if not answer["files"]:
        nothing("files yet")
    for file in answer["files"]:
        typer.echo(f"{file['size_bytes']:>12,}  {(file['sha256'] or '')[:12]:<12}  {plain(file['name'])}")


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
    saved = client_for(url, token, org).download(request_id, org, target)
    if as_json:
        show({"files": [str(path) for path in saved]})
        return
    typer.echo(f"{len(saved)} files in {target}" if saved else "the job has no files yet")
    if saved and not any(path.relative_to(target).parts[0] in ("adapter", "merged") for path in saved):
        typer.echo("no adapter is among them: a job has one once it is COMPLETED", err=True)
