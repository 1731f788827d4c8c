"""From the loop to the trackers that the job names: never in the way of a step, and never the reason for a failure.

Each tracker has a thread, which is given points and sends them on. While the tracker is away they wait; an event says so once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from train_loop.errors import UserError
from train_loop.trackers.curves import Point, RunCard
from train_loop.trackers.mlflow import Mlflow
from train_loop.trackers.tracker import Ending, Tracker, TrackerAway, TrackerKeys, TrackerRefused
from train_loop.trackers.weights_and_biases import WeightsAndBiases

MAX_WAITING = 10_000  # points; of more the oldest are given up
BATCH = 100  # points sent at once
PAUSE_S = 15.0  # between tries at a tracker that is away
LAST_S = 10.0  # that the end of an attempt waits for what is still on its way

Tell = Callable[[str, str], Any]
OpenKeys = Callable[[str], TrackerKeys]


class Reporter:
    """The trackers of one attempt."""

    def __init__(self, senders: Sequence[_Sender]) -> None:
        self._senders = senders
        self.ending: Ending = "failed"  # unless it is known to have ended otherwise

    def points(self, points: Sequence[Point]) -> None:
        """Have these sent some time soon, as far as they are new. Never blocks."""
        for sender in self._senders:
            sender.add(points)

    def end(self) -> None:
        """Have the ending sent; wait some seconds for what is on its way."""
        for sender in self._senders:
            sender.end(self.ending)
        for sender in self._senders:
            sender.join()


@contextlib.contextmanager
def reporting(secrets: Sequence[str], card: RunCard, keys: OpenKeys, tell: Tell, scratch: Path) -> Iterator[Reporter]:
    """Inside, points go to the trackers of these secrets. `keys` opens one, `tell` is for events."""
    reporter = Reporter([_Sender(secret, keys, card, tell, scratch) for secret in secrets])
    try:
        yield reporter
    finally:
        reporter.end()


class _Sender:
    """The thread of one tracker, and what waits for it."""

    def __init__(self, secret: str, keys: OpenKeys, card: RunCard, tell: Tell, scratch: Path) -> None:
        self._secret, self._open_keys, self._card, self._tell, self._scratch = secret, keys, card, tell, scratch
        self._name = f"the tracker of secret {secret}"
        self._keys: TrackerKeys | None = None
        self._changed = threading.Condition()
        self._waiting: dict[int, Point] = {}  # by step
        self._lost = 0
        self._tracker: Tracker | None = None
        self._refused = False
        self._ending: Ending | None = None
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()

    def add(self, points: Sequence[Point]) -> None:
        with self._changed:
            self._waiting |= {point["step"]: dict(point) for point in points}
            while len(self._waiting) > MAX_WAITING:
                del self._waiting[next(iter(self._waiting))]
                self._lost += 1
            self._changed.notify()

    def end(self, ending: Ending) -> None:
        with self._changed:
            self._ending = ending
            self._changed.notify()

    def join(self) -> None:
        self._thread.join(LAST_S)
        with self._changed:
            missing = self._lost + len(self._waiting)
            if missing and not self._refused:
                self._say(f"lacks {missing} points of this attempt; metrics.jsonl has them all")

    def _run(self) -> None:
        told = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tracker is None or self._waiting or self._ending)
                batch, ending = list(self._waiting.values())[:BATCH], self._ending
            try:
                self._tracker = self._tracker or self._connect()
                if batch:
                    self._tracker.log(batch)
                elif ending is not None:
                    self._tracker.close(ending)
                    return
            except TrackerRefused as error:
                self._refused = True
                self._say(f"{error}: nothing more is sent there")
                return
            except TrackerAway as error:
                self._tracker = None
                if not told:
                    told = True
                    self._say(f"{error}: the job goes on, and its points wait")
                with self._changed:
                    if ending is not None:
                        return
                    self._changed.wait_for(lambda: self._ending is not None, PAUSE_S)
                continue
            with self._changed:
                for point in batch:
                    if self._waiting.get(point["step"]) is point:  # an evaluation may have come to it meanwhile
                        del self._waiting[point["step"]]

    def _connect(self) -> Tracker:
        if self._keys is None:
            try:
                self._keys = self._open_keys(self._secret)
            except UserError as error:
                raise TrackerRefused(f"can't be opened ({error.message.rstrip('.')})") from None
        data = self._keys.data
        if self._keys.kind == "mlflow":
            self._name = f"MLflow at {urlsplit(data['tracking_uri']).hostname}"
            return Mlflow(data, self._card)
        self._name = "Weights & Biases"
        return WeightsAndBiases(data, self._card, self._scratch)

    def _say(self, text: str) -> None:
        self._tell("tracker", f"{self._name} {text}")
