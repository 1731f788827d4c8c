"""Weights & Biases, by its own client (`pip install tuneyard[wandb]`), which runs in a process of its own.

There it can neither hold up the end of the worker, which it would do until everything has arrived, nor change the worker's
streams, environment and signals. The process gets its keys through a pipe, and ends when that is closed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train_loop.trackers.curves import Point, RunCard, values
from train_loop.trackers.tracker import Ending, TrackerAway, TrackerRefused

INIT_S = 60  # to reach the server
FINISH_S = 8  # to send what is left
ANSWER_S = 90  # from its process
ORPHAN_S = 10  # that the process lives on without a worker
MAX_TAG_CHARS = 64


def is_installed() -> bool:
    """Whether W&B's client is there."""
    found = importlib.util.find_spec("wandb")
    return found is not None and found.origin is not None  # and not a folder of runs that is called so


class WeightsAndBiases:
    """One run of a W&B server; its id is the request_id. Raises TrackerAway, TrackerRefused."""

    def __init__(self, data: Mapping[str, str], card: RunCard, scratch: Path) -> None:
        if not is_installed():
            raise TrackerRefused("can't be reached from here: the worker has no package wandb (pip install tuneyard[wandb])")
        # The operator's own settings of it aren't the user's.
        plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        try:
            folder = tempfile.mkdtemp(dir=scratch, prefix="wandb-")
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                env=plain | {"WANDB_ERROR_REPORTING": "false"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:  # no room, or the attempt has ended and its folder is gone
            raise TrackerAway(f"can't be reached ({type(error).__name__})") from None
        self._newest: Point | None = None
        self._ask({"data": dict(data), "card": asdict(card), "folder": folder})

    def log(self, points: Sequence[Point]) -> None:
        """Keep these points, the newest so far once there is a newer one.

        The client takes each step once, and the newest may still get an evaluation: after a failure, from the next attempt.
        """
        *whole, self._newest = {point["step"]: point for point in (*filter(None, [self._newest]), *points)}.values()
        self._send(whole)

    def close(self, ending: Ending) -> None:
        """Write down how the attempt ended."""
        if self._newest is not None and ending != "failed":
            self._send([self._newest])
        self._ask({"exit_code": 0 if ending == "completed" else 1})
        self._end()

    def _send(self, points: Sequence[Point]) -> None:
        self._ask({"points": [(p["step"], values(p) | {"_timestamp": p["time"]}) for p in points]})

    def _ask(self, question: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Timer(ANSWER_S, self._process.kill)
        late.start()
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            said = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):  # it has ended
            said = {"error": "its client ended"}
        finally:
            late.cancel()
        if "error" in said:
            self._end()
            if said.get("refused"):
                raise TrackerRefused(f"refuses what it is sent ({said['error']})")
            raise TrackerAway(f"can't be reached ({said['error']})")

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.communicate()


def main() -> None:
    """The process: answers each line of its input with one of its output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        time.sleep(ORPHAN_S)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    import wandb

    run: Any = None
    while True:
        asked = json.loads(lines.get())
        said: dict[str, Any] = {}
        try:
            if "card" in asked:
                run = _init(asked["data"], asked["card"], asked["folder"])
            for step, point in asked.get("points", ()):
                run.log(point, step=step)
            if "exit_code" in asked:
                run.finish(exit_code=asked["exit_code"])
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            said = {"error": type(error).__name__, "refused": True}
        except Exception as error:  # noqa: BLE001 - whatever it is, the worker is to hear of it
            # Its text may hold the key. A key that is no good is a "CommError", too; what the server said comes after its status.
            status = re.search(r"returned error (40[0134])\b", str(error))
            said = {"error": status[1], "refused": True} if status else {"error": type(error).__name__}
        answers.write(json.dumps(said) + "\n")
        answers.flush()


def _init(data: dict[str, str], card: dict[str, Any], folder: str) -> Any:
    import wandb

    # There its client writes down what a server answers, which may quote the key; no setting turns that off.
    wandb.Settings.log_internal = property(lambda _: os.devnull)  # type: ignore[assignment, method-assign]
    name = card["experiment_name"]
    return wandb.init(
        project=data["project"],
        entity=data.get("entity"),
        id=card["request_id"],
        name=name,
        resume="allow",
        tags=[card["request_id"], card["org"], name[:MAX_TAG_CHARS]],
        config={key: card[key] for key in ("request_id", "org", "experiment_name")} | card["settings"],
        dir=folder,
        settings=wandb.Settings(
            api_key=data["api_key"],
            **({"base_url": data["base_url"]} if "base_url" in data else {}),
            mode="online",
            init_timeout=INIT_S,
            finish_timeout=FINISH_S,
            finish_timeout_raises=True,
            # Only what the job says: nothing of the machine, its code or its output.
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        ),
    )


if __name__ == "__main__":
    main()
