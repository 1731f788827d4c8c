"""What a tracker is: something that keeps one run's points, and may be away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from train_loop.trackers.curves import Point

Ending = Literal["completed", "stopped", "failed"]
SECRETS = ("password", "token", "api_key")
# Of each kind's fields, the variable of its own client, and whether there must be one.
ENVIRONMENT = {
    "mlflow": {
        "tracking_uri": ("MLFLOW_TRACKING_URI", True),
        "username": ("MLFLOW_TRACKING_USERNAME", False),
        "password": ("MLFLOW_TRACKING_PASSWORD", False),
        "token": ("MLFLOW_TRACKING_TOKEN", False),
        "experiment": ("MLFLOW_EXPERIMENT_NAME", False),
    },
    "wandb": {
        "api_key": ("WANDB_API_KEY", True),
        "project": ("WANDB_PROJECT", True),
        "entity": ("WANDB_ENTITY", False),
        "base_url": ("WANDB_BASE_URL", False),
    },
}


@dataclass(frozen=True)
class TrackerKeys:
    """A secret of type mlflow or wandb. No part of its data shows in its repr."""

    kind: str
    data: Mapping[str, str] = field(repr=False)

    def values(self) -> list[str]:
        """What no log may show."""
        return [self.data[name] for name in SECRETS if name in self.data]


class TrackerAway(Exception):
    """No answer: worth another try. The message is the end of a sentence that begins with the tracker's name."""


class TrackerRefused(Exception):
    """An answer that another try wouldn't change. The message is as TrackerAway's."""


class Tracker(Protocol):
    """A run in a tracker, found by its request_id or made. Raises TrackerAway and TrackerRefused.

    What it has already it isn't given twice, though it may be told of it: attempts begin with the points of the ones before.
    """

    def log(self, points: Sequence[Point]) -> None:
        """Keep these points, whose steps don't go down."""
        ...

    def close(self, ending: Ending) -> None:
        """Write down how the attempt ended."""
        ...
