"""`tuneyard plan`: what a job would take, for a person."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from serve_app.cli.common import app, client_for, plain, show
from serve_app.cli.job_file import takes_job

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

UNITS = {"_bytes": "bytes", "_share": "share", "_s": "seconds"}  # by how a name ends
APART = ("message", "memory", "warnings", "samples")


@app.command()
@takes_job
def plan(spec: dict[str, Any], url: str | None, token: str | None, as_json: bool) -> None:
    """Say what a job would take: tokens, steps, memory, time, price; show samples with trained tokens marked."""
    made = client_for(url, token, spec["org"]).plan(spec)
    show(made) if as_json else show_plan(made)


def show_plan(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a plan, also one with more or less in it than today's: names say their units."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    if plan.get("message"):
        console.print(Text(plain(plan["message"])), soft_wrap=True)
    table = Table("what", "how much", show_header=False)
    for name, value in _flat({k: v for k, v in plan.items() if k not in APART}):
        table.add_row(Text(_label(name)), Text(_said(name, value)))
    console.print(table)
    if isinstance(memory := plan.get("memory"), dict):
        console.print(_memory(memory))
    warnings = plan.get("warnings") or []
    for warning in warnings if isinstance(warnings, list) else [warnings]:
        console.print(Text(f"warning: {plain(warning)}", style="yellow"), soft_wrap=True)
    samples = plan.get("samples") or []
    for number, sample in enumerate(samples if isinstance(samples, list) else [samples], 1):
        console.print(_sample(number, sample, console.is_terminal), soft_wrap=True)


def _flat(value: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{above}{name} ")
        else:
            yield f"{above}{name}", inner


def _unit(name: str) -> str | None:
    return next((ending for ending in UNITS if name.endswith(ending)), None)


def _label(name: str) -> str:
    return plain(name.removesuffix(_unit(name) or "").replace("_", " "))


def _said(name: str, value: Any) -> str:
    """A value in the unit of its name."""
    if value is None:
        return "not set" if name == "price" else "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return plain(value if isinstance(value, str) else json.dumps(value))
    unit = UNITS.get(_unit(name) or "")
    if not math.isfinite(value) or unit is None:
        return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    if unit == "bytes":
        return f"{value / 2**30:,.2f} GiB" if abs(value) >= 2**30 else f"{value / 2**20:,.1f} MiB"
    if unit == "share":
        return f"{value:.1%}"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _memory(memory: dict[str, Any]) -> Any:
    """A table of the parts, each with its share; the total and what the machine has last."""
    from rich.table import Table
    from rich.text import Text

    total = memory.get("total_bytes")
    table = Table("memory of a worker", "", "share")
    # What sums up comes last, whatever the order of the answer is.
    for name, value in sorted(_flat(memory), key=lambda item: item[0] in ("total_bytes", "available_bytes", "batch_tokens")):
        counts = name.endswith("_bytes") and _is_positive(total) and isinstance(value, int | float)
        share = f"{value / total:.0%}" if counts and name != "available_bytes" else ""
        table.add_row(Text(_label(name)), Text(_said(name, value)), share)
    return table


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 1


def _sample(number: int, sample: Any, colours: bool) -> Text:
    """A sample, what is trained on marked: bold on a terminal, in double brackets elsewhere."""
    from rich.text import Text

    segments = sample.get("segments") if isinstance(sample, dict) else None
    if not isinstance(segments, list) or not all(isinstance(s, dict) for s in segments):
        return Text(f"sample {number}: {plain(json.dumps(sample, ensure_ascii=False))}")
    text = Text(
        f"sample {number}: {_said('', sample.get('trained_tokens'))} of {_said('', sample.get('tokens'))} tokens trained on\n"
    )
    for segment in segments:
        words = "\n".join(map(plain, str(segment.get("text", "")).split("\n")))
        trained = bool(segment.get("trained"))
        text.append(f"[[{words}]]" if trained and not colours else words, "bold green" if trained else "dim")
    return text
