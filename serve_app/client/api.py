"""The calls of the HTTP contract, written once for both clients, and what both connections are made with."""

from __future__ import annotations

import ipaddress
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import quote, urlsplit

import httpx

if TYPE_CHECKING:  # what the service builds its answers with is no need of a client
    from serve_app.routes import answers

PLAIN = ("org", "experiment_name")
PLAN_TIMEOUT_S = 60.0
Answer = TypeVar("Answer")
Entry = TypeVar("Entry")


def is_loopback(url: str) -> bool:
    """Whether the URL is on this machine, where no proxy is wanted whatever the environment says."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _is_web(url: str) -> bool:
    try:
        parts, _ = urlsplit(url), httpx.URL(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, httpx.InvalidURL):  # a port that is no number, a bad IPv6 address, a host that DNS can't have
        return False


def options(url: str, token: str, timeout_s: float) -> dict[str, Any]:
    """What both HTTP clients are made with. Raises ValueError for what can be no service's URL, or no token."""
    url, token = url.strip().rstrip("/"), token.strip()
    if not _is_web(url) or not url.isprintable():
        raise ValueError(f"{url!r} isn't the URL of a service: write it as https://host")
    if not token:
        raise ValueError("the token is empty")
    # The HTTP library would refuse such a header too, in an error that quotes the token.
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the token isn't a JWT: it holds blanks or other characters that no token has")
    headers = {"Authorization": f"Bearer {token}"}
    return {"base_url": url, "timeout": timeout_s, "headers": headers, "trust_env": not is_loopback(url)}


def given(**parameters: Any) -> dict[str, Any]:
    """The parameters that aren't None."""
    return {k: v for k, v in parameters.items() if v is not None}


def _form(spec: Mapping[str, Any]) -> dict[str, tuple[None, str]]:
    """The documented multipart form: org and experiment_name as they are, the sections as JSON."""
    return {k: (None, v if k in PLAIN and isinstance(v, str) else json.dumps(v)) for k, v in spec.items()}


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One request, and in its type what answers it: `parts` are the HTTP library's arguments for query, body and headers.

    One that may safely be repeated is retried while the service is away.
    """

    method: str
    path: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    retry: bool = True


@dataclass(frozen=True)
class Stream(Generic[Entry]):
    """What can be followed, and in its type each entry of it."""

    path: str
    params: Mapping[str, Any]


def submit(spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> Call[answers.Submitted]:
    headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
    return Call("POST", "/job/", {"files": _form(spec), "headers": headers})


def plan(spec: Mapping[str, Any]) -> Call[answers.Plan]:
    return Call("POST", "/job/plan/", {"files": _form(spec), "timeout": PLAN_TIMEOUT_S})


def get(request_id: str, org: str) -> Call[answers.JobAnswer]:
    return Call("GET", "/job/get/", {"params": {"org_id": org, "request_id": request_id}})


def list_jobs(
    org: str,
    *,
    status: str | None = None,
    experiment_name: str | None = None,
    limit: int | None = None,
    cursor: str | None = None,
) -> Call[answers.JobList]:
    filters = given(status=status, experiment_name=experiment_name, limit=limit, cursor=cursor)
    return Call("GET", "/job/list/", {"params": {"org_id": org} | filters})


def cancel(request_id: str, org: str) -> Call[answers.JobAnswer]:
    return Call("POST", "/job/cancel/", {"json": {"org_id": org, "request_id": request_id}})


def resume(request_id: str, org: str) -> Call[answers.JobAnswer]:
    return Call("POST", "/job/resume/", {"json": {"org_id": org, "request_id": request_id}}, retry=False)


def metrics(request_id: str, org: str, after_step: int | None = None) -> Call[answers.Points]:
    return Call("GET", "/job/metrics/", {"params": given(org_id=org, request_id=request_id, after_step=after_step)})


def events(request_id: str, org: str, after: int | None = None) -> Call[answers.Events]:
    return Call("GET", "/job/events/", {"params": given(org_id=org, request_id=request_id, after=after)})


def logs(
    request_id: str, org: str, rank: int | None = None, tail: int | None = None, after: int | None = None
) -> Call[answers.Logs]:
    return Call("GET", "/job/logs/", {"params": given(org_id=org, request_id=request_id, rank=rank, tail=tail, after=after)})


def follow_events(request_id: str, org: str, *, after: int | None = None) -> Stream[answers.EventEntry]:
    return Stream("/job/events/", given(org_id=org, request_id=request_id, after=after))


def follow_logs(
    request_id: str, org: str, *, rank: int | None = None, tail: int | None = None, after: int | None = None
) -> Stream[answers.LogEntry]:
    return Stream("/job/logs/", given(org_id=org, request_id=request_id, rank=rank, tail=tail, after=after))


def artifacts(request_id: str, org: str) -> Call[answers.Artifacts]:
    return Call("GET", "/job/artifacts/", {"params": {"org_id": org, "request_id": request_id}})


def create_secret(org: str, name: str, type_: str, data: Mapping[str, str]) -> Call[answers.SecretAnswer]:
    return Call("POST", "/secret/", {"json": {"org": org, "name": name, "type": type_, "data": dict(data)}}, retry=False)


def list_secrets(org: str) -> Call[answers.Secrets]:
    return Call("GET", "/secret/list/", {"params": {"org_id": org}})


def create_webhook(org: str, url: str, events: Sequence[str] | None = None) -> Call[answers.NewWebhook]:
    body = given(org=org, url=url, events=None if events is None else list(events))
    return Call("POST", "/webhook/", {"json": body}, retry=False)


def list_webhooks(org: str) -> Call[answers.WebhookList]:
    return Call("GET", "/webhook/list/", {"params": {"org_id": org}})


def test_webhook(webhook_id: str, org: str) -> Call[answers.TestedWebhook]:
    return Call("POST", f"/webhook/{quote(webhook_id, safe='')}/test", {"params": {"org_id": org}}, retry=False)


def delete_webhook(webhook_id: str, org: str) -> Call[answers.DeletedWebhook]:
    return Call("DELETE", f"/webhook/{quote(webhook_id, safe='')}", {"params": {"org_id": org}}, retry=False)


def delete_secret(secret_id: str, org: str) -> Call[answers.Deleted]:
    return Call("DELETE", f"/secret/{quote(secret_id, safe='')}", {"params": {"org_id": org}}, retry=False)
