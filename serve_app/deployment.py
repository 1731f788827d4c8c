"""The service put on a Ray cluster, a new version put in its place, and taken off again."""

from __future__ import annotations

import contextlib
import time
import uuid
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client  # nothing public tells on which address Serve listens

from serve_app.app import Ingress
from serve_app.auth import Verifier
from serve_app.cluster import DISPATCHER, ON_HEAD
from serve_app.dispatcher import Dispatcher
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.store.jobs import JobStore

APPLICATION = "tuneyard"
NAME_FREE_S = 30.0


def deploy(settings: Settings, host: str, port: int) -> None:
    """Start the ingress and the dispatcher on the Ray cluster this process is connected to; return once both answer.

    Where they run already, they are replaced by ones of this version: the ingress replica by replica, the dispatcher at once. Job
    actors, and with them the jobs that run, are left alone. Raises RuntimeError, and starts nothing, when the settings or what
    else runs on Serve don't allow it.
    """
    store = JobStore.open(settings.database_url)
    Verifier.from_settings(settings)
    SecretVault.from_settings(store, settings)
    settings.require_shared_store(sum(node["Alive"] for node in ray.nodes()))
    store.require_current()
    store.engine.dispose()
    _require_address(host, port)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    except RayError:  # only where Serve didn't run before
        serve.shutdown()
        raise RuntimeError(f"Ray Serve can't listen on {host}:{port} of the head: is the port taken?") from None
    dispatcher = _new_dispatcher(settings.ray_namespace)
    # Ray keeps idle workers, with the code that they have loaded, for whoever has the same environment.
    fresh = {"env_vars": {"TUNEYARD_DEPLOYMENT": uuid.uuid4().hex}}
    # On the head, where the settings are read: a machine that only trains needs none of them, and no key.
    placed = {"num_cpus": 0, "resources": ON_HEAD, "runtime_env": fresh}
    ingress: Any = Ingress
    ingress = ingress.options(num_replicas=settings.ingress_replicas, ray_actor_options=placed)
    serve.run(ingress.bind(), name=APPLICATION, route_prefix="/")
    ray.get(dispatcher.ping.remote())


def undeploy(settings: Settings) -> bool:
    """Take ingress and dispatcher off the cluster, and Serve if nothing else runs on it; False when they weren't there.

    Running jobs go on to their end, and write it down. Nothing starts, retries or stops one until the service is deployed again.
    """
    dispatcher = _dispatcher(settings.ray_namespace)
    if dispatcher is not None:
        ray.kill(dispatcher)
    deployed = APPLICATION in serve.status().applications
    if deployed:
        serve.delete(APPLICATION)
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


def _new_dispatcher(namespace: str) -> Any:
    """A dispatcher of this version, alone under its name.

    The one before it ends without its lease, so the new one acts when that has lapsed; its actor is of this process's Ray job, so
    that neither it nor any job that it starts gets a worker process which has older code loaded.
    """
    before = _dispatcher(namespace)
    if before is not None:
        ray.kill(before)
    options = {"name": DISPATCHER, "namespace": namespace, "lifetime": "detached", "get_if_exists": True, "resources": ON_HEAD}
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=4)(Dispatcher).options(**options)
    given_up_at = time.monotonic() + NAME_FREE_S
    while (dispatcher := actor.remote()) == before:
        if time.monotonic() > given_up_at:
            raise RuntimeError("the dispatcher that runs doesn't end")
        time.sleep(0.1)
    return dispatcher


def _dispatcher(namespace: str) -> Any:
    with contextlib.suppress(ValueError):
        return ray.get_actor(DISPATCHER, namespace=namespace)
    return None
