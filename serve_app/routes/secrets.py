"""Store, list and delete secrets. Values go in and never come out."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from serve_app.body import read_fields, unknown_names
from serve_app.errors import ApiError, beside, field_error, invalid
from serve_app.routes import examples
from serve_app.routes.answers import Deleted, SecretAnswer, Secrets, documented, reply
from serve_app.routes.service import UUID_SCHEMA, Asking, Here, json_body, org_named, refusals_noted, refuse_method, uuid_of
from serve_app.secret_types import TYPES, data_schema, faults
from serve_app.secrets import Secret
from serve_app.store.tables import wire_time

router = APIRouter(tags=["secrets"])
MAX_NAME_CHARS = 128


def _render(secret: Secret) -> SecretAnswer:
    return {
        "secret_id": secret.secret_id,
        "name": secret.name,
        "type": secret.type,
        "created_at": wire_time(secret.created_at),
    }


BODY = json_body(
    examples.NEW_SECRET,
    org=UUID_SCHEMA,
    name={"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS},
    type={"type": "string", "enum": sorted(TYPES)},
    data=data_schema(),
)


@router.post("/secret/", openapi_extra=BODY, responses=documented(SecretAnswer, "It is stored.", examples.SECRET))
@router.post("/secret", include_in_schema=False)
async def create(request: Request, asking: Asking, here: Here) -> Response:
    """Store a secret."""
    asking.require_scope("secrets:write")
    payload, wrong = await read_fields(request, here.settings.max_body_bytes, ("org", "name", "type"), ("data",))
    org, errors = org_named(payload, asking)
    name, type_, data = payload.get("name"), payload.get("type"), payload.get("data")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        errors.append(field_error("name", f"must be a string of 1 to {MAX_NAME_CHARS} characters"))
    if not isinstance(type_, str):
        errors.append(field_error("type", "this field is required", allowed=sorted(TYPES)))
    if not isinstance(data, dict):
        errors.append(field_error("data", "must be an object"))
    if isinstance(type_, str) and isinstance(data, dict):
        errors += faults(type_, data)
    errors = beside(wrong, [*errors, *unknown_names(payload, ("org", "name", "type", "data"))])
    if errors:
        raise invalid(errors)
    return reply(_render(await run_in_threadpool(here.vault.create, org, str(name), str(type_), data or {}, asking.by)))


@router.get("/secret/list/", responses=documented(Secrets, "The secrets.", {"secrets": [examples.SECRET]}))
@router.get("/secret/list", include_in_schema=False)
def list_secrets(asking: Asking, here: Here, org_id: str) -> Response:
    """The org's secrets, without values."""
    asking.require_scope("secrets:write")
    org = uuid_of(org_id, "org_id")
    asking.require_org(org)
    return reply({"secrets": [_render(s) for s in here.vault.list(org)]})


refuse_method(router, "DELETE", ("/secret/list",), allowed="GET")


@router.delete("/secret/{secret_id}", responses=documented(Deleted, "It is gone.", refused=[404]))
@router.delete("/secret/{secret_id}/", include_in_schema=False)
def delete(asking: Asking, here: Here, secret_id: str, org_id: str) -> Response:
    """Delete a secret. Jobs that name it and haven't started will fail."""
    asking.require_scope("secrets:write")
    org = uuid_of(org_id, "org_id")
    named = uuid_of(secret_id, "secret_id")
    with refusals_noted(here, asking, "secret.delete", org, named):
        asking.require_org(org)
        if not here.vault.delete(org, named, asking.by):
            raise ApiError(404, f"no secret {secret_id}")
    return reply({"secret_id": secret_id, "deleted": True})
