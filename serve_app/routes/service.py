"""What every route needs: the store, the settings, the vault, the way to the running jobs, and who is asking."""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import Depends, Header, Request

from serve_app.auth import Principal, authenticate
from serve_app.errors import ApiError, field_error, invalid
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.store.jobs import Job, JobStore


class Runtime(Protocol):
    """The running side of the service."""

    def live_status(self, request_id: str) -> dict[str, Any] | None:
        """What the job's actor says now, or None when it is gone or slow."""
        ...

    def poke(self) -> None:
        """Have the dispatcher look now. Never raises."""
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


def service(request: Request) -> Service:
    """The app's Service."""
    found: Service = request.app.state.service
    return found


def principal(request: Request, authorization: Annotated[str | None, Header()] = None) -> Principal:
    """Who is asking. Raises 401."""
    return authenticate(authorization, service(request).settings)


Asking = Annotated[Principal, Depends(principal)]
Here = Annotated[Service, Depends(service)]


def uuid_of(value: Any, field: str) -> str:
    """A canonical UUID. Raises 422 naming the field."""
    try:
        return str(uuid.UUID(str(value)))
    except ValueError:
        raise invalid([field_error(field, "must be a UUID" if value else "this field is required")]) from None


def find_job(here: Service, asking: Principal, request_id: str, org_id: str | None) -> Job:
    """The job, if the caller may know of it. Raises 403 for a foreign org, 404 otherwise."""
    if org_id is not None:
        asking.require_org(uuid_of(org_id, "org_id"))
    job = here.store.get(uuid_of(request_id, "request_id"))
    allowed = {uuid_of(org_id, "org_id")} if org_id is not None else asking.orgs
    if job is None or job.org_id not in allowed:
        raise ApiError(404, f"no job {request_id}")
    return job


def _time(value: dt.datetime | None) -> str | None:
    return None if value is None else value.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def render(here: Service, job: Job) -> dict[str, Any]:
    """A job on the wire: the store's row, overlaid with what its actor says now."""
    live = here.runtime.live_status(job.request_id) if job.status == "RUNNING" else None
    now = dt.datetime.now(dt.UTC)
    wire = {
        "request_id": job.request_id,
        "org": job.org_id,
        "experiment_name": job.experiment_name,
        "status": str(job.status),
        "phase": str(job.phase),
        "message": job.message,
        "progress": job.progress,
        "step": job.step,
        "total_steps": job.total_steps,
        "epoch": job.epoch,
        "eta_s": job.eta_s,
        "created_at": _time(job.created_at),
        "updated_at": _time(now if live else job.updated_at),
        "started_at": _time(job.started_at),
        "completed_at": _time(job.completed_at),
        "queue_position": here.store.queue_position(job),
        "attempt": job.attempt,
        **{
            name: job.spec[name]
            for name in ("dataset_config", "model_details", "train_config", "dataset_details", "infra_config")
        },
        "metrics": job.metrics,
        "output_model_path": job.output_model_path,
        "error_message": job.error_message,
        "error_code": job.error_code,
    }
    return wire | {k: v for k, v in (live or {}).items() if k in wire}
