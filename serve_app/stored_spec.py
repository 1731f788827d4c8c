"""A job's fields as the store has them, whichever version wrote them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from train_loop.spec import JobSpec


def read_spec(stored: Mapping[str, Any]) -> tuple[JobSpec, list[str]]:
    """The job as this version knows it, and the names of those of its fields that it doesn't know: they are left out.

    A later version wrote them, before the service was taken back to this one. Raises ValidationError for what can't be read.
    """
    fields, unknown = copy.deepcopy(dict(stored)), list[str]()
    while True:
        try:
            return JobSpec.model_validate(fields), unknown
        except ValidationError as error:
            extra = [e["loc"] for e in error.errors(include_url=False) if e["type"] == "extra_forbidden"]
            if len(extra) < error.error_count():
                raise
            unknown += [_remove(fields, loc) for loc in extra]


def _remove(fields: Any, loc: Sequence[int | str]) -> str:
    """Take out what pydantic's path leads to, which also holds the tags of unions; its dotted name."""
    names = []
    for part in loc[:-1]:
        if isinstance(part, int) or part in fields:
            fields = fields[part]
            names.append(str(part))
    del fields[loc[-1]]
    return ".".join([*names, str(loc[-1])])
