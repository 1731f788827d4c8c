"""Problems as the client sees them (RFC 9457), and the one place where an exception becomes a status code."""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
import typing
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from serve_app import metrics
from serve_app.other_names import OTHER_NAMES, OTHER_VALUES
from serve_app.store.jobs import STORE_AWAY, Conflict, QueueFull
from train_loop.errors import Cause, RunFault, UserError
from train_loop.section import BUILT_IN, Marker, models_in, section_of
from train_loop.spec import DatasetDetails, JobSpec

log = structlog.get_logger()
INPUT_CHARS = 200
MAX_ERRORS = 100  # told of one request: to look for the nearest name takes its time, and a body may hold 100,000 that are wrong
SHOWN_NAMES = 12  # that a message lists
NO_OBJECT = ("model_type", "model_attributes_type", "dict_type")  # pydantic's errors of what should be a section
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


def unknown(name: str, known: Iterable[str], homes: Mapping[str, Sequence[str]] = MappingProxyType({})) -> str:
    """The message for a name that isn't `known` here: where it belongs, by `homes`, or the nearest one that is known."""
    elsewhere, known = " or ".join(homes.get(name, ())), list(known)
    near = difflib.get_close_matches(name, known, n=1) or _shortened_by(name, known)
    if elsewhere and (len(homes[name]) == 1 or not near):
        return f"unknown field here: it belongs in {elsewhere}"
    if near:
        return f"unknown field, did you mean {' or '.join(near)}?"
    there_are = f"; there are {', '.join(known)}" if len(known) <= SHOWN_NAMES else "; /docs lists those that there are"
    return f"unknown field{there_are if known else '; there are none here'}"


def _shortened_by(name: str, known: Iterable[str]) -> list[str]:
    """Those that `name` may be short for: of them the ones with the fewest words."""
    found = defaultdict[int, list[str]](list)
    for whole in known:
        if _is_short_for(name, whole):
            found[whole.count("_")].append(whole)
    return found[min(found)] if found else []


def _is_short_for(name: str, whole: str) -> bool:
    """As batch_size is a part of per_device_train_batch_size, and lr the initials of learning_rate."""
    return (len(name) > 2 and name in whole) or name == "".join(word[:1] for word in whole.split("_"))


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """422 for these field errors; `detail` says the first and how many more there are."""
    first = f"{errors[0]['field']}: {errors[0]['message']}"
    rest = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ApiError(422, first + rest, errors)


def validation_errors(error: ValidationError, model: type[BaseModel], *, echo: bool = True) -> list[dict[str, Any]]:
    """Pydantic's errors in our words: dotted names, the nearest known name for a typo, the allowed values.

    They show what was given, in part, unless `echo` is False. No more than MAX_ERRORS.
    """
    return [_translate(e, model, echo) for e in error.errors(include_url=False)[:MAX_ERRORS]]


def parameter_errors(errors: Iterable[Any]) -> list[dict[str, Any]]:
    """FastAPI's errors of parameters in our words."""
    return [_entry(e, ".".join(map(str, e["loc"][1:]))) for e in errors]


def _translate(error: Any, model: type[BaseModel], echo: bool) -> dict[str, Any]:
    path, section = _walk(error["loc"], model)
    name, context = str(error["loc"][-1]) if error["loc"] else "", error.get("ctx") or {}
    if "field" in context:  # a rule over several fields of a section names the one to mend
        path = f"{path}.{context['field']}".lstrip(".")
    match error["type"]:
        case "extra_forbidden":
            # Without its value, which may be a secret that went to the wrong place.
            if model is JobSpec and name in OTHER_NAMES:
                return field_error(path, f"unknown field, did you mean {OTHER_NAMES[name]}?")
            return field_error(path, unknown(name, section.model_fields if section else (), _homes(model)))
        case "union_tag_not_found" | "union_tag_invalid" if section is not None:
            options = list(models_in(section.model_fields[name].annotation))
            tags = [tag for option in options for tag in typing.get_args(option.model_fields["type"].annotation)]
            given = error["input"].get("type") if isinstance(error["input"], dict) else None
            return field_error(f"{path}.type", "this field is required" if given is None else one_of(tags, given), allowed=tags)
        case kind if kind in BUILT_IN and error["input"] is None and isinstance(error["loc"][-1], str):
            return field_error(path, "this field is required")  # where null is no default
        case kind if kind in NO_OBJECT:
            # Neither this one's: the text may hold what a section does.
            isnt = ": in a JSON body a section is no text" if isinstance(error["input"], str) else ""
            return field_error(path, f"must be an object{isnt}")
    return _entry(error, path, echo, section)


def offered(section: type[BaseModel], name: str, values: Iterable[Any]) -> list[Any]:
    """Of a field's values those to offer: without what isn't built yet, and what is for runs without the service."""
    refused = [m.refuses for m in section.model_fields[name].metadata if isinstance(m, Marker)]
    local = section is DatasetDetails and name == "source_type"
    return [v for v in values if not any(r(v) for r in refused) and not (local and v == "local")]


def one_of(values: Sequence[Any], given: Any = None) -> str:
    """The message for what is none of the values, with the nearest of them."""
    *others, last = map(str, values)
    words = str(given).lower().split("_")
    near = difflib.get_close_matches(str(given).lower(), [str(v).lower() for v in values]) if others else []
    # Of the near ones that with the most of its words, and the fewest others: adamw_torch is adamw, not adamw_8bit.
    best = max(near, key=lambda v: sum(1 if word in words else -1 for word in v.split("_")), default=None)
    meant = next((f", did you mean {v}?" for v in values if str(v).lower() == best), "")
    if isinstance(given, str) and given.lower() in OTHER_VALUES:
        meant = f"; {given} is {OTHER_VALUES[given.lower()]}"
    return f"must be {', '.join(others)}{' or ' if others else ''}{last}{meant}"


@cache
def _homes(model: type[BaseModel]) -> dict[str, list[str]]:
    """By a field's name, the sections of `model` that have one, by theirs."""

    def sections(of: type[BaseModel], above: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
        for name, field in of.model_fields.items():
            for inner in models_in(field.annotation):
                yield f"{above}{name}", inner
                yield from sections(inner, f"{above}{name}.")

    found = defaultdict[str, list[str]](list)
    for path, section in sections(model):
        for name in section.model_fields:
            if path not in found[name]:
                found[name].append(path)
    return dict(found)


def _in_our_words(said: str) -> str:
    """A sentence of pydantic's, which begins with what it calls the value."""
    said = re.sub(r"^(Input|List|String) should ", "must ", said.removeprefix("Value error, "))
    said = said.replace(" after validation", "").partition(", unable to")[0]
    return said.replace("a valid integer", "an integer").replace("a valid ", "a ")


def _entry(error: Any, path: str, echo: bool = True, section: type[BaseModel] | None = None) -> dict[str, Any]:
    if error["type"] == "missing":
        return field_error(path, "this field is required")
    context, given = error.get("ctx") or {}, error.get("input")
    message = _in_our_words(error["msg"])
    more: dict[str, Any] = {}
    if "expected" in context:  # pydantic's sentence of the values
        values = [ast.literal_eval(value) for value in re.split(r", | or ", context["expected"])]
        more["allowed"] = offered(section, str(error["loc"][-1]), values) if section is not None else values
        message = one_of(more["allowed"], given)
    elif bounds := {k: context[k] for k in ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern") if k in context}:
        more["allowed"] = bounds
    if echo and (isinstance(given, bool | int | None) or (isinstance(given, float) and math.isfinite(given))):
        more["input"] = given
    elif echo and isinstance(given, str):
        more["input"] = given[:INPUT_CHARS]
    return field_error(path, message, **more)


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
            return invalid(parameter_errors(error.errors()))
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
