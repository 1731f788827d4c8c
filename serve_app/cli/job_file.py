"""The job of a YAML or JSON file, with what the command line says on top."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from serve_app.cli.common import AsJson, Org, Token, Url, die, org_of

FLAGS: dict[str, tuple[type, str]] = {  # what each is and what of the job it sets
    "name": (str, "experiment_name"),
    "base_model": (str, "model_details.base_model"),
    "dataset": (str, "dataset_details.dataset_path"),
    "secret_id": (str, "dataset_details.secret_id"),
    "epochs": (float, "train_config.hyperparameters.num_epochs"),
    "max_steps": (int, "train_config.hyperparameters.max_steps"),
    "learning_rate": (float, "train_config.hyperparameters.learning_rate"),
    "gpu_type": (str, "infra_config.gpu_type"),
    "gpu_count": (int, "infra_config.gpu_count"),
    "node_count": (int, "infra_config.node_count"),
}


def takes_job(command: Callable[[dict[str, Any], str | None, str | None, bool], None]) -> Callable[..., None]:
    """A command line for `command(spec, url, token, as_json)`: a job's file, FLAGS, --set and whom to ask."""

    def run(
        file: Annotated[Path, typer.Argument(help="The job: the JSON body of POST /job/, as YAML or JSON.")],
        assign: Annotated[
            list[str] | None, typer.Option("--set", help="Any field: a.b.c=value, where value is JSON or plain text.")
        ] = None,
        org: Org = None,
        url: Url = None,
        token: Token = None,
        as_json: AsJson = False,
        **flags: Any,
    ) -> None:
        overrides = {"org": org} | {field: flags[flag] for flag, (_, field) in FLAGS.items()}
        spec = read_spec(file, overrides, assign or [])
        spec["org"] = org_of(spec.get("org"))
        command(spec, url, token, as_json)

    file, *others, _ = inspect.signature(run, eval_str=True).parameters.values()
    keyword = inspect.Parameter.KEYWORD_ONLY
    flags = [
        inspect.Parameter(flag, keyword, default=None, annotation=Annotated[kind | None, typer.Option(help=field)])
        for flag, (kind, field) in FLAGS.items()
    ]
    signature = inspect.Signature([file, *flags, *(other.replace(kind=keyword) for other in others)])
    run.__signature__ = signature  # type: ignore[attr-defined]  # for typer, which would see no flags
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _yaml_loader() -> Any:
    """YAML 1.2's scalars, which are JSON's: PyYAML's own would read 1e-4 as a string and 2026-01-01 as a date.

    A name given twice is an error, as it is in the service's JSON.
    """
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: a name must be a text")
                if key.value in seen:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    for kind, pattern, first in (
        ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
        ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
        ("int", r"-?(?:0|[1-9][0-9]*)", list("-0123456789")),
        ("float", r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?", list("-0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^{pattern}$"), first)
    return Loader


def read_spec(file: Path, overrides: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """The job of a YAML or JSON file, with flags (dotted name → value) and `a.b.c=value` assignments on top."""
    import yaml

    try:
        # Through JSON, for YAML's dates, sets and references to what they are in have no word in a request.
        spec = json.loads(json.dumps(yaml.load(file.read_text(encoding="utf-8"), _yaml_loader())))
    except OSError as error:
        die(f"{file} can't be read: {error.strerror}", 2)
    except UnicodeDecodeError:
        die(f"{file} isn't UTF-8 text", 2)
    except yaml.YAMLError as error:
        die(f"{file} is neither YAML nor JSON: {' '.join(str(error).split())}", 2)
    except (TypeError, ValueError, RecursionError) as error:
        die(f"{file} holds what JSON can't: {error}", 2)
    if not isinstance(spec, dict):
        die(f"{file} must hold an object with org, experiment_name and the five sections", 2)
    changes = {k: v for k, v in overrides.items() if v is not None}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            die(f"--set {text}: write it as name=value", 2)
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = value
    for name, value in changes.items():
        at = spec
        *parents, last = name.split(".")
        for i, parent in enumerate(parents):
            if at.get(parent) is None:  # an empty section in YAML is null
                at[parent] = {}
            at = at[parent]
            if not isinstance(at, dict):
                die(f"{name} can't be set: {'.'.join(parents[: i + 1])} isn't an object", 2)
        at[last] = value
    return spec
