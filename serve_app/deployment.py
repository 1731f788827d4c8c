"""The service put on a Ray cluster, a new version put in its place, and taken off again.

`tuneyard serve` calls `deploy`; `serve deploy`, `serve run` and KubeRay's RayService import `build` (serve_app.deployment:build).
All lead to the same application. It starts its dispatcher by itself, so whatever starts the application starts all of it.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client  # nothing public tells on which address Serve listens

from serve_app import metrics
from serve_app.app import MAX_ONGOING, RayRuntime, build_app
from serve_app.auth import Verifier
from serve_app.cluster import DISPATCHER, ON_HEAD
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.store.jobs import JobStore

APPLICATION = "tuneyard"
NAME_FREE_S = 30.0
ANSWER_S = 10.0


class Arguments(BaseModel):
    """`args` of the application in a Serve config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ingress_replicas: int = Field(2, ge=1, description="Processes that answer HTTP, all on the head.")
    release: str = Field("", description="Whatever it is: when it changes, the application is made again.")


def build(args: dict[str, Any]) -> serve.Application:
    """The application, from `args` of a Serve config: see Arguments.

    Reads no settings: Serve has this done on any machine, and only the head has them.
    """
    return _application(Arguments.model_validate(args).ingress_replicas)


def _application(ingress_replicas: int, *, fresh: bool = True) -> serve.Application:
    deployment = time.time_ns()
    # Ray keeps idle workers, with the code that they have loaded, for whoever has the same environment. What the ingress starts
    # (the dispatcher, and that the jobs) inherits this one, so nothing of this deployment runs older code.
    environment = {"env_vars": {"TUNEYARD_DEPLOYMENT": str(deployment)}} if fresh else {}
    # On the head, where the settings are read: a machine that only trains needs none of them, and no key.
    placed = {"num_cpus": 0, "resources": ON_HEAD, "runtime_env": environment}
    ingress: Any = Ingress
    application: serve.Application = ingress.options(num_replicas=ingress_replicas, ray_actor_options=placed).bind(deployment)
    return application


def _asgi_app() -> FastAPI:
    settings = Settings.load()
    store = JobStore.open(settings.database_url)
    metrics.STORE_ERRORS.record(0, process="ingress")
    metrics.STORAGE_OUTAGES.record(0, process="ingress")
    return build_app(settings, store, RayRuntime(settings))


@serve.deployment(name="ingress", max_ongoing_requests=MAX_ONGOING)
@serve.ingress(_asgi_app)
class Ingress:
    """HTTP in; the FastAPI app is built in the replica. Each sees to it that there is a dispatcher of its deployment."""

    def __init__(self, deployment: int) -> None:
        _join(deployment)


def _join(deployment: int) -> None:
    """Check what a replica needs, then have a dispatcher. Raises RuntimeError in words: Serve shows them."""
    try:
        settings = Settings.load()
        _check(settings)
    except RuntimeError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        from serve_app.cli.failures import in_words

        # Without the error itself, whose text may hold a setting's value.
        raise RuntimeError(in_words(error)[0]) from None
    have_dispatcher(settings.ray_namespace, deployment)


def _check(settings: Settings) -> None:
    """Raise RuntimeError when there can't be a service with these settings on this cluster."""
    store = JobStore.open(settings.database_url)
    Verifier.from_settings(settings)
    SecretVault.from_settings(store, settings)
    settings.require_shared_store(sum(node["Alive"] for node in ray.nodes()))
    store.require_current()
    store.engine.dispose()


def deploy(settings: Settings, host: str, port: int) -> None:
    """Start the ingress and the dispatcher on the Ray cluster this process is connected to; return once both answer.

    Where they run already, they are replaced by ones of this version: the ingress replica by replica, the dispatcher by the first
    of these. Job actors, and with them the jobs that run, are left alone. Raises RuntimeError, and starts nothing, when the
    settings or what else runs on Serve don't allow it. Whatever is left undone when this is killed, Serve or the next call does.
    """
    _check(settings)
    _require_address(host, port)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    except RayError:  # only where Serve didn't run before
        serve.shutdown()
        raise RuntimeError(f"Ray Serve can't listen on {host}:{port} of the head: is the port taken?") from None
    # The embedded Ray starts anew with each version, and keeps processes ready for jobs that have no environment of their own.
    application = _application(settings.ingress_replicas or 1, fresh=not settings.embedded)
    serve.run(application, name=APPLICATION, route_prefix="/")
    ray.get(ray.get_actor(DISPATCHER, namespace=settings.ray_namespace).ping.remote())


def undeploy(settings: Settings) -> bool:
    """Take ingress and dispatcher off the cluster, and Serve if nothing else runs on it; False when they weren't there.

    Running jobs go on to their end, and write it down. Nothing starts, retries or stops one until the service is deployed again.
    """
    deployed = APPLICATION in serve.status().applications
    if deployed:
        serve.delete(APPLICATION)
    # After the ingress, whose replicas would start another one.
    dispatcher = _dispatcher(settings.ray_namespace)
    if dispatcher is not None:
        ray.kill(dispatcher)
    if not serve.status().applications:
        serve.shutdown()
    return deployed or dispatcher is not None


def _require_address(host: str, port: int) -> None:
    """Raise RuntimeError when Serve runs already and listens elsewhere, or has another application in our place."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    there = client.http_config
    if (there.host, there.port) != (host, port):
        raise RuntimeError(
            f"Ray Serve runs on this cluster already and listens on {there.host}:{there.port}, which stays so while it runs: "
            f"give --host {there.host} --port {there.port}, or end it with all that runs on it (serve shutdown)"
        )
    for name, application in client.get_serve_details()["applications"].items():
        if name != APPLICATION and application["route_prefix"] == "/":
            raise RuntimeError(
                f"another Serve application, {name}, has the path / on this cluster: end it, or use another cluster"
            )


def have_dispatcher(namespace: str, deployment: int) -> None:
    """Have a dispatcher of this deployment, alone under its name, unless there is one of this or a newer deployment.

    An older one ends without its lease, so the new one acts when that has lapsed. All replicas of a deployment may do this at
    once, and one of an older deployment that starts again leaves the newer dispatcher alone.
    """
    from serve_app.dispatcher import Dispatcher

    before = _dispatcher(namespace)
    if before is not None:
        if _deployment_of(before) >= deployment:
            return
        ray.kill(before)
    options = {"name": DISPATCHER, "namespace": namespace, "lifetime": "detached", "get_if_exists": True, "resources": ON_HEAD}
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=4)(Dispatcher).options(**options)
    given_up_at = time.monotonic() + NAME_FREE_S
    while actor.remote(deployment) == before:
        if time.monotonic() > given_up_at:
            raise RuntimeError("the dispatcher that runs doesn't end")
        time.sleep(0.1)


def _deployment_of(dispatcher: Any) -> int:
    with contextlib.suppress(RayError, AttributeError):  # it doesn't answer, or is of a version that didn't tell
        deployment: int = ray.get(dispatcher.deployment.remote(), timeout=ANSWER_S)
        return deployment
    return 0


def _dispatcher(namespace: str) -> Any:
    with contextlib.suppress(ValueError):
        return ray.get_actor(DISPATCHER, namespace=namespace)
    return None
