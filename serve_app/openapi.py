"""The OpenAPI document: what FastAPI knows of the routes, and every refusal that each of them may answer with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from serve_app.errors import offered
from train_loop.section import models_in
from train_loop.spec import JobSpec

PROBLEM = {
    "type": "object",
    "description": "RFC 9457. `detail` is one plain sentence; `errors` names every field at fault.",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}, "input": {}, "allowed": {}},
            },
        },
    },
}
RETRY = {"Retry-After": {"required": True, "description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}}
SCHEME = {"WWW-Authenticate": {"required": True, "description": "Bearer, and what is wrong.", "schema": {"type": "string"}}}
REFUSALS: dict[str, tuple[str, dict[str, Any]]] = {
    "400": ("The body can't be read as a form or JSON.", {}),
    "401": ("There is no token, or it isn't valid (any more).", SCHEME),
    "403": ("The token doesn't speak for this org, or lacks the scope.", {}),
    "404": ("The token's orgs have nothing by this id.", {}),
    "408": ("The body came too slowly.", {}),
    "409": (
        "Another job has the name, the Idempotency-Key came with another body, the job's state is against it, or the org has as "
        "many webhooks as it may.",
        {},
    ),
    "413": ("The body is too long; said before it is read.", {}),
    "415": ("The body is of no kind that is taken.", {}),
    "422": ("Fields are wrong; `errors` has all of them.", {}),
    "429": ("The org asks too often, or has as much under way or queued as it may.", RETRY),
    "503": ("Something that this needs is away or busy.", RETRY),
}
OF_A_TOKEN = ("401", "403", "422", "429", "503")
OF_A_BODY = ("400", "408", "413", "415")


def install(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Have `app`, which has the routes of these routers, give this document, made when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, routers)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, routers: Iterable[APIRouter]) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    job = JobSpec.model_json_schema(ref_template="#/components/schemas/{model}")
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {}).update(job.pop("$defs"), JobSpec=job, Problem=PROBLEM)
    _offer_what_is_taken(JobSpec, components["schemas"])
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}
    components["responses"] = {f"Problem{status}": _response(*said) for status, said in REFUSALS.items()}
    schema["security"] = [{"token": []}]
    for operation in (o for path in schema["paths"].values() for o in path.values()):
        operation["responses"] = _responses(operation)
    _restore_examples(routers, schema["paths"])
    return schema


def _offer_what_is_taken(section: type[BaseModel], schemas: dict[str, Any]) -> None:
    """Leave out of the enumerations what isn't built yet, and what is for runs without the service."""
    for name, field in section.model_fields.items():
        schema = schemas[section.__name__]["properties"][name]
        if "enum" in schema:
            schema["enum"] = offered(section, name, schema["enum"])
        for inner in models_in(field.annotation):
            _offer_what_is_taken(inner, schemas)


def _response(description: str, headers: dict[str, Any]) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {"description": description, "headers": headers, "content": content}


def _responses(operation: dict[str, Any]) -> dict[str, Any]:
    """The operation's own answers, then its refusals: those it names, and those of whatever takes a token or a body."""
    named: dict[str, Any] = operation["responses"]
    answers = {status: answer for status, answer in named.items() if status not in REFUSALS}
    # FastAPI adds a 422 of its own, in a shape that this service never answers with, to whatever has parameters.
    refused = {status for status in named if status in REFUSALS and status != "422"}
    if operation.get("security") != []:
        refused.update(OF_A_TOKEN)
    if "requestBody" in operation:
        refused.update(OF_A_BODY)
    return answers | {status: {"$ref": f"#/components/responses/Problem{status}"} for status in sorted(refused)}


def _restore_examples(routers: Iterable[APIRouter], paths: dict[str, Any]) -> None:
    """Show the answers' examples whole: FastAPI leaves what is null out of them, too, and an answer always has its fields."""
    for route in (r for router in routers for r in router.routes if isinstance(r, APIRoute) and r.include_in_schema):
        example = route.responses[200]["content"].get("application/json", {})
        for method in route.methods or ():
            paths[route.path][method.lower()]["responses"]["200"]["content"]["application/json"] |= example
