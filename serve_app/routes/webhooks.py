"""Webhooks: where an org is told that its jobs have ended."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from serve_app.body import read_fields, unknown_names
from serve_app.errors import ApiError, beside, field_error, invalid
from serve_app.outbound import MAX_URL_CHARS
from serve_app.routes import examples
from serve_app.routes.answers import DeletedWebhook, NewWebhook, TestedWebhook, WebhookAnswer, WebhookList, documented, reply
from serve_app.routes.service import UUID_SCHEMA, Asking, Here, json_body, org_named, refusals_noted, refuse_method, uuid_of
from serve_app.store.tables import wire_time
from serve_app.store.webhooks import EVENTS, Webhook

router = APIRouter(tags=["webhooks"])
ALL = sorted(EVENTS.values())
SCOPE = "secrets:write"


def _render(webhook: Webhook) -> WebhookAnswer:
    return {
        "webhook_id": webhook.webhook_id,
        "url": webhook.url,
        "events": webhook.events,
        "created_at": wire_time(webhook.created_at),
    }


BODY = json_body(
    examples.NEW_WEBHOOK,
    {"events": {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"type": "string", "enum": ALL}}},
    org=UUID_SCHEMA,
    url={"type": "string", "minLength": 1, "maxLength": MAX_URL_CHARS},
)


@router.post(
    "/webhook/",
    openapi_extra=BODY,
    responses=documented(NewWebhook, "It is stored, and told from now on.", examples.WEBHOOK_ONCE, refused=[409]),
)
@router.post("/webhook", include_in_schema=False)
async def create(request: Request, asking: Asking, here: Here) -> Response:
    """Store an endpoint that is told when jobs of the org end. The secret that signs its messages is shown this once."""
    asking.require_scope(SCOPE)
    payload, wrong = await read_fields(request, here.settings.max_body_bytes, ("org", "url"), ("events",))
    org, errors = org_named(payload, asking)
    url, events = payload.get("url"), payload.get("events")
    events = ALL if events is None else events
    if not isinstance(url, str) or not url:
        errors.append(field_error("url", "must be a URL" if url else "this field is required"))
    elif fault := here.webhooks.fault_of(url):
        errors.append(field_error("url", fault))
    if not _are_events(events):
        errors.append(field_error("events", f"must be a list of different events, some of {', '.join(ALL)}", allowed=ALL))
    errors = beside(wrong, [*errors, *unknown_names(payload, ("org", "url", "events"))])
    if errors:
        raise invalid(errors)
    webhook, secret = await run_in_threadpool(here.webhooks.create, org, str(url), events, asking.by)
    return reply({**_render(webhook), "secret": secret})


def _are_events(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(v in ALL for v in value) and len(value) == len(set(value))


@router.get("/webhook/list/", responses=documented(WebhookList, "The webhooks.", {"webhooks": [examples.WEBHOOK]}))
@router.get("/webhook/list", include_in_schema=False)
def list_webhooks(asking: Asking, here: Here, org_id: str) -> Response:
    """The org's webhooks, newest first, without their secrets."""
    asking.require_scope(SCOPE)
    org = uuid_of(org_id, "org_id")
    asking.require_org(org)
    return reply({"webhooks": [_render(w) for w in here.webhooks.list(org)]})


@router.post(
    "/webhook/{webhook_id}/test", responses=documented(TestedWebhook, "What came of it.", examples.WEBHOOK_TESTED, refused=[404])
)
@router.post("/webhook/{webhook_id}/test/", include_in_schema=False)
def test(asking: Asking, here: Here, webhook_id: str, org_id: str) -> Response:
    """Send the endpoint a signed message of type webhook.test now, once, and say whether it took it."""
    asking.require_scope(SCOPE)
    org = uuid_of(org_id, "org_id")
    asking.require_org(org)
    webhook = here.webhooks.find(org, uuid_of(webhook_id, "webhook_id"))
    if webhook is None:
        raise ApiError(404, f"no webhook {webhook_id}")
    with here.webhook_tests.hold(org):
        error = here.webhooks.test(webhook)
    return reply({"webhook_id": webhook.webhook_id, "delivered": error is None, "error": error})


refuse_method(router, "DELETE", ("/webhook/list",), allowed="GET")


@router.delete("/webhook/{webhook_id}", responses=documented(DeletedWebhook, "It is gone.", refused=[404]))
@router.delete("/webhook/{webhook_id}/", include_in_schema=False)
def delete(asking: Asking, here: Here, webhook_id: str, org_id: str) -> Response:
    """Delete a webhook, with what it was still to be told."""
    asking.require_scope(SCOPE)
    org = uuid_of(org_id, "org_id")
    named = uuid_of(webhook_id, "webhook_id")
    with refusals_noted(here, asking, "webhook.delete", org, named):
        asking.require_org(org)
        if not here.webhooks.delete(org, named, asking.by):
            raise ApiError(404, f"no webhook {webhook_id}")
    return reply({"webhook_id": webhook_id, "deleted": True})
