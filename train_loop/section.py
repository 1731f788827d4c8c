"""What every section of a job shares: strict fields, rules over several of them, and values that aren't supported yet."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError, core_schema

SHOWN_CHARS = 100
NOT_SUPPORTED_YET = "not_supported_yet"
RULE = "rule"
BUILT_IN = frozenset(typing.get_args(core_schema.ErrorType))
Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """Base of every section: unknown names are errors, numbers must be finite, `null` means the default."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        # Names such as model_type are the wire's, not pydantic's.
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return {k: v for k, v in data.items() if v is not None or k not in fields or fields[k].is_required()}


@dataclass(frozen=True)
class Marker:
    """In a field's annotation: these values are part of the contract, but what they ask for isn't built yet."""

    values: tuple[object, ...]
    refuses_them: bool

    def refuses(self, value: object) -> bool:
        """Whether this value is not supported yet."""
        # 0 == False, but one is a number and the other an answer.
        listed = any(value is v or (value == v and type(value) is type(v)) for v in self.values)
        return listed is self.refuses_them


def NotYet(*values: object) -> Marker:  # noqa: N802 - reads as an annotation
    """Refuse these values as "not supported yet"."""
    return Marker(values, True)


def OnlyYet(*values: object) -> Marker:  # noqa: N802 - reads as an annotation
    """Refuse every value but these as "not supported yet"."""
    return Marker(values, False)


@dataclass(frozen=True)
class Fault:
    """What several fields make wrong together: the one to mend, by its dotted name, and a sentence."""

    field: str
    message: str
    code: str = RULE


# A function whose parameters are named after the sections that it is about.
Rule = Callable[..., Iterator[Fault]]


def held_to(rules: Sequence[Rule], model: type[Model], data: Any, validate: Callable[[Any], Model]) -> Model:
    """`validate(data)`, held to the rules and to what is supported. Raises ValidationError with all errors at once.

    A rule speaks where each section that it is about is right in itself; a field that is wrong isn't called unsupported too.
    """
    if not isinstance(data, Mapping):
        return validate(data)
    made, errors = None, list[InitErrorDetails]()
    try:
        made = validate(data)
    except ValidationError as error:
        errors = [_again(e) for e in error.errors(include_url=False)]
    sections = dict(made) if made is not None else right_ones(model, data, {str(e["loc"][0]) for e in errors if e.get("loc")})
    for rule in rules:
        about = inspect.signature(rule).parameters
        if about.keys() <= sections.keys():
            errors += [_of(f, sections) for f in rule(**{name: sections[name] for name in about})]
    wrong = [tuple(e.get("loc", ())) for e in errors]
    for at, value, marker in _not_yet(model, data):
        if not any(loc[: len(at)] == at for loc in wrong):
            errors.append({"type": _refusal(value, marker), "loc": at, "input": value})
    if errors:
        raise ValidationError.from_exception_data(model.__name__, errors)
    assert made is not None
    return made


def right_ones(model: type[BaseModel], data: Mapping[str, Any], wrong: set[str]) -> dict[str, Any]:
    """The sections without an error, each validated by itself."""
    right = {name: field for name, field in model.model_fields.items() if name not in wrong}
    return {
        name: field.get_default(call_default_factory=True)
        if data.get(name) is None
        else next(models_in(field.annotation)).model_validate(data[name])
        for name, field in right.items()
        if any(models_in(field.annotation))
    }


def _again(error: ErrorDetails) -> InitErrorDetails:
    """An error that was raised, to be raised among others."""
    kind, context = error["type"], error.get("ctx", {})
    details: InitErrorDetails = {"type": kind, "loc": error["loc"], "input": error["input"], "ctx": context}
    if kind not in BUILT_IN:
        details = {"type": PydanticCustomError(kind, error["msg"], context), "loc": error["loc"], "input": error["input"]}  # type: ignore[arg-type]
    return details


def _of(fault: Fault, sections: Mapping[str, Any]) -> InitErrorDetails:
    at = tuple(fault.field.split("."))
    value: Any = sections
    for name in at:
        value = value[name] if isinstance(value, Mapping) else getattr(value, name, None)
    return {"type": PydanticCustomError(fault.code, "{said}", {"said": fault.message}), "loc": at, "input": value}  # type: ignore[arg-type]


def _refusal(value: Any, marker: Marker) -> PydanticCustomError:
    shown = json.dumps(value, ensure_ascii=False, default=str)  # as it was written
    shown = shown if len(shown) <= SHOWN_CHARS else f"{shown[:SHOWN_CHARS]}…"
    instead = "" if marker.refuses_them else f": it must be {' or '.join(map(json.dumps, marker.values))}"
    return PydanticCustomError(NOT_SUPPORTED_YET, "{value} is not supported yet{instead}", {"value": shown, "instead": instead})


def _not_yet(model: type[BaseModel], data: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Marker]]:
    """Where a field's marker refuses what is given, that, and the marker. What has another shape than a model is passed over."""
    for name, field in model.model_fields.items():
        value = data.get(name) if isinstance(data, Mapping) else getattr(data, name, None)
        at = (*above, name)
        if value is None:
            continue  # the default, and those are all supported
        for marker in field.metadata:
            if isinstance(marker, Marker) and marker.refuses(value):
                yield at, value, marker
        if inner := section_of(field.annotation, value):
            yield from _not_yet(inner, value, at)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field may hold: itself, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation) in (typing.Union, typing.Annotated):
        for part in typing.get_args(annotation):
            yield from models_in(part)


def section_of(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The model that this value of a field is of: in a union, the one that its `type` picks; None where it picks none."""
    options = list(models_in(annotation))
    if len(options) < 2:
        return options[0] if options else None
    tag = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return next((o for o in options if tag in typing.get_args(o.model_fields["type"].annotation)), None)
