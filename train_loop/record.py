"""What a run without the service has told so far, for a reader: a service on the same cluster shows such runs in its list.

The run knows of no service and goes on as well without one. Its monitor keeps what it hears, numbered, so that a reader who comes
late, or after a restart, misses nothing and takes nothing twice.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic_core import to_json

from train_loop.errors import RunFault, Stopped, UserError, first_line
from train_loop.redact import Redactor

MONITOR = "run-"  # with the request_id, the name of the run's monitor among Ray's actors
LIVE = frozenset({"phase", "step", "total_steps", "epoch", "eta_s", "progress", "metrics"})  # what changes while a run goes on
KEPT = {"event": 1000, "point": 10_000, "line": 5000, "ending": 1}  # the newest, while nobody reads
MAX_NOTES = 2000  # told at once
COMES_S = 10.0  # a reader that is there has found the run by then
READS_S = 15.0  # one that hasn't asked for so long is gone


@dataclass(frozen=True)
class About:
    """The run: its id, the Ray job that it was submitted as, and its spec as JSON. Nothing of it is secret."""

    request_id: str
    ray_job: str | None
    spec: Mapping[str, Any]


class Record:
    """A run's notes (events, points, log lines, at last its ending) and the fields that change, without its secrets."""

    def __init__(self, about: About | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._about, self._clock, self._id = about, clock, uuid.uuid4().hex
        self._notes = {kind: deque[tuple[int, Any]](maxlen=most) for kind, most in KEPT.items()}
        self._live: dict[str, Any] = {}
        self._last = self._read = 0
        self._began = clock()
        self._asked_at: float | None = None
        self.redactor = Redactor()

    def phase(self, name: str) -> None:
        """Note where the run is."""
        self._live["phase"] = name

    def event(self, kind: str, message: str) -> None:
        """Note something that happened."""
        self._note("event", (kind, self.redactor(message)))

    def progress(self, progress: Mapping[str, Any]) -> None:
        """Note what rank 0 reports."""
        for point in progress.get("points", []):
            self._note("point", point)
        self._live |= {name: value for name, value in progress.items() if name in LIVE}

    def lines(self, rank: int, lines: list[tuple[float, str]]) -> None:
        """Note what a worker logged."""
        for time_, text in lines:
            self._note("line", (rank, time_, self.redactor(text)))

    def end(self, ending: Mapping[str, Any], live: Mapping[str, Any]) -> None:
        """Note how the run has ended; nothing comes after that."""
        self._live |= live
        self._note("ending", {name: self.redactor(said) for name, said in ending.items()})

    def _note(self, kind: str, value: Any) -> None:
        self._last += 1
        self._notes[kind].append((self._last, value))

    def since(self, cursor: str) -> bytes:
        """As JSON: what the run is, where it stands, and what it has told since that `cursor`, with the next one.

        Whoever asks has written down what came with `cursor`, which is from an earlier answer, or of another record, or "".
        """
        of, _, number = cursor.partition(":")
        read = int(number) if of == self._id else 0
        self._read, self._asked_at = max(self._read, read), self._clock()
        kept = ((number, {kind: value}) for kind, notes in self._notes.items() for number, value in notes if number > read)
        fresh = sorted(kept, key=lambda note: note[0])[:MAX_NOTES]
        upto = fresh[-1][0] if fresh else read
        told = {"cursor": f"{self._id}:{upto}", "live": self._live, "notes": [note for _, note in fresh]}
        return to_json((asdict(self._about) if self._about else {}) | told, inf_nan_mode="null")

    def is_read(self) -> bool:
        """Whether there is nothing left to tell, or nobody who would hear it."""
        if self._about is None or self._about.ray_job is None or self._read >= self._last:
            return True
        if self._asked_at is None:
            return self._clock() - self._began > COMES_S
        return self._clock() - self._asked_at > READS_S


def completed(manifest: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """What the owner of a run that has come to its end is told, and the fields as they are at last."""
    what = "adapter" if manifest["adapter_uri"] else "merged"
    uri, count = manifest[f"{what}_uri"], len(manifest[f"{what}_files"])
    message = f"{'Adapter' if what == 'adapter' else 'Model'} saved: {count} files at {uri}."
    live = {"phase": "done", "step": manifest["steps"], "progress": 1.0, "eta_s": 0.0, "metrics": manifest["metrics"]}
    return {"message": message, "output_model_path": uri}, live


def cut_short(error: BaseException) -> dict[str, str]:
    """The ending of a run that this has ended."""
    match error:
        case Stopped():
            return {"status": "CANCELED", "message": "Stopped on request; what was trained so far is kept as a checkpoint."}
        case KeyboardInterrupt():
            return {"status": "CANCELED", "message": "Interrupted: it ended at once. It may have a checkpoint from before."}
        case UserError():
            message, code = error.message, error.code
        case RunFault():
            message, code = error.message, str(error.cause)
        case _:
            message, code = f"an unexpected error ({type(error).__name__}): {first_line(error)}", "internal"
    return {"status": "FAILED", "message": message, "error_code": code, "error_message": message}
