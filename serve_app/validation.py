"""From the bytes of a submission to a JobSpec, or all that is wrong with it at once."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from fastapi import Request
from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from serve_app.errors import ApiError, field_error, invalid, validation_errors
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from train_loop.spec import AWS_REGION, JobSpec

PLAIN = ("org", "experiment_name")
SECTIONS = ("dataset_config", "model_details", "train_config", "dataset_details", "infra_config")
MAX_DEPTH = 64
HUB_TIMEOUT_S = 3.0


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body; 413 as soon as it is known to be longer than `limit` bytes, if possible before it is read."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > limit:
        raise ApiError(413, f"the body must be at most {limit} bytes")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise ApiError(413, f"the body must be at most {limit} bytes")
    if not body:
        raise ApiError(400, "the body is empty: send the job as multipart/form-data or application/json")
    return body


async def parse_submission(request: Request, limit: int) -> tuple[dict[str, Any], bytes]:
    """The submission's seven parts, decoded, and the raw body. Raises ApiError 400, 413, 415, 422."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = await read_body(request, limit)
        payload = _json(body, None)
        if not isinstance(payload, dict):
            raise ApiError(400, "the JSON body must be an object")
        return payload, body
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise ApiError(415, "send multipart/form-data, application/x-www-form-urlencoded or application/json")
    body = await read_body(request, limit)
    return _sections(await _form(request, body)), body


async def _form(request: Request, body: bytes) -> list[tuple[str, Any]]:
    # The stream is used up; starlette's parsers read it again from the bytes.
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        form = await Request(request.scope, receive).form(max_files=16, max_fields=64)
    except (MultiPartException, ApiError, ValueError, KeyError) as error:
        raise ApiError(400, f"the form can't be read: {getattr(error, 'message', error)}") from None
    except Exception as error:
        if type(error).__name__ in ("HTTPException", "MultipartParseError", "FormParserError", "ParseError"):
            raise ApiError(400, "the form can't be read") from None
        raise
    pairs = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            try:
                value = (await value.read()).decode()
            except UnicodeDecodeError:
                raise invalid([field_error(name, "must be UTF-8 text")]) from None
        pairs.append((name, value))
    return pairs


def _sections(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    payload: dict[str, Any] = {}
    errors: list[dict[str, Any]] = []
    for name, value in pairs:
        if name in payload:
            errors.append(field_error(name, "given twice"))
        elif name in PLAIN:
            payload[name] = value
        elif name in SECTIONS:
            try:
                payload[name] = _json(value, name)
            except ApiError as error:
                errors += error.errors
                payload[name] = None
        else:
            close = difflib.get_close_matches(name, (*PLAIN, *SECTIONS), n=1)
            errors.append(field_error(name[:100], f"unknown field{f', did you mean {close[0]}?' if close else ''}"))
    if errors:
        raise invalid(errors)
    return payload


class _Unusable(ValueError):
    pass


def _json(text: str | bytes, part: str | None) -> Any:
    """Decode strictly: no NaN, no duplicate keys, no nesting deeper than MAX_DEPTH, no lone surrogates."""

    def no_constants(name: str) -> Any:
        raise _Unusable(f"{name} isn't JSON")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [k for k, _ in pairs]
            raise _Unusable(f"duplicate key {next(k for k in names if names.count(k) > 1)!r}")
        return found

    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = json.loads(text, parse_constant=no_constants, object_pairs_hook=no_duplicates)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        if part is None:
            raise ApiError(400, f"the body isn't JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
        where = {"line": error.lineno, "column": error.colno}
        message = f"isn't JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise invalid([field_error(part, message, **where)]) from None
    except (_Unusable, RecursionError, UnicodeError, ValueError) as error:
        reason = str(error) if isinstance(error, _Unusable) else "nested too deeply"
        reason = "not valid UTF-8" if isinstance(error, UnicodeError) else reason
        if isinstance(error, ValueError) and not isinstance(error, _Unusable | UnicodeError):
            reason = "a number has too many digits"
        raise invalid([field_error(part or "body", reason)]) from None
    if _deeper_than(value, MAX_DEPTH):
        raise invalid([field_error(part or "body", "nested too deeply")])
    return value


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [child for v in level if isinstance(v, dict | list) for child in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return False
    return True


def validate(payload: dict[str, Any], settings: Settings, vault: SecretVault) -> JobSpec:
    """The job, if its fields are right and it can run here. Raises ApiError 422 with every error."""
    try:
        spec = JobSpec.model_validate(payload)
    except ValidationError as error:
        raise invalid(validation_errors(error, JobSpec)) from None
    errors = [*_infra_errors(spec, settings), *_dataset_errors(spec, vault), *_model_errors(spec, settings)]
    if errors:
        raise invalid(errors)
    return spec


def _infra_errors(spec: JobSpec, settings: Settings) -> list[dict[str, Any]]:
    infra = spec.infra_config
    profile = settings.profiles.get(infra.gpu_type)
    if profile is None:
        names = sorted(settings.profiles)
        return [field_error("infra_config.gpu_type", f"unknown gpu_type; this service has {', '.join(names)}", allowed=names)]
    if infra.gpu_count > profile.gpus_per_node:
        message = f"a node of {infra.gpu_type} has {profile.gpus_per_node} GPUs"
        return [field_error("infra_config.gpu_count", message, allowed={"le": profile.gpus_per_node})]
    if settings.max_workers is not None and infra.num_workers > settings.max_workers:
        message = f"gpu_count x node_count is {infra.num_workers} workers; this service has room for {settings.max_workers}"
        return [field_error("infra_config.node_count", message)]
    return []


def _dataset_errors(spec: JobSpec, vault: SecretVault) -> list[dict[str, Any]]:
    details = spec.dataset_details
    if details.source_type == "local":
        return [
            field_error("dataset_details.source_type", "local paths are for runs without the service; use s3", allowed=["s3"])
        ]
    errors = []
    has_endpoint = False
    if details.secret_id is not None:
        secret = vault.find(spec.org, details.secret_id)
        if secret is None:
            message = "no such secret in this org: store the keys by POST /secret/ and use the secret_id it returns"
            errors.append(field_error("dataset_details.secret_id", message))
        else:
            has_endpoint = secret.has_endpoint
    if details.region is not None and not has_endpoint and not AWS_REGION.match(details.region):
        errors.append(field_error("dataset_details.region", "not an AWS region; one looks like us-west-2"))
    template = spec.dataset_config.preprocessing.prompt.template
    if template is not None:
        try:
            plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # transformers' own tag
            ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        except TemplateSyntaxError as error:
            message = f"isn't a Jinja template: {error.message} in line {error.lineno}"
            errors.append(field_error("dataset_config.preprocessing.prompt.template", message))
    return errors


def _model_errors(spec: JobSpec, settings: Settings) -> list[dict[str, Any]]:
    name = spec.model_details.base_model
    field = "model_details.base_model"
    folder = Path(settings.model_mirror, *name.split("/"))
    if ".." in name.split("/"):
        return [field_error(field, "not a hub id")]
    if (folder / "config.json").is_file():
        context = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
        asked = spec.dataset_config.preprocessing.prompt.max_length
        if context is not None and asked > context:
            message = f"{asked} tokens are more than the context of {name}, {context}"
            return [field_error("dataset_config.preprocessing.prompt.max_length", message, allowed={"le": context})]
        return []
    where = f"not in the model mirror ({settings.model_mirror}, setting TUNEYARD_MODEL_MIRROR)"
    if settings.hub_offline:
        return [field_error(field, f"{name} is {where}, and the hub is switched off")]
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        return [field_error(field, f"{name} is {where}, and the hub has no such public model")]
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        return [field_error(field, f"{name} is {where}, and the hub answered {status}")]
    except (OSError, httpx.HTTPError, ValueError) as error:
        reason = type(error).__name__
        return [field_error(field, f"{name} is {where}, and the hub can't be reached ({reason})")]
    return []
