"""docs/api.md, made from the OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from serve_app.reference.tables import cell, type_of

INTRO = """# HTTP reference

Made from the service's own OpenAPI document (`/openapi.json`, shown at `/docs`) by `make docs`. Every path works with and without
its trailing slash. Every call but `/healthz`, `/readyz`, `/openapi.json` and `/docs` needs `Authorization: Bearer <JWT>`; claims:
`sub`, `org` (UUID, or `orgs`, a list), `exp`, optional `scope` (`jobs:read jobs:write secrets:write admin`). Jobs can also be
named in the path: `/job/{request_id}` with `/events`, `/logs`, `/metrics`, `/artifacts`, `/cancel`, `/resume`.

Refusals are `application/problem+json` (RFC 9457): `detail` is one sentence, `errors` names every field at fault, or about a
hundred where there are more, with `field`, `message` and, where there is one, `input` and `allowed`. A name that a call doesn't
know, in its body or its query, is such a field. Those that each call may answer with are listed there; they mean:
"""


def markdown(schema: dict[str, Any]) -> str:
    """The reference as Markdown."""
    components = schema["components"]["schemas"]
    lines, shown = [INTRO, *_refusals(schema["components"]["responses"]), "## Calls", ""], set[str]()
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            lines += [f"### {method.upper()} {path}", "", operation["description"], ""]
            rows = [_parameter(p) for p in operation.get("parameters", ())]
            if rows:
                lines += ["| parameter | where | type | |", "|---|---|---|---|", *rows, ""]
            lines += [*_body(operation, shown), *_answer(operation, shown)]
    of_job = list(_reachable(["JobSpec"], components))
    lines += ["## Fields of a job", "", *_tables(of_job, components, given=True)]
    answers = [type_of(_answer_schema(o)) for path in schema["paths"].values() for o in path.values()]
    of_answers = [name for name in _reachable(answers, components) if name not in of_job]
    return "\n".join([*lines, "## Fields of the answers", "", *_tables(of_answers, components, given=False)]).rstrip() + "\n"


def _refusals(responses: dict[str, Any]) -> list[str]:
    """A line for each status."""
    rows = [(name.removeprefix("Problem"), said["description"], ", ".join(said["headers"])) for name, said in responses.items()]
    return ["| status | | header |", "|---|---|---|", *(f"| {s} | {d} | {h} |" for s, d, h in rows), ""]


def _tables(names: Iterable[str], components: dict[str, Any], *, given: bool) -> list[str]:
    """The fields of each; `given` by the caller, with defaults, or else answered."""
    lines = []
    for name in names:
        section = components[name]
        if "enum" in section:
            lines += [f"### {name}", "", f"{section['description']} One of {type_of(section)}.", ""]
        if "properties" in section:
            lines += [f"### {name}", "", *([section["description"], ""] if section.get("description") else [])]
            required = section.get("required", ())
            lines += ["| field | type | default | |" if given else "| field | type | | |", "|---|---|---|---|"]
            for field, value in section["properties"].items():
                lines.append(
                    _field(field, value, ("required" if given else "") if field in required else None if given else "may lack")
                )
            lines.append("")
    return lines


def _reachable(names: Iterable[str], components: dict[str, Any]) -> Iterator[str]:
    seen, ahead = set(), list(names)
    while ahead:
        name = ahead.pop(0)
        if name not in seen:
            seen.add(name)
            yield name
            ahead += [r.rpartition("/")[2] for r in _references(components[name])]


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = [v for k, v in value.items() if k != "discriminator"]
    if isinstance(value, list):
        for item in value:
            yield from _references(item)


def _field(name: str, schema: dict[str, Any], needed: str | None) -> str:
    default = f"`{json.dumps(schema['default'])}`" if needed is None and "default" in schema else needed or ""
    return f"| {name} | {cell(type_of(schema))} | {default} | {cell(schema.get('description', ''))} |"


def _parameter(parameter: dict[str, Any]) -> str:
    needed = "" if parameter.get("required") else ", optional"
    said = cell(parameter.get("description", ""))
    return f"| {parameter['name']} | {parameter['in']}{needed} | {cell(type_of(parameter['schema']))} | {said} |"


def _body(operation: dict[str, Any], shown: set[str]) -> list[str]:
    content = operation.get("requestBody", {}).get("content", {})
    if not content:
        return []
    schema = content["application/json"]["schema"]
    what = (
        type_of(schema) if "$ref" in schema else ", ".join(f"`{name}` ({type_of(p)})" for name, p in schema["properties"].items())
    )
    return [f"Body ({', '.join(content)}): {what}.", "", *_example(content["application/json"]), *_form(content, shown)]


def _form(content: dict[str, Any], shown: set[str]) -> list[str]:
    if "multipart/form-data" not in content or "form" in shown:
        return []
    shown.add("form")
    parts = content["multipart/form-data"]["example"]
    return ["As a form, with every section:", "", "```", *(f"{name}={value}" for name, value in parts.items()), "```", ""]


def _answer_schema(operation: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = operation["responses"]["200"]["content"]["application/json"]["schema"]
    return schema


def _answer(operation: dict[str, Any], shown: set[str]) -> list[str]:
    """What it answers, with an example where the answer is a new one."""
    name = type_of(_answer_schema(operation))
    example = [] if name in shown else _example(operation["responses"]["200"]["content"]["application/json"])
    shown.add(name)
    refused = [status for status in operation["responses"] if status >= "400"]
    refusals = f" Refusals: {', '.join(refused)}." if refused else ""
    return [f"Answer: {name}.{refusals}", "", *example]


def _example(content: dict[str, Any]) -> list[str]:
    return ["```json", json.dumps(content["example"], ensure_ascii=False), "```", ""] if "example" in content else []
