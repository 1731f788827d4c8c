"""Is the process alive; can the service take and run jobs."""

from __future__ import annotations

from fastapi import APIRouter

from serve_app.errors import ApiError
from serve_app.routes.service import Here

router = APIRouter(tags=["health"])


@router.get("/healthz")
@router.get("/healthz/", include_in_schema=False)
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
@router.get("/readyz/", include_in_schema=False)
def readyz(here: Here) -> dict[str, str]:
    """The store answers and the dispatcher lives; 503 says which doesn't."""
    here.store.ping()
    reason = here.runtime.not_ready()
    if reason is not None:
        raise ApiError(503, reason, headers={"Retry-After": "5"})
    return {"status": "ready"}
