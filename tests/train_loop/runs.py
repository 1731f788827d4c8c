"""A job that checkpoints often, who watches its runs, and what they leave behind."""

import json

from train_loop.__main__ import Console

HP = "train_config.hyperparameters"
STEPS = 5


class Watcher(Console):
    """A monitor that remembers, asks to stop once a step has been reported, or breaks there."""

    def __init__(self, stop_at=None, break_at=None, superseded_at=10**9):
        super().__init__()
        self.stop_at, self.break_at, self.superseded_at, self.seen = stop_at, break_at, superseded_at, -1
        self.events, self.phases, self.points = [], [], {}

    def on_phase(self, name):
        self.phases.append(name)

    def on_event(self, kind, message):
        self.events.append((kind, message))

    def on_progress(self, progress):
        self.seen = progress["step"]
        self.points |= {point["step"]: point for point in progress["points"]}
        if self.seen == self.break_at:
            raise KeyError("this process dies here")

    def stop_requested(self):
        return self.stop_at is not None and self.seen >= self.stop_at

    def is_current(self):
        return self.seen < self.superseded_at

    def said(self, kind):
        return [message for k, message in self.events if k == kind]


def adapter(folder):
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def curve(folder):
    """metrics.jsonl without what a clock says, and how much memory a GPU's allocator has taken."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second", "memory_bytes")} for line in lines]


def short(local_job, changes=None):
    base = {f"{HP}.max_steps": STEPS, f"{HP}.save_steps": 2, f"{HP}.eval_steps": 3, f"{HP}.logging_steps": 3}
    return local_job(base | {"train_config.adapter_config.dropout": 0.2} | (changes or {}))
