"""The service on a Ray cluster of your own."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from serve_app.cli.common import AsJson, app, die, show
from serve_app.cli.failures import UNREACHABLE, in_words
from serve_app.reach import CannotReach, TokenRefused, connect

DEPLOY_S = 300.0
READY_S = 60.0
EVERYWHERE = ("0.0.0.0", "::")


@app.command()
def serve(
    address: Annotated[str, typer.Option(help="Ray's address; default the cluster that this machine is part of.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on, of the cluster's head.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    stop: Annotated[
        bool, typer.Option("--stop", help="Take the service off the cluster; running jobs go on to their end.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put the service on a running Ray cluster, or this version in place of the one there.

    The settings that count are those of the head: TUNEYARD_ variables that `ray start` had there, and <home>/settings.json.
    """
    told = _on_head(address, _undeploy) if stop else _on_head(address, _deploy, host, port)
    if "error" in told:
        die(told["error"])
    if as_json:
        show(told)
    elif stop:
        typer.echo("Tuneyard is off this cluster." if told["was_running"] else "Tuneyard doesn't run on this cluster.", err=True)
    else:
        typer.echo(f"Tuneyard is up: {told['url']} (API docs: {told['url']}/docs)")


def _on_head(address: str, work: Any, *arguments: Any) -> dict[str, Any]:
    """What `work` answers in a process of the head's: there the service's settings are read, so there they are checked."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    from serve_app.cluster import ON_HEAD

    try:
        connect(address)
    except TokenRefused as refused:
        die(str(refused))
    except CannotReach as away:
        die(str(away), UNREACHABLE)
    try:
        told: dict[str, Any] = ray.get(
            ray.remote(num_cpus=0, max_retries=0, resources=ON_HEAD)(work).remote(*arguments), timeout=DEPLOY_S
        )
        return told
    except GetTimeoutError:
        die(f"the service isn't up after {DEPLOY_S:g} s: see Ray's logs on the head; is there a head that takes work?")
    except RayError as error:
        die(f"the head's process that was to do it ended: {type(error).__name__}; see Ray's logs on the head")
    finally:
        ray.shutdown()


def _deploy(host: str, port: int) -> dict[str, Any]:
    """The body of a Ray task. Failures are told in words: Ray keeps an exception's text, which may hold a setting's value."""
    import ray

    from serve_app.deployment import deploy
    from serve_app.settings import Settings

    try:
        deploy(Settings.load(), host, port)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        return {"error": _in_words(error)}
    url = f"http://{ray.util.get_node_ip_address() if host in EVERYWHERE else host}:{port}"
    reason = _until_ready(url)
    return {"error": f"deployed, but {url}/readyz doesn't say that it is ready: {reason}"} if reason else {"url": url}


def _undeploy() -> dict[str, Any]:
    """The body of a Ray task, like _deploy."""
    from serve_app.deployment import undeploy
    from serve_app.settings import Settings

    try:
        return {"was_running": undeploy(Settings.load())}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        return {"error": _in_words(error)}


def _in_words(error: Exception) -> str:
    return str(error) if type(error) is RuntimeError else in_words(error)[0]


def _until_ready(url: str) -> str | None:
    """None once it answers that it is ready; after a while, what it says instead."""
    import httpx

    given_up_at = time.monotonic() + READY_S
    while True:
        try:
            answer = httpx.get(f"{url}/readyz", timeout=5, trust_env=False)
            reason = None if answer.is_success else f"{answer.status_code} {answer.text[:300]}"
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
        if reason is None or time.monotonic() > given_up_at:
            return reason
        time.sleep(0.5)
