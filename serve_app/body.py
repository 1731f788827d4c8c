"""From the bytes of a request to its decoded fields: size, encoding, form, strict JSON."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request
from ray.exceptions import TaskCancelledError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect

from serve_app.errors import MAX_ERRORS, ApiError, field_error, invalid, unknown

BODY_S = 60.0
MAX_DEPTH = 64
MAX_PARTS = 64
NAME_CHARS = 100
SURROGATE = re.compile(r"[\ud800-\udfff]")
HAS_SURROGATE = "not valid UTF-8: a lone surrogate"
NULL_CHARACTER = re.compile(r"(?<!\\)(\\\\)*\\u0000")  # as json.dumps writes it


async def read_fields(
    request: Request, limit_bytes: int, plain: Collection[str], json_parts: Collection[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fields of a JSON object or a form, in which `plain` ones are text and `json_parts` hold JSON; and the form's parts at
    fault, of which one that isn't JSON stays the text that it is.

    Raises ApiError: 400 not a form or JSON, 408 too slow, 413 too long, 415 of another kind, 422 a JSON body that can't be used.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data", "application/x-www-form-urlencoded"):
        raise ApiError(415, "send multipart/form-data, application/x-www-form-urlencoded or application/json")
    body = await _read(request, limit_bytes)
    try:
        text = body.decode()
    except UnicodeDecodeError:
        if kind == "application/json":
            raise ApiError(400, "the body isn't JSON: it must be text in UTF-8") from None
        raise invalid([field_error("body", "not valid UTF-8")]) from None
    if kind == "application/json":
        payload = decode_json(text, None)
        if not isinstance(payload, dict):
            raise ApiError(400, "the JSON body must be an object")
        return payload, []
    if kind == "application/x-www-form-urlencoded" and text.lstrip().startswith("{"):  # what curl -d says of any body
        raise ApiError(415, "the body is JSON and its Content-Type says that it is a form: send application/json")
    pairs = await _multipart(request, body) if kind == "multipart/form-data" else _urlencoded(text)
    return _decode_parts(pairs, plain, json_parts)


def too_long(limit_bytes: int) -> ApiError:
    """The refusal of a longer body."""
    return ApiError(413, f"the body must be at most {limit_bytes} bytes")


def declares_more(headers: Mapping[str, str], limit_bytes: int) -> bool:
    """Whether a request's headers (in any case) tell that its body will be longer."""
    declared = headers.get("content-length", "0")
    return not declared.isdecimal() or len(declared) > 18 or int(declared) > limit_bytes


async def _read(request: Request, limit_bytes: int) -> bytes:
    if declares_more(request.headers, limit_bytes):
        raise too_long(limit_bytes)  # before it is read
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):  # or some who send next to nothing take all of a replica's places
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit_bytes:
                    raise too_long(limit_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body wasn't there after {BODY_S:g} s") from None
    except (ClientDisconnect, TaskCancelledError):  # as starlette says it, and as Serve's replicas sometimes do
        raise ApiError(400, "the connection ended before the body did") from None
    if not body:
        raise ApiError(400, "the body is empty: send a form or a JSON object")
    return bytes(body)


async def _multipart(request: Request, body: bytes) -> list[tuple[str, str]]:
    # The stream is used up; starlette's parser reads it again from the bytes.
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        form = await Request(request.scope, receive).form(max_files=MAX_PARTS, max_fields=MAX_PARTS, max_part_size=len(body))
    except (MultiPartException, ValueError, KeyError) as error:
        raise ApiError(400, f"the form can't be read: {getattr(error, 'message', error)}") from None
    except Exception as error:
        # Starlette and python-multipart wrap theirs differently from version to version.
        if type(error).__name__ in ("HTTPException", "MultipartParseError", "FormParserError", "ParseError"):
            raise ApiError(400, "the form can't be read") from None
        raise
    return [(name, (await v.read()).decode() if isinstance(v, UploadFile) else v) for name, v in form.multi_items()]


def _urlencoded(text: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_PARTS)
    except UnicodeDecodeError:
        raise invalid([field_error("body", "not valid UTF-8")]) from None
    except ValueError as error:
        raise ApiError(400, f"the form can't be read: {error}") from None


def _decode_parts(
    pairs: list[tuple[str, str]], plain: Collection[str], json_parts: Collection[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    fields: dict[str, Any] = {}
    errors: list[dict[str, Any]] = []
    for name, value in pairs:
        if name in fields:
            errors.append(field_error(name, "given twice"))
        elif name in plain:
            fields[name] = value
            if "\0" in value:
                errors.append(field_error(name, "holds a null character"))
            elif SURROGATE.search(value):  # by a charset of the form's own
                errors.append(field_error(name, HAS_SURROGATE))
        elif name in json_parts:
            fields[name] = value
            try:
                fields[name] = decode_json(value, name)
            except ApiError as error:
                errors += error.errors
        else:
            errors += unknown_names([name], [*plain, *json_parts])
    return fields, errors


def unknown_names(given: Iterable[str], known: Collection[str]) -> list[dict[str, Any]]:
    """An error for each name that isn't known, for MAX_ERRORS of them."""
    strange = islice((name for name in given if name not in known), MAX_ERRORS)
    shown = [name[:NAME_CHARS].encode(errors="replace").decode() for name in strange]
    return [field_error(name, unknown(name, known)) for name in shown]


class _Unusable(ValueError):
    pass


def decode_json(text: str, part: str | None) -> Any:
    """Decode strictly: no NaN, no duplicate keys, no nesting deeper than MAX_DEPTH, no lone surrogates, no null characters.

    Raises ApiError 422 naming `part`, its line and column; without a part the text is the whole body, and not JSON is 400.
    """

    def no_constants(name: str) -> Any:
        raise _Unusable(f"{name} isn't JSON")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            times = Counter(name for name, _ in pairs)
            raise _Unusable(f"duplicate key {next(name for name in times if times[name] > 1)!r}")
        return found

    try:
        value = json.loads(text, parse_constant=no_constants, object_pairs_hook=no_duplicates)
        if _deeper_than(value, MAX_DEPTH):
            raise _Unusable("nested too deeply")
        again = json.dumps(value, ensure_ascii=False)
        again.encode()
        if NULL_CHARACTER.search(again):
            raise _Unusable("holds a null character")
    except json.JSONDecodeError as error:
        message = f"isn't JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        if part is None:
            raise ApiError(400, f"the body {message}") from None
        raise invalid([field_error(part, message, line=error.lineno, column=error.colno)]) from None
    except (RecursionError, UnicodeError, ValueError) as error:
        match error:
            case _Unusable():
                reason = str(error)
            case UnicodeError():
                reason = HAS_SURROGATE
            case RecursionError():
                reason = "nested too deeply"
            case _:
                reason = "a number has too many digits"
        raise invalid([field_error(part or "body", reason)]) from None
    return value


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [child for v in level if isinstance(v, dict | list) for child in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return False
    return True
