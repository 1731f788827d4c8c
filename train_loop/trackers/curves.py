"""What is told of a run wherever its metrics are shown: TensorBoard's file and every tracker have the same curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train_loop.spec import JobSpec


Point = Mapping[str, Any]  # one line of metrics.jsonl

NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "epoch": "train/epoch",
    "eval_loss": "eval/loss",
}


@dataclass(frozen=True)
class RunCard:
    """Which run it is, and how it is set up: the job without its secrets' ids."""

    request_id: str
    org: str
    experiment_name: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, spec: JobSpec, request_id: str) -> RunCard:
        """The card of this job."""
        settings = spec.model_dump(mode="json", exclude={"org", "experiment_name"}, exclude_none=True)
        for section, secret in (("model_details", "secret_id"), ("dataset_details", "secret_id"), ("train_config", "report_to")):
            settings[section].pop(secret, None)
        return cls(request_id, spec.org, spec.experiment_name, settings)


def values(point: Point) -> dict[str, float]:
    """What a point says, by the names of the curves."""
    return {name: point[key] for key, name in NAMES.items() if key in point}
