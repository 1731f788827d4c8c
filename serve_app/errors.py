"""Problems as the client sees them (RFC 9457), and the one place where an exception becomes a status code."""

from __future__ import annotations

import difflib
import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from serve_app import metrics
from serve_app.store.jobs import STORE_AWAY, Conflict, QueueFull
from train_loop.errors import Cause, RunFault, UserError
from train_loop.section import models_in, section_of
from train_loop.spec import JobSpec

log = structlog.get_logger()
INPUT_CHARS = 200
RETRY_AFTER_S = "5"
QUEUE_RETRY_AFTER_S = "60"


class ApiError(Exception):
    """A request that can't be served: `status`, one plain sentence, and one entry for each field at fault."""

    def __init__(
        self,
        status: int,
        detail: str,
        errors: Sequence[Mapping[str, Any]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.errors, self.headers = status, detail, [dict(e) for e in errors], dict(headers or {})


def field_error(field: str, message: str, **more: Any) -> dict[str, Any]:
    """One entry of `errors`."""
    return {"field": field, "message": message, **more}


def beside(errors: Sequence[dict[str, Any]], more: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """These errors, and more of other fields: what can't be read isn't called missing too."""
    blamed = {e["field"] for e in errors}
    return [*errors, *(e for e in more if e["field"] not in blamed)]


def unknown(name: str, known: Iterable[str]) -> str:
    """The message for a name that nobody knows, with the nearest one that is known."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown field{f', did you mean {close[0]}?' if close else ''}"


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """422 for these field errors; `detail` says the first and how many more there are."""
    first = f"{errors[0]['field']}: {errors[0]['message']}"
    rest = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ApiError(422, first + rest, errors)


def validation_errors(error: ValidationError, model: type[BaseModel], *, echo: bool = True) -> list[dict[str, Any]]:
    """Pydantic's errors in our words: dotted names, the nearest known name for a typo, the allowed values.

    They show what was given, in part, unless `echo` is False.
    """
    return [_translate(e, model, echo) for e in error.errors(include_url=False)]


def _translate(error: Any, model: type[BaseModel], echo: bool) -> dict[str, Any]:
    path, section = _walk(error["loc"], model)
    context = error.get("ctx") or {}
    if "field" in context:  # a rule over several fields of a section names the one to mend
        path = f"{path}.{context['field']}".lstrip(".")
    if error["type"] == "extra_forbidden":
        # Without its value, which may be a secret that went to the wrong place.
        return field_error(path, unknown(str(error["loc"][-1]), section.model_fields if section else ()))
    return _entry(error, path, echo)


def _entry(error: Any, path: str, echo: bool = True) -> dict[str, Any]:
    if error["type"] == "missing":
        return field_error(path, "this field is required")
    context, given = error.get("ctx") or {}, error.get("input")
    more: dict[str, Any] = {}
    if "expected" in context:
        more["allowed"] = context["expected"]
    elif bounds := {k: context[k] for k in ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern") if k in context}:
        more["allowed"] = bounds
    if echo and (isinstance(given, bool | int | None) or (isinstance(given, float) and math.isfinite(given))):
        more["input"] = given
    elif echo and isinstance(given, str):
        more["input"] = given[:INPUT_CHARS]
    return field_error(path, error["msg"].removeprefix("Value error, "), **more)


def _walk(loc: Sequence[Any], model: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The dotted name of an error without pydantic's union tags, and the section it is in."""
    names: list[str] = []
    section: type[BaseModel] | None = model
    union: Any = None
    for i, part in enumerate(loc):
        if union is not None and (picked := section_of(union, {"type": part})):  # the tag that picked one of a union
            section, union = picked, None
            continue
        union = None
        names.append(str(part))
        field = section.model_fields.get(str(part)) if section else None
        if i + 1 < len(loc):
            options = list(models_in(field.annotation)) if field else []
            section = options[0] if options else None
            union = field.annotation if field and len(options) > 1 else None
    return ".".join(names), section


def problem(error: ApiError) -> Response:
    """The response for `error`. It may quote what a user's template or file says: what isn't Unicode in it becomes `?`."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.detail,
    }
    if error.errors:
        body["errors"] = error.errors
    text = json.dumps(body, ensure_ascii=False, allow_nan=False)
    return Response(text.encode(errors="replace"), error.status, error.headers, media_type="application/problem+json")


def to_api_error(error: Exception) -> ApiError:
    """Any exception as the ApiError to answer with; unexpected ones are logged under an id and say nothing else."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return invalid([_entry(e, ".".join(map(str, e["loc"][1:]))) for e in error.errors()])
        case ValidationError():
            return invalid(validation_errors(error, JobSpec))
        case HTTPException(status_code=404):
            return ApiError(404, "there is no such path here; /docs lists those that there are", headers=error.headers)
        case HTTPException(status_code=405):
            allowed = (error.headers or {}).get("Allow")
            return ApiError(405, f"this path is for {allowed}" if allowed else "not a method of this path", headers=error.headers)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case UserError():
            return invalid([field_error(error.field or "request", error.message)])
        case RunFault(cause=Cause.STORAGE_AWAY):
            metrics.STORAGE_OUTAGES.record(1, process="ingress")
            return ApiError(503, f"{error.message.rstrip('.')}; try again shortly", headers={"Retry-After": RETRY_AFTER_S})
        case Conflict():
            return ApiError(409, str(error))
        case QueueFull():
            return ApiError(429, str(error), headers={"Retry-After": QUEUE_RETRY_AFTER_S})
        case _ if isinstance(error, STORE_AWAY):
            log.warning("the job store is away", error=type(error).__name__)
            metrics.STORE_ERRORS.record(1, process="ingress")
            return ApiError(503, "the job store can't be reached; try again shortly", headers={"Retry-After": RETRY_AFTER_S})
    error_id = uuid.uuid4().hex
    log.error("unexpected error", error_id=error_id, exc_info=error)
    return ApiError(500, f"an unexpected error; the service's log has it as {error_id}")


def install(app: FastAPI) -> None:
    """Answer every exception of `app` as a problem."""

    async def handle(request: Request, error: Exception) -> Response:
        return problem(to_api_error(error))

    # Starlette raises again, into the server's log, what only `Exception` answers: that is for what nobody expected.
    expected = (
        ApiError,
        RequestValidationError,
        HTTPException,
        ValidationError,
        UserError,
        RunFault,
        Conflict,
        QueueFull,
        SQLAlchemyError,
    )
    for kind in (Exception, *expected):
        app.add_exception_handler(kind, handle)
