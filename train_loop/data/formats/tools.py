"""Tools and tool calls, in the shape that chat templates read: OpenAI's, with arguments as an object."""

from __future__ import annotations

import json
from typing import Any

from train_loop.data.formats.conversation import RowRejected, kind


def parse_tools(value: Any) -> list[dict[str, Any]]:
    """Function schemas from a list, or from one as JSON text; bare ones are wrapped. Raises RowRejected."""
    return [{"type": "function", "function": _function(tool, "a tool")} for tool in _listed(value, "tools")]


def parse_calls(value: Any) -> list[dict[str, Any]]:
    """Calls from one or a list of `{"name", "arguments"}`, bare or in `{"function": …}`, or from either as JSON text.

    Arguments may be JSON text themselves. Raises RowRejected.
    """
    calls = []
    for call in _listed(value, "a tool call"):
        function = _function(call, "a tool call")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = _decoded(arguments, "arguments of a tool call") if arguments.strip() else {}
        if not isinstance(arguments, dict | None):
            raise RowRejected(f"arguments of a tool call must be an object, not {kind(arguments)}")
        made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
        if isinstance(call.get("id"), str):
            made["id"] = call["id"]
        calls.append(made)
    return calls


def _listed(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        value = _decoded(value, name) if value.strip() else None
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _function(value: Any, name: str) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowRejected(f"{name} must be an object with a name")
    return function


def _decoded(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowRejected(f"{name} is not JSON") from None
