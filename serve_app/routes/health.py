"""Is the process alive; can the service take and run jobs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from serve_app.errors import ApiError
from serve_app.routes.answers import Health, documented, reply
from serve_app.routes.service import PAUSED, Here
from serve_app.store import pauses
from serve_app.store.tables import wire_time

router = APIRouter(tags=["health"])
NO_TOKEN: dict[str, Any] = {"security": []}


@router.get("/healthz", openapi_extra=NO_TOKEN, responses=documented(Health, "It does."))
@router.get("/healthz/", include_in_schema=False)
@router.head("/healthz", include_in_schema=False)
@router.head("/healthz/", include_in_schema=False)
async def healthz() -> Response:  # takes no thread: all may wait for a store that hangs
    """The process answers."""
    return reply({"status": "ok"})


@router.get("/readyz", openapi_extra=NO_TOKEN, responses=documented(Health, "They do.", refused=[503]))
@router.get("/readyz/", include_in_schema=False)
@router.head("/readyz", include_in_schema=False)
@router.head("/readyz/", include_in_schema=False)
def readyz(here: Here) -> Response:
    """The store answers and the dispatcher lives; 503 says which doesn't. A service that is paused takes jobs, which wait."""
    here.store.ping()
    reason = here.runtime.not_ready()
    if reason is not None:
        raise ApiError(503, reason, headers={"Retry-After": "5"})
    with here.store.read() as tx:
        pause = pauses.current(tx)
    if pause is not None:
        return reply({"status": "paused", "message": f"Since {wire_time(pause.since)}. {PAUSED}"})
    return reply({"status": "ready"})
