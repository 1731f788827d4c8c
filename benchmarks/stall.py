"""What checkpoints cost the steps of a run: `python -m benchmarks.stall`.

Our loop as `python -m train_loop --local` runs it, in this process: runs that save every so many steps, and runs that save only
at their end, in turns. All steps are the same work. Told are how long a save holds the loop, and how much longer the steps take
with saves than without: that counts also what is written behind them. From it follows the share at the default save_steps.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.setting import SMOLLM2, machine
from train_loop.__main__ import Console
from train_loop.allocator import environment

TINY = "tuneyard/tiny-random-llama"
SAVE_STEPS = 500  # the default


@dataclass(frozen=True)
class Setting:
    """Of each run `saves` times `every` steps are timed, after twice `every` of them."""

    model: str
    max_length: int  # tokens of a step: a row each
    every: int
    saves: int

    @property
    def last(self) -> int:
        """The last step that is timed. It is saved after that, as every run's last is."""
        return self.every * (2 + self.saves)


SETTINGS = {s.model: s for s in (Setting(TINY, 128, 10, 20), Setting(SMOLLM2, 1024, 3, 4))}


class Times(Console):
    """Listens to a run: when each step ended, and how long each save held the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: dict[int, float] = {}
        self.held: list[float] = []
        self._saving_since: float | None = None

    def on_phase(self, name: str) -> None:
        if self._saving_since is not None:
            self.held.append(time.monotonic() - self._saving_since)
        self._saving_since = time.monotonic() if name == "saving" else None

    def on_progress(self, progress: dict[str, Any]) -> None:
        self.ended[progress["step"]] = time.monotonic()


def took(ended: Mapping[int, float], setting: Setting) -> float:
    """Seconds of the steps that are timed; each save among them comes after the end of one."""
    return ended[setting.last] - ended[2 * setting.every]


def told(found: Mapping[str, Any]) -> str:
    """A line of the table: medians of the runs in turns."""
    setting = Setting(**found["setting"])
    steps = setting.every * setting.saves
    step_s = statistics.median(found["without"]) / steps
    cost_s = statistics.median(a - b for a, b in zip(found["with"], found["without"], strict=True)) / setting.saves
    held_s = statistics.median(found["held"])
    return (
        f"| {setting.model} | {step_s * 1000:.1f} | {held_s * 1000:.1f} | {held_s / step_s:.2%} | {cost_s * 1000:.0f} "
        f"| {cost_s / step_s / setting.every:.2%} of {setting.every} | {cost_s / step_s / SAVE_STEPS:.3%} |"
    )


def measure(setting: Setting, mirror: Path, repetitions: int) -> dict[str, Any]:
    """Runs with saves and without in turns."""
    from benchmarks.memory import job, write_rows
    from benchmarks.sides import Task, trained
    from benchmarks.train import prepare

    found: dict[str, Any] = {"setting": asdict(setting), "with": [], "without": [], "held": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl")
        spec = job(folder / "rows.jsonl", None, False, setting.max_length, 1, False)
        spec["model_details"]["base_model"] = setting.model
        prepare(spec, mirror / setting.model, folder)
        for turn in range(2 * repetitions):
            saves = turn % 2 == 0
            every = setting.every if saves else setting.last
            steps = {"max_steps": setting.last, "save_steps": every, "logging_steps": 5}
            spec["train_config"]["hyperparameters"] |= steps
            with tempfile.TemporaryDirectory(dir=folder) as run:
                shutil.copytree(folder / "data", Path(run, "data"))
                times = Times()
                trained(Task("ours", "", "", spec, mirror / setting.model, Path(run)), times)
            found["with" if saves else "without"].append(took(times.ended, setting))
            found["held"] += times.held[1:-1] if saves else []
            print(f"{setting.model} {'with' if saves else 'without'} saves: {took(times.ended, setting):.3f} s", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--mirror", type=Path, default=Path.home() / ".tuneyard" / "models")
    parser.add_argument("--out", type=Path, default=Path(".bench/stall.json"))
    options = parser.parse_args()
    if settings := environment():  # the allocator of workers, which has to be there from the start
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.stall", *sys.argv[1:]], os.environ | settings)
    found = [measure(SETTINGS[model], options.mirror, options.repetitions) for model in options.model]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**machine(), "runs": found}, indent=1))
    print("| model | ms a step | ms a save holds the loop | of a step | ms a save costs in all | share | share at 500 |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(map(told, found)))


if __name__ == "__main__":
    main()
