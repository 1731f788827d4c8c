"""docs/cli.md, made from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import typer

from serve_app.cli import app
from serve_app.cli.failures import EXIT_CODES
from serve_app.reference.tables import cell

INTRO = """# Command line

Made from the commands themselves by `make docs`; `tuneyard --help`, and `--help` after a command, say the same.

They talk to the service of `TUNEYARD_HOME` (default `~/.tuneyard`), or to any other by `--url` and `--token`. `--json` prints
JSON alone. Ctrl-C in `watch`, `logs -f` and `events -f` ends the looking, not the job. `tuneyard --install-completion` sets up
the shell, `tuneyard --version` prints the version.

`tuneyard up` picks free ports, so two homes run side by side, and keeps them for the next time; `tuneyard down` ends everything
that `up` started. Between the two it looks after what it started: when Ray's head (its GCS or raylet) or the S3 server dies, it
is started again at the same address, within half a minute.

`ray job submit` to the embedded Ray: `--address` is the `dashboard_url` that `tuneyard up --json` prints. The embedded Ray
listens on 127.0.0.1 (all but one port: Serve's internal gRPC between replicas has no setting for it, so keep a laptop's
firewall up) and asks for no token; on a machine shared with people you don't trust, set `RAY_AUTH_MODE=token` for `tuneyard up`
and for `ray job submit` ([Ray's page](https://docs.ray.io/en/latest/ray-security/token-auth.html)).
"""
EVERYWHERE = ("org", "url", "token", "as_json")  # parameters that most commands share


def markdown() -> str:
    """The page."""
    root: Any = typer.main.get_command(app)
    found = dict(_commands(root, "tuneyard"))
    shared = {p.name: p for command in found.values() for p in command.params if p.name in EVERYWHERE and not p.required}
    lines = [INTRO, "| exit code | |", "|---|---|", *(f"| {code} | {what} |" for code, what in EXIT_CODES.items()), ""]
    lines += ["## Options of most commands", "", *_table([shared[name] for name in EVERYWHERE])]
    for name, command in found.items():
        own = [p for p in command.params if not _is_shared(p)]
        takes = [f"`{p.opts[0]}`" for p in command.params if _is_shared(p)]
        also = [f"Also {', '.join(takes)}.", ""] if takes else []
        usage = " ".join([name, *filter(None, map(_given, own))])
        lines += [
            f"## {name}",
            "",
            *command.help.split("\n"),
            "",
            "```bash",
            usage,
            "```",
            "",
            *(_table(own) if own else []),
            *also,
        ]
    return "\n".join(lines).rstrip() + "\n"


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    for command in group.commands.values():
        full = f"{name} {command.name}"
        if hasattr(command, "commands"):
            yield from _commands(command, full)
        else:
            yield full, command


def _is_shared(param: Any) -> bool:
    return param.name in EVERYWHERE and not param.required


def _given(param: Any) -> str:
    """How it stands in the usage; empty for an option that may be left out."""
    if param.param_type_name == "argument":
        return f"<{param.name}>" if param.required else f"[<{param.name}>]"
    return f"{param.opts[0]} <{param.name}>" if param.required else ""


def _table(params: list[Any]) -> list[str]:
    return ["| | default | |", "|---|---|---|", *(_row(p) for p in params), ""]


def _row(param: Any) -> str:
    is_argument = param.param_type_name == "argument"
    name = f"`{_given(param)}`" if is_argument else ", ".join(f"`{o}`" for o in [*param.opts, *param.secondary_opts])
    said = param.help or ""
    if isinstance(param.default, Enum):
        said += f" One of {', '.join(f'`{choice}`' for choice in type(param.default))}."
    said += f" Variable `{param.envvar}`." if param.envvar else ""
    said += " May be given again." if param.multiple and "again" not in said else ""
    has_default = isinstance(param.default, str | int) and param.default is not False
    needed = "required" if param.required else f"`{param.default}`" if has_default else ""
    return f"| {name} | {needed} | {cell(said.strip())} |"
