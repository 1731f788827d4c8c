"""Submit, read and cancel jobs."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Annotated, Any

import structlog
from anyio import move_on_after, to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from serve_app import traces
from serve_app.access import concerns
from serve_app.auth import Principal
from serve_app.body import read_fields, unknown_names
from serve_app.errors import beside, field_error, invalid
from serve_app.lifecycle import Status
from serve_app.planner import LIMIT_S, too_late
from serve_app.routes import examples
from serve_app.routes.answers import JobAnswer, JobList, Plan, Submitted, documented, reply
from serve_app.routes.service import (
    UUID_SCHEMA,
    Asking,
    Here,
    OfOrg,
    Service,
    find_job,
    is_uuid,
    json_body,
    refusals_noted,
    refuse_method,
    render,
    render_one,
    told,
    uuid_of,
)
from serve_app.store.jobs import Job
from serve_app.validation import PLAIN, SECTIONS, validate
from train_loop.spec import EXPERIMENT_NAME, JobSpec

router = APIRouter(tags=["jobs"])
log = structlog.get_logger()
_of_job = JobSpec.model_json_schema(ref_template="#/components/schemas/{model}")["properties"]
FORM_PARTS: dict[str, dict[str, Any]] = {
    "org": UUID_SCHEMA,
    "experiment_name": {"type": "string", "pattern": EXPERIMENT_NAME},
    **{name: {"type": "string", "contentMediaType": "application/json", "contentSchema": _of_job[name]} for name in SECTIONS},
}
FORM = {
    "type": "object",
    "required": ["org", "experiment_name", "model_details", "dataset_details", "infra_config"],
    "properties": {name: part | {"examples": [examples.FORM[name]]} for name, part in FORM_PARTS.items()},
    "additionalProperties": False,
}
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": FORM, "example": examples.FORM},
            "application/x-www-form-urlencoded": {"schema": FORM, "example": examples.FORM},
            "application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}, "example": examples.SPEC},
        },
    }
}

ANSWERS_S = 0.5  # what a plan that is late has, to say what took it
A_JOB = documented(JobAnswer, "The job.", examples.JOB, refused=[404])
A_CHANGED_JOB = documented(JobAnswer, "The job.", examples.JOB, refused=[404, 409])
NAMED = json_body(examples.NAMED, org_id=UUID_SCHEMA, request_id=UUID_SCHEMA)


@router.post(
    "/job/", openapi_extra=BODY, responses=documented(Submitted, "The job is durable.", examples.SUBMITTED, refused=[409])
)
@router.post("/job", include_in_schema=False)
async def submit(
    request: Request,
    asking: Asking,
    here: Here,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Response:
    """Submit a job. 200 means that it is durable."""
    asking.require_scope("jobs:write")
    payload, wrong = await read_fields(request, here.settings.max_body_bytes, PLAIN, SECTIONS)
    return reply(await run_in_threadpool(_submit, here, asking, payload, wrong, idempotency_key))


@router.post("/job/plan/", openapi_extra=BODY, responses=documented(Plan, "The plan.", examples.PLAN))
@router.post("/job/plan", include_in_schema=False)
async def plan(request: Request, asking: Asking, here: Here) -> Response:
    """What a job would take: workers, memory, tokens, steps, time, price, warnings, rendered samples. Creates nothing."""
    asking.require_scope("jobs:read")
    deadline = time.monotonic() + LIMIT_S
    with move_on_after(LIMIT_S + ANSWERS_S):
        payload, wrong = await read_fields(request, here.settings.max_body_bytes, PLAIN, SECTIONS)
        made = await to_thread.run_sync(_plan, here, asking, payload, wrong, deadline, abandon_on_cancel=True)
        return reply(made)
    raise too_late("reading and checking the request")


def _plan(
    here: Service, asking: Principal, payload: dict[str, Any], wrong: list[dict[str, Any]], deadline: float
) -> dict[str, Any]:
    spec, _ = _accepted(here, asking, payload, wrong)
    with here.plans.hold(spec.org):
        made = here.runtime.plan(spec, deadline)
    return made | {"message": f"It would be: {in_short(spec, here)}"}


def _accepted(
    here: Service, asking: Principal, payload: dict[str, Any], wrong: list[dict[str, Any]]
) -> tuple[JobSpec, list[str]]:
    """The job, of an org the caller speaks for and able to run here, and its warnings. Raises 403, 422 with `wrong`, too."""
    if is_uuid(payload.get("org")):
        asking.require_org(uuid_of(payload["org"], "org"))
    return validate(payload, wrong, here.settings, here.vault, here.store.capacity(), here.store)


def _submit(here: Service, asking: Principal, payload: dict[str, Any], wrong: list[dict[str, Any]], key: str | None) -> Submitted:
    digest = hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()
    with refusals_noted(here, asking, "job.submit", payload.get("org")):
        # A repeated request gets the first one's answer, even if it couldn't be accepted any more.
        job = None if wrong else _replayed(here, asking, payload, key, digest)
        if job is None:
            spec, warnings = _accepted(here, asking, payload, wrong)
            message = " ".join([f"Queued: {in_short(spec, here)}", *(f"Warning: {w}." for w in warnings)])
            most, began_ns = here.settings.max_queued_jobs_per_org, time.time_ns()
            job, created = here.store.insert(spec, message, key, digest, most, by=asking.by)
            if created:
                traces.submitted(job, began_ns)
                log.info("submitted", request_id=job.request_id, org=job.org_id, experiment=job.experiment_name)
                here.runtime.poke()
    concerns(job.request_id)
    return {
        "request_id": job.request_id,
        "status": job.status,
        "message": told(job),
        "experiment_name": job.experiment_name,
    }


def _replayed(here: Service, asking: Principal, payload: dict[str, Any], key: str | None, digest: str) -> Job | None:
    if key is None or not is_uuid(payload.get("org")):
        return None
    org = uuid_of(payload["org"], "org")
    asking.require_org(org)
    return here.store.replay(org, key, digest)


def in_short(spec: JobSpec, here: Service) -> str:
    """The job in a sentence, for a person."""
    infra, hp, quantization = spec.infra_config, spec.train_config.hyperparameters, spec.model_details.quantization
    gpu = f"{infra.gpu_type} x {infra.gpu_count} x {infra.node_count}"
    workers = f"worker{'s' if infra.num_workers > 1 else ''}"
    where = f"{infra.num_workers} {workers} ({gpu})"
    if here.settings.embedded:
        where = f"{infra.num_workers} CPU {workers} on this machine (embedded mode, in place of {gpu})"
    base = spec.model_details.base_model + (f" in {quantization.quant_bits} bit" if quantization else "")
    length = f"{hp.max_steps} steps" if hp.max_steps else f"{hp.num_epochs:g} epoch{'s' if hp.num_epochs != 1 else ''}"
    batch = infra.num_workers * hp.per_device_train_batch_size * hp.gradient_accumulation_steps
    what = f"LoRA r {spec.train_config.adapter_config.r} on" if spec.train_config.train_type == "lora" else "full fine-tuning of"
    return f"{what} {base}, {length} with {batch} samples a step, on {where}; data from {spec.dataset_details.dataset_path}."


@router.get("/job/get/", responses=A_JOB)
@router.get("/job/get", include_in_schema=False)
def get(asking: Asking, here: Here, org_id: str, request_id: str) -> Response:
    """One job."""
    asking.require_scope("jobs:read")
    return reply(render_one(here, find_job(here, asking, request_id, org_id)))


@router.get("/job/list/", responses=documented(JobList, "The page.", examples.JOBS))
@router.get("/job/list", include_in_schema=False)
def list_jobs(
    asking: Asking,
    here: Here,
    org_id: str,
    status: Status | None = None,
    experiment_name: Annotated[str | None, Query(pattern=EXPERIMENT_NAME)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: str | None = None,
) -> Response:
    """The org's jobs, newest first."""
    asking.require_scope("jobs:read")
    org = uuid_of(org_id, "org_id")
    asking.require_org(org)
    try:
        found, following = here.store.list_jobs(org, status=status, experiment_name=experiment_name, limit=limit, cursor=cursor)
    except ValueError:
        raise invalid([field_error("cursor", "not a cursor of this service")]) from None
    return reply({"jobs": render(here, found), "next_cursor": following})


@router.post("/job/cancel/", openapi_extra=NAMED, responses=A_CHANGED_JOB)
@router.post("/job/cancel", include_in_schema=False)
async def cancel(request: Request, asking: Asking, here: Here) -> Response:
    """Stop a job. Again is fine; a job that has ended otherwise is a 409."""
    asking.require_scope("jobs:write")
    return reply(await run_in_threadpool(_cancel, here, asking, **await _job_named(request, here)))


async def _job_named(request: Request, here: Service) -> dict[str, str]:
    """What the body of a call about one job holds: org_id and request_id. Raises 422 with all that is wrong."""
    names = ("org_id", "request_id")
    payload, wrong = await read_fields(request, here.settings.max_body_bytes, names)
    errors = unknown_names(payload, names)
    for name in names:
        if not is_uuid(given := payload.get(name)):
            errors.append(field_error(name, "must be a UUID" if given else "this field is required"))
    if errors := beside(wrong, errors):
        raise invalid(errors)
    return {name: payload[name] for name in names}


def _cancel(here: Service, asking: Principal, request_id: str, org_id: str | None = None) -> JobAnswer:
    with refusals_noted(here, asking, "job.cancel", org_id, request_id):
        job = find_job(here, asking, request_id, org_id)
        job = here.store.request_cancel(job.request_id, asking.by)
    log.info("cancel requested", status=job.status)
    here.runtime.poke()
    return render_one(here, job)


@router.post("/job/resume/", openapi_extra=NAMED, responses=A_CHANGED_JOB)
@router.post("/job/resume", include_in_schema=False)
async def resume(request: Request, asking: Asking, here: Here) -> Response:
    """Queue a FAILED or CANCELED job again, to go on from its last checkpoint; any other is a 409."""
    asking.require_scope("jobs:write")
    return reply(await run_in_threadpool(_resume, here, asking, **await _job_named(request, here)))


def _resume(here: Service, asking: Principal, request_id: str, org_id: str | None = None) -> JobAnswer:
    with refusals_noted(here, asking, "job.resume", org_id, request_id):
        job = find_job(here, asking, request_id, org_id)
        job = here.store.resume(job.request_id, here.settings.max_queued_jobs_per_org, asking.by)
    log.info("resumed")
    here.runtime.poke()
    return render_one(here, job)


# Last, or they would take the words above for ids.
refuse_method(router, "GET", ("/job/plan", "/job/cancel", "/job/resume"), allowed="POST")


@router.get("/job/{request_id}", responses=A_JOB)
@router.get("/job/{request_id}/", include_in_schema=False)
def get_by_path(asking: Asking, here: Here, request_id: str, org_id: OfOrg = None) -> Response:
    """One job, its id in the path."""
    asking.require_scope("jobs:read")
    return reply(render_one(here, find_job(here, asking, request_id, org_id)))


@router.post("/job/{request_id}/cancel", responses=A_CHANGED_JOB)
@router.post("/job/{request_id}/cancel/", include_in_schema=False)
def cancel_by_path(asking: Asking, here: Here, request_id: str, org_id: OfOrg = None) -> Response:
    """Stop a job, its id in the path."""
    asking.require_scope("jobs:write")
    return reply(_cancel(here, asking, request_id, org_id))


@router.post("/job/{request_id}/resume", responses=A_CHANGED_JOB)
@router.post("/job/{request_id}/resume/", include_in_schema=False)
def resume_by_path(asking: Asking, here: Here, request_id: str, org_id: OfOrg = None) -> Response:
    """Queue a FAILED or CANCELED job again, its id in the path."""
    asking.require_scope("jobs:write")
    return reply(_resume(here, asking, request_id, org_id))
