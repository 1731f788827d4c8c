"""What every route needs: the store, the settings, the vault, the way to the running jobs, and who is asking."""

from __future__ import annotations

import contextlib
import datetime as dt
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol, cast

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.dependencies.utils import get_flat_params, request_params_to_args  # nothing public tells what a call takes
from fastapi.params import Query as QueryParameter
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from serve_app.access import concerns
from serve_app.auth import Principal, Verifier
from serve_app.body import unknown_names
from serve_app.errors import ApiError, field_error, invalid, parameter_errors, to_api_error
from serve_app.lifecycle import Status
from serve_app.quota import Places, RateLimit
from serve_app.routes.answers import JobAnswer, JobMetrics
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.store.audit import add_entry
from serve_app.store.jobs import Conflict, Job, JobStore
from serve_app.store.tables import wire_time
from serve_app.webhooks import Webhooks
from train_loop.spec import JobSpec


class Runtime(Protocol):
    """The running side of the service."""

    def live_statuses(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """By request_id, what these jobs' actors say now, all asked at once; without those that are gone or slow."""
        ...

    def poke(self) -> None:
        """Have the dispatcher look now. Never raises."""
        ...

    def plan(self, spec: JobSpec, deadline: float) -> dict[str, Any]:
        """The job's plan, if it can be made until `deadline`, of time.monotonic().

        Raises UserError where the job would fail at once, RunFault where a storage is away, ApiError 503 where it takes too long
        or too much.
        """
        ...

    def not_ready(self) -> str | None:
        """Why the service can't run jobs, or None."""
        ...


@dataclass(frozen=True)
class Service:
    """Handed to the routes as app.state.service."""

    store: JobStore
    settings: Settings
    vault: SecretVault
    runtime: Runtime
    verifier: Verifier
    rate_limit: RateLimit
    plans: Places
    streams: Places
    webhooks: Webhooks
    webhook_tests: Places


# These two take no thread: on cores that train, each waits for its turn.
async def service(request: Request) -> Service:
    """The app's Service."""
    found: Service = request.app.state.service
    return found


Here = Annotated[Service, Depends(service)]


async def principal(
    here: Here,
    request: Request,
    authorization: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Principal:
    """Who is asking. Raises 401, 429."""
    verify = here.verifier.authenticate
    asking = await run_in_threadpool(verify, authorization) if here.verifier.may_wait else verify(authorization)
    asking = replace(asking, address=request.client.host if request.client else None)
    here.rate_limit.check(_charged(asking, request.query_params.get("org_id")))
    return asking


def _charged(asking: Principal, org_id: str | None) -> str:
    """Whose rate a request counts for: the org it names, or the token's only one.

    A token of several orgs that names its own by job or in the body, which isn't read yet, counts for these orgs together.
    """
    named = {str(uuid.UUID(org_id))} if is_uuid(org_id) else asking.orgs
    return " ".join(sorted(named & asking.orgs or asking.orgs))


Asking = Annotated[Principal, Depends(principal)]


async def known_query(request: Request) -> None:
    """Refuse a query that holds a name which the call doesn't know. Raises 422 with all that is wrong in the query."""
    given = request.query_params
    takes = [p for p in get_flat_params(request.scope["route"].dependant) if isinstance(p.field_info, QueryParameter)]
    known = [p.alias for p in takes]
    if strange := unknown_names(given, known):
        _, errors = request_params_to_args(takes, given)
        raise invalid([*strange, *parameter_errors(errors)])


OF_A_TOKEN = [Depends(principal), Depends(known_query)]  # what comes before every call that takes one


def refuse_method(router: APIRouter, method: str, paths: Iterable[str], *, allowed: str) -> None:
    """Answer 405 to a method that these paths don't have, before a path with an id in it takes their last word for one."""

    async def refuse(request: Request) -> Response:
        raise HTTPException(405, headers={"Allow": allowed})

    for path in paths:
        for each in (path, f"{path}/"):
            router.add_route(each, refuse, methods=[method], include_in_schema=False)


def is_uuid(value: Any) -> bool:
    """Whether this is a UUID in text."""
    try:
        uuid.UUID(value)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def uuid_of(value: Any, field: str) -> str:
    """A canonical UUID. Raises 422 naming the field."""
    if not is_uuid(value):
        raise invalid([field_error(field, "must be a UUID" if value else "this field is required")])
    return str(uuid.UUID(value))


def org_named(payload: dict[str, Any], asking: Principal) -> tuple[str, list[dict[str, Any]]]:
    """The org in a body, or what is wrong with it, to be said with what else is. Raises 403 for a foreign one."""
    if not is_uuid(given := payload.get("org")):
        return "", [field_error("org", "must be a UUID" if given else "this field is required")]
    org = uuid_of(given, "org")
    asking.require_org(org)
    return org, []


OfOrg = Annotated[str | None, Query(description="The job's org; another one's job isn't found.")]


def find_job(here: Service, asking: Principal, request_id: str, org_id: str | None) -> Job:
    """The job, if the caller may know of it. Raises 403 for a foreign org, 404 otherwise."""
    if org_id is not None:
        asking.require_org(uuid_of(org_id, "org_id"))
    job = here.store.get(uuid_of(request_id, "request_id"))
    allowed = {uuid_of(org_id, "org_id")} if org_id is not None else asking.orgs
    if job is None or job.org_id not in allowed:
        raise ApiError(404, f"no job {request_id}")
    concerns(job.request_id)
    return job


@contextlib.contextmanager
def refusals_noted(here: Service, asking: Principal, action: str, org_id: Any, object_: str | None = None) -> Iterator[None]:
    """Have it in the audit log when what is done inside is refused: to this caller, or because of how things stand."""
    try:
        yield
    except (ApiError, Conflict) as error:
        refused = to_api_error(error)
        if refused.status in (403, 404, 409):
            org = str(uuid.UUID(org_id)) if is_uuid(org_id) else None
            with here.store.write() as tx:
                add_entry(tx, asking.by, action, object_, org_id=org, outcome=f"refused: {refused.detail}")
        raise


def json_body(
    example: dict[str, Any], optional: dict[str, dict[str, Any]] | None = None, **required: dict[str, Any]
) -> dict[str, Any]:
    """OpenAPI's description of a JSON object that a route reads by itself; no other property is taken."""
    properties = {**required, **(optional or {})}
    schema = {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}}


FRESH_S = 2.0
PAUSED = "The operator has paused the service: nothing starts until it goes on."
MAX_ID = 2**63 - 1  # the databases' largest integer
MAX_STEP = 2**31 - 1  # the largest of their columns for steps
UUID_SCHEMA = {"type": "string", "format": "uuid"}


def told(job: Job) -> str:
    """What its owner is told about it now."""
    waits = job.status is Status.QUEUED or (job.status is Status.RUNNING and not job.open)
    return f"{job.message} {PAUSED}" if job.paused and waits and job.ray_job is None else job.message


def render(here: Service, jobs: Sequence[Job]) -> list[JobAnswer]:
    """Jobs on the wire: the store's rows, overlaid with what their actors say now."""
    # What a running job's actor wrote a moment ago is as good as asking it, and costs no way through Ray.
    fresh = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=FRESH_S)
    live = here.runtime.live_statuses([job for job in jobs if job.open and job.updated_at < fresh])
    positions = here.store.queue_positions(jobs)
    return [_render(job, live.get(job.request_id), positions.get(job.request_id)) for job in jobs]


def render_one(here: Service, job: Job) -> JobAnswer:
    """One job on the wire."""
    return render(here, [job])[0]


def _render(job: Job, live: dict[str, Any] | None, queue_position: int | None) -> JobAnswer:
    now = dt.datetime.now(dt.UTC)
    wire: JobAnswer = {
        "request_id": job.request_id,
        "org": job.org_id,
        "experiment_name": job.experiment_name,
        "status": job.status,
        "phase": job.phase,  # as it is: while a new version comes, the other one's actors write it too
        "message": told(job),
        "progress": job.progress,
        "step": job.step,
        "total_steps": job.total_steps,
        "epoch": job.epoch,
        "eta_s": job.eta_s,
        "created_at": wire_time(job.created_at),
        "updated_at": wire_time(now if live else job.updated_at),
        "started_at": None if job.started_at is None else wire_time(job.started_at),
        "completed_at": None if job.completed_at is None else wire_time(job.completed_at),
        "queue_position": queue_position,
        "attempt": job.attempt,
        "ray_job": job.ray_job,
        "dataset_config": job.spec["dataset_config"],
        "model_details": job.spec["model_details"],
        "train_config": job.spec["train_config"],
        "dataset_details": job.spec["dataset_details"],
        "infra_config": job.spec["infra_config"],
        "metrics": cast(JobMetrics, job.metrics),
        "output_model_path": job.output_model_path,
        "error_message": job.error_message,
        "error_code": job.error_code,
    }
    return cast(JobAnswer, wire | {k: v for k, v in (live or {}).items() if k in wire})
