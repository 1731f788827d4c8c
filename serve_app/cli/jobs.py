"""Jobs: submitted, looked at, stopped, resumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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
from serve_app.cli.job_file import takes_job

if TYPE_CHECKING:
    from serve_app.client import JobAnswer


@app.command()
@takes_job
def submit(spec: dict[str, Any], url: str | None, token: str | None, as_json: bool) -> None:
    """Submit a job."""
    answer = client_for(url, token, spec["org"]).submit(spec)
    if as_json:
        show(answer)
    else:
        typer.echo(
            f"{answer['request_id']}  {answer['status']}\n{plain(answer['message'])}\n"
            f"Follow it: tuneyard watch {answer['request_id']}"
        )


@app.command()
def status(request_id: RequestId, org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Show a job."""
    org = org_of(org)
    job = client_for(url, token, org).get(request_id, org)
    if as_json:
        show(job)
    else:
        from serve_app.progress import describe, summary

        typer.echo(f"{job['experiment_name']}  {describe(job)}")
        typer.echo(summary(job))


@app.command("list")
def list_(
    status: Annotated[str | None, typer.Option(help="Only jobs with this status.")] = None,
    name: Annotated[str | None, typer.Option(help="Only jobs with this experiment_name.")] = None,
    limit: Annotated[int, typer.Option(help="Jobs on a page.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="The next_cursor of the page before.")] = None,
    org: Org = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    org = org_of(org)
    status = status and status.upper()
    page = client_for(url, token, org).list_jobs(org, status=status, experiment_name=name, limit=limit, cursor=cursor)
    if as_json:
        show(page)
        return
    if not page["jobs"]:
        nothing("such jobs" if status or name else "jobs yet")
    for job in page["jobs"]:
        typer.echo(
            f"{job['request_id']}  {job['status']:<9} {job['created_at'][:19]}  {job['experiment_name']}  {_note(job)}".rstrip()
        )
    if page["next_cursor"]:
        typer.echo(f"there are more: --cursor {page['next_cursor']}", err=True)


def _note(job: JobAnswer) -> str:
    """What one wants to know of a job at a glance, by its status."""
    match job["status"]:
        case "QUEUED":
            return f"position {job['queue_position']}" if job["queue_position"] else ""
        case "RUNNING":
            return f"{job['phase']} {job['progress']:.0%}"
        case "FAILED":
            return job["error_code"] or ""
    return ""


@app.command()
def cancel(request_id: RequestId, org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Stop a job; what it has trained is kept as a checkpoint."""
    org = org_of(org)
    job = client_for(url, token, org).cancel(request_id, org)
    show(job) if as_json else typer.echo(
        f"{job['status']}: {plain(job['message']) if job['status'] == 'CANCELED' else 'it stops at its next step'}"
    )


@app.command()
def resume(request_id: RequestId, org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Queue a FAILED or CANCELED job again; it goes on from its last checkpoint."""
    org = org_of(org)
    job = client_for(url, token, org).resume(request_id, org)
    show(job) if as_json else typer.echo(f"{job['status']}: {plain(job['message'])}")


@app.command()
def watch(request_id: RequestId, org: Org = None, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Follow a job to its end; exit 0 only if it COMPLETED. JSON is one line for each change."""
    org = org_of(org)
    states = client_for(url, token, org).watch(request_id, org)
    with while_it_goes_on(request_id):
        if as_json:
            job = None
            for state in states:
                if state != job:
                    show(job := state)
        else:
            from serve_app.progress import follow

            job = follow(states)
    raise typer.Exit(0 if job and job["status"] == "COMPLETED" else 1)
