"""A job's progress for a person: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from serve_app.cli.common import plain

if TYPE_CHECKING:
    from serve_app.client import JobAnswer, JobMetrics, MetricPoint


def _eta(seconds: float | None) -> str:
    return "" if seconds is None else f"ETA {int(seconds) // 60}:{int(seconds) % 60:02d}"


def describe(job: JobAnswer) -> str:
    """Status, phase, step, loss, tokens/s and ETA in one line; what isn't known yet is left out."""
    parts = [f"{job['status']} {job.get('phase') or ''}".rstrip()]
    if job["status"] == "QUEUED" and job.get("queue_position"):
        parts.append(f"position {job['queue_position']}")
    if job.get("total_steps"):
        parts.append(f"step {job.get('step') or 0}/{job['total_steps']}")
    metrics: JobMetrics = job.get("metrics") or {}
    last: MetricPoint | None = metrics.get("last")
    if last and (loss := last.get("loss")) is not None:
        parts.append(f"loss {loss:.3f}")
    if last and (pace := last.get("tokens_per_second")) is not None:
        parts.append(f"{pace:.0f} tokens/s")
    if job["status"] == "RUNNING" and job.get("phase") == "training":
        parts.append(_eta(job.get("eta_s")))
    return "  ".join(p for p in parts if p)


def summary(job: JobAnswer) -> str:
    """How a job ended, or what it says now, for a terminal."""
    metrics = job.get("metrics") or {}
    said, error = job.get("message") or "", job.get("error_message") or ""
    lines = [said, *([error] if error and error not in said else [])]
    if metrics.get("eval_loss_before") is not None and metrics.get("eval_loss_after") is not None:
        # Until an evaluation after training began, both are the one before it.
        later = f" -> {metrics['eval_loss_after']:.4f}" if metrics.get("best") else " before training"
        lines.append(f"eval loss {metrics['eval_loss_before']:.4f}{later}")
    if job.get("output_model_path"):
        lines.append(f"output: {job['output_model_path']}")
    return "\n".join(map(plain, "\n".join(lines).splitlines()))


def follow(jobs: Iterator[JobAnswer], console: Console | None = None) -> JobAnswer | None:
    """Show each state of the job until there are no more; return the last."""
    console = console or Console()
    job = None
    if console.is_terminal:
        with Progress(
            BarColumn(30), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}", markup=False), console=console
        ) as bar:
            task = bar.add_task("", total=1.0)
            for job in jobs:
                bar.update(task, completed=job.get("progress") or 0, description=describe(job))
    else:
        shown = ""
        for job in jobs:
            line = f"{job.get('progress') or 0:>4.0%}  {describe(job)}"
            if line != shown:
                console.print(line, highlight=False, markup=False, soft_wrap=True)
                shown = line
    if job:
        console.print(summary(job), highlight=False, markup=False, soft_wrap=True)
    return job
