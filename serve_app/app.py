"""The Serve deployment and its FastAPI app: wiring only."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import ray
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from ray import serve
from ray.exceptions import RayError
from starlette.routing import Route

from serve_app import errors, logs
from serve_app.auth import Verifier
from serve_app.cluster import DISPATCHER, ON_HEAD, actor_name, poke_dispatcher
from serve_app.dispatcher import Dispatcher
from serve_app.planner import Planner
from serve_app.quota import Places, RateLimit
from serve_app.routes import health, jobs, journal, secrets
from serve_app.routes.service import Runtime, Service
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.store.jobs import Job, JobStore
from train_loop.spec import JobSpec

PROBLEM = {
    "type": "object",
    "description": "RFC 9457. `detail` is one plain sentence; `errors` names every field at fault.",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}, "input": {}, "allowed": {}},
            },
        },
    },
}
REFUSAL = {
    "description": "Refused, or not possible now.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
ROOMS = (health, journal, jobs, secrets)
MAX_ONGOING = 200  # requests at one replica
MAX_STREAMS = 150  # of those, for the others are to be answered while as many follow their jobs


class RayRuntime:
    """The running jobs, reached through Ray."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._planner = Planner()

    def live_statuses(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        asked = {}
        for job in jobs:
            with contextlib.suppress(ValueError, RayError):
                actor = ray.get_actor(actor_name(job.request_id, job.attempt), namespace=self._settings.ray_namespace)
                asked[actor.status.remote()] = job.request_id
        answers = {}
        if asked:
            done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=self._settings.status_timeout_s)
            for answer in done:
                with contextlib.suppress(RayError):
                    answers[asked[answer]] = ray.get(answer)
        return answers

    def poke(self) -> None:
        poke_dispatcher(self._settings.ray_namespace)

    def plan(self, spec: JobSpec, deadline: float) -> dict[str, Any]:
        return self._planner.plan(spec, deadline)

    def not_ready(self) -> str | None:
        try:
            ray.get(ray.get_actor(DISPATCHER, namespace=self._settings.ray_namespace).ping.remote(), timeout=5)
        except (ValueError, RayError):
            return "the dispatcher doesn't answer"
        return None


def build_app(settings: Settings, store: JobStore, runtime: Runtime) -> FastAPI:
    """The whole HTTP interface over these parts."""
    logs.configure()
    app = FastAPI(
        title="Tuneyard", version=version("tuneyard"), redirect_slashes=False, redoc_url=None, swagger_ui_oauth2_redirect_url=None
    )
    vault, verifier = SecretVault.from_settings(store, settings), Verifier.from_settings(settings)
    plans = Places("plans", settings.max_plans_per_org, settings.max_plans)
    streams = Places("streams", settings.max_streams_per_org, MAX_STREAMS)
    app.state.service = Service(store, settings, vault, runtime, verifier, RateLimit(settings.rate_limit), plans, streams)
    for room in ROOMS:
        app.include_router(room.router)
    for path in (app.docs_url, app.openapi_url):
        (route,) = [r for r in app.routes if isinstance(r, Route) and r.path == path]
        app.add_route(f"{path}/", route.endpoint, include_in_schema=False)
    errors.install(app)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            job = JobSpec.model_json_schema(ref_template="#/components/schemas/{model}")
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(job.pop("$defs"), JobSpec=job)
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}
            schema["security"] = [{"token": []}]
            components["schemas"]["Problem"] = PROBLEM
            for operation in (o for path in schema["paths"].values() for o in path.values()):
                operation["responses"].pop("422", None)  # FastAPI's own shape, which this service never answers with
                operation["responses"] |= {"4XX": REFUSAL, "503": REFUSAL}
            _restore_examples(schema["paths"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _restore_examples(paths: dict[str, Any]) -> None:
    """Show the answers' examples whole: FastAPI leaves what is null out of them, too, and an answer always has its fields."""
    for route in (r for room in ROOMS for r in room.router.routes if isinstance(r, APIRoute) and r.include_in_schema):
        shown = route.responses[200]["content"].get("application/json", {})
        for method in route.methods or ():
            paths[route.path][method.lower()]["responses"]["200"]["content"]["application/json"] |= shown


def _ingress() -> FastAPI:
    settings = Settings.load()
    store = JobStore.open(settings.database_url)
    store.require_current()
    return build_app(settings, store, RayRuntime(settings))


@serve.deployment(name="ingress", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MAX_ONGOING)
@serve.ingress(_ingress)
class Ingress:
    """HTTP in; the FastAPI app is built in the replica."""


def deploy(settings: Settings) -> None:
    """Start the ingress and the dispatcher on the Ray cluster this process is connected to; return once both answer.

    Raises RuntimeError, and starts nothing, when the settings don't allow a service.
    """
    store = JobStore.open(settings.database_url)
    Verifier.from_settings(settings)
    SecretVault.from_settings(store, settings)
    settings.require_shared_store(sum(node["Alive"] for node in ray.nodes()))
    store.require_current()
    named = {"name": DISPATCHER, "namespace": settings.ray_namespace}
    options = named | {"lifetime": "detached", "get_if_exists": True, "resources": ON_HEAD}
    dispatcher = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=4)(Dispatcher).options(**options).remote()
    ingress: Any = Ingress
    serve.run(ingress.bind(), name="tuneyard", route_prefix="/")
    ray.get(dispatcher.ping.remote())
