"""A job's progress for a person: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text


def _eta(seconds: float | None) -> str:
    return "" if seconds is None else f"ETA {int(seconds) // 60}:{int(seconds) % 60:02d}"


def describe(job: dict[str, Any]) -> str:
    """Status, phase, step, loss, tokens/s and ETA in one line; what isn't known yet is left out."""
    parts = [f"{job['status']} {job.get('phase') or ''}".rstrip()]
    if job["status"] == "QUEUED" and job.get("queue_position"):
        parts.append(f"position {job['queue_position']}")
    if job.get("total_steps"):
        parts.append(f"step {job.get('step') or 0}/{job['total_steps']}")
    last = (job.get("metrics") or {}).get("last") or {}
    if last.get("loss") is not None:
        parts.append(f"loss {last['loss']:.3f}")
    if last.get("tokens_per_second") is not None:
        parts.append(f"{last['tokens_per_second']:.0f} tokens/s")
    if job["status"] == "RUNNING" and job.get("phase") == "training":
        parts.append(_eta(job.get("eta_s")))
    return "  ".join(p for p in parts if p)


def summary(job: dict[str, Any]) -> str:
    """How a job ended, or what it says now."""
    metrics = job.get("metrics") or {}
    said, error = job.get("message") or "", job.get("error_message") or ""
    lines = [said, *([error] if error and error not in said else [])]
    if metrics.get("eval_loss_before") is not None and metrics.get("eval_loss_after") is not None:
        lines.append(f"eval loss {metrics['eval_loss_before']:.4f} -> {metrics['eval_loss_after']:.4f}")
    if job.get("output_model_path"):
        lines.append(f"adapter: {job['output_model_path']}")
    return "\n".join(lines)


def follow(jobs: Iterator[dict[str, Any]], console: Console | None = None) -> dict[str, Any]:
    """Show each state of the job until there are no more; return the last."""
    console = console or Console()
    job: dict[str, Any] = {}
    if console.is_terminal:
        with Progress(
            BarColumn(30), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"), console=console
        ) as bar:
            task = bar.add_task("", total=1.0)
            for job in jobs:
                bar.update(task, completed=job.get("progress") or 0, description=describe(job))
    else:
        shown = ""
        for job in jobs:
            line = f"{job.get('progress') or 0:>4.0%}  {describe(job)}"
            if line != shown:
                console.print(line, highlight=False, soft_wrap=True)
                shown = line
    console.print(summary(job), highlight=False, soft_wrap=True)
    return job


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def show_plan(plan: dict[str, Any], console: Console | None = None) -> None:
    """Print a plan; of the samples, what is trained on is bold."""
    console = console or Console()
    rows, tokens, memory = plan["rows"], plan["tokens"], plan["memory"]
    about = "" if rows["exact"] else "about "
    console.print(plan["message"], highlight=False, soft_wrap=True)
    facts = {
        "rows": f"{about}{rows['total']:,} ({rows['train']:,} train, {rows['eval']:,} eval)",
        "tokens": f"{tokens['per_row_mean']:,} a row (up to {tokens['per_row_max']:,}), "
        f"{tokens['supervised_share']:.0%} trained on",
        "steps": f"{plan['steps']:,} of {plan['samples_per_step']} samples; {tokens['trained_on']:,} tokens in all",
        "parameters": f"{plan['trainable_params']:,} trainable",
        "time": f"about {plan['time_s'] // 60} min {plan['time_s'] % 60} s, {plan['gpu_hours']:g} worker hours",
        "price": "no price set" if plan["price"] is None else f"{plan['price']:,.2f}",
        "memory": f"{_mib(memory['total_bytes'])} a worker"
        + (f" of {_mib(memory['available_bytes'])}" if memory["available_bytes"] else ""),
    }
    parts = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "runtime")
    for name, value in facts.items():
        console.print(f"{name:<11} {value}", highlight=False, soft_wrap=True)
    console.print(" " * 12 + ", ".join(f"{p} {_mib(memory[f'{p}_bytes'])}" for p in parts), highlight=False, soft_wrap=True)
    for warning in plan["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    for number, sample in enumerate(plan["samples"], 1):
        console.print(f"sample {number}: {sample['trained_tokens']} of {sample['tokens']} tokens trained on", highlight=False)
        text = Text()
        for part in sample["segments"]:
            text.append(
                part["text"] if console.is_terminal or not part["trained"] else f"[[{part['text']}]]",
                "bold" if part["trained"] else "dim",
            )
        console.print(text)
