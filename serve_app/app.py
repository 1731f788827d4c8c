"""The FastAPI app of the ingress: wiring only."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import ray
from fastapi import FastAPI
from ray.exceptions import RayError
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app import errors, logs, openapi, swagger, traces
from serve_app.access import Access
from serve_app.auth import Verifier
from serve_app.cluster import actor_name, dispatcher_answers, poke_dispatcher
from serve_app.planner import Planner
from serve_app.quota import Places, RateLimit
from serve_app.routes import health, jobs, journal, secrets, webhooks
from serve_app.routes.service import OF_A_TOKEN, Runtime, Service
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.store.jobs import Job, JobStore
from serve_app.webhooks import Webhooks
from train_loop.spec import JobSpec

ROOMS = (health, journal, jobs, secrets, webhooks)
MAX_ONGOING = 200  # requests at one replica
MAX_WEBHOOK_TESTS, MAX_WEBHOOK_TESTS_PER_ORG = 8, 2  # each may take ten seconds of a thread
DISPATCHER_S = 5.0  # that it has to answer
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
        answers = dispatcher_answers(self._settings.ray_namespace, DISPATCHER_S)
        return None if answers else "the dispatcher doesn't answer"


def build_app(settings: Settings, store: JobStore, runtime: Runtime) -> FastAPI:
    """The whole HTTP interface over these parts."""
    logs.configure()
    app = FastAPI(
        title="Tuneyard",
        version=version("tuneyard"),
        redirect_slashes=False,
        docs_url=None,  # whose page loads scripts from elsewhere: swagger.install has one that doesn't
        redoc_url=None,
        telemetry=traces.of_requests(),
    )
    vault, verifier = SecretVault.from_settings(store, settings), Verifier.from_settings(settings)
    plans = Places("plans", settings.max_plans_per_org, settings.max_plans)
    streams = Places("streams", settings.max_streams_per_org, MAX_STREAMS)
    tests = Places("tests of webhooks", MAX_WEBHOOK_TESTS_PER_ORG, MAX_WEBHOOK_TESTS)
    rate = RateLimit(settings.rate_limit, settings.ingress_replicas or 1)
    told = Webhooks.of(store, vault, settings)
    app.state.service = Service(store, settings, vault, runtime, verifier, rate, plans, streams, told, tests)
    for room in ROOMS:
        # A probe may ask as it likes: what watches a service isn't told off for it.
        app.include_router(room.router, dependencies=[] if room is health else OF_A_TOKEN)
    (document,) = [r for r in app.routes if isinstance(r, Route) and r.path == app.openapi_url]
    app.add_route(f"{app.openapi_url}/", document.endpoint, include_in_schema=False)
    swagger.install(app)
    errors.install(app)
    app.add_middleware(Access)
    openapi.install(app, [room.router for room in ROOMS])
    if settings.root_path:
        app.add_middleware(Below, root_path=settings.root_path)
    return app


class Below:
    """Tells the app below which path a proxy publishes it, so that its document says so; the proxy may strip that or not."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app, self._root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            inside = path == self._root_path or path.startswith(f"{self._root_path}/")
            scope = {**scope, "root_path": self._root_path, "path": path if inside else self._root_path + path}
        await self._app(scope, receive, send)
