"""MLflow, by its REST API: a handful of calls, which its own client would bring Databricks' SDK and git for.

Source: mlflow.org/docs/latest/rest-api.html
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from train_loop.storage import answers_later
from train_loop.trackers.curves import Point, RunCard, values
from train_loop.trackers.tracker import Ending, TrackerAway, TrackerRefused

EXPERIMENT = "tuneyard"
TIMEOUT = httpx.Timeout(10, connect=5)
MAX_METRICS, MAX_PARAMS = 1000, 100  # of one request
MAX_VALUE_CHARS = 500  # of a parameter: the least that any version takes
STATUS = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
ERROR_CODE = re.compile(r"[A-Z_]{1,64}")


class Mlflow:
    """One run of an MLflow server. Raises TrackerAway, TrackerRefused."""

    def __init__(self, data: Mapping[str, str], card: RunCard) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # which has a line for each request
        headers = {"Authorization": f"Bearer {data['token']}"} if "token" in data else {}
        self._client = httpx.Client(
            base_url=data["tracking_uri"].rstrip("/") + "/api/2.0/mlflow/",
            headers=headers,
            auth=(data["username"], data["password"]) if "username" in data else None,
            timeout=TIMEOUT,
        )
        self._last_step: dict[str, int] = {}  # of each curve, what the server has
        try:
            experiment = self._experiment(data.get("experiment", EXPERIMENT))
            self._run_id = self._found(experiment, card) or self._made(experiment, card)
        except (KeyError, TypeError, ValueError):
            raise TrackerRefused("doesn't answer as MLflow does") from None
        params = [{"key": key, "value": value} for key, value in _flat(card.settings)]
        for start in range(0, len(params), MAX_PARAMS):
            self._call("runs/log-batch", {"run_id": self._run_id, "params": params[start : start + MAX_PARAMS]})

    def log(self, points: Sequence[Point]) -> None:
        """Keep these points."""
        metrics = [
            {"key": key, "value": value, "timestamp": int(point["time"] * 1000), "step": point["step"]}
            for point in points
            for key, value in values(point).items()
            if point["step"] > self._last_step.get(key, -1)
        ]
        for start in range(0, len(metrics), MAX_METRICS):
            part = metrics[start : start + MAX_METRICS]
            self._call("runs/log-batch", {"run_id": self._run_id, "metrics": part})
            self._last_step |= {m["key"]: m["step"] for m in part}

    def close(self, ending: Ending) -> None:
        """Write down how the attempt ended."""
        ended = {"run_id": self._run_id, "status": STATUS[ending], "end_time": _now_ms()}
        self._call("runs/update", ended)
        self._client.close()

    def _experiment(self, name: str) -> str:
        for _ in range(2):
            asked = {"experiment_name": name}
            found = self._call("experiments/get-by-name", asked, "GET", unless="RESOURCE_DOES_NOT_EXIST")
            if found is not None:
                return str(found["experiment"]["experiment_id"])
            # Another run may make it first.
            made = self._call("experiments/create", {"name": name}, unless="RESOURCE_ALREADY_EXISTS")
            if made is not None:
                return str(made["experiment_id"])
        raise TrackerRefused(f"neither has nor makes the experiment {name}")

    def _found(self, experiment: str, card: RunCard) -> str | None:
        """The run that an attempt before made; what it has of each curve is noted."""
        asked = {"experiment_ids": [experiment], "filter": f"tags.request_id = '{card.request_id}'", "max_results": 1}
        runs = (self._call("runs/search", asked) or {}).get("runs", [])
        if not runs:
            return None
        self._last_step = {m["key"]: int(m.get("step", 0)) for m in runs[0]["data"].get("metrics", [])}
        run_id = str(runs[0]["info"]["run_id"])
        self._call("runs/update", {"run_id": run_id, "status": "RUNNING"})
        return run_id

    def _made(self, experiment: str, card: RunCard) -> str:
        tags = {"request_id": card.request_id, "org": card.org, "experiment_name": card.experiment_name}
        made = self._call(
            "runs/create",
            {
                "experiment_id": experiment,
                "run_name": card.experiment_name,
                "start_time": _now_ms(),
                "tags": [{"key": key, "value": value} for key, value in tags.items()],
            },
        )
        return str((made or {})["run"]["info"]["run_id"])

    def _call(self, path: str, body: dict[str, Any], method: str = "POST", unless: str = "") -> dict[str, Any] | None:
        """The answer; None where it is the error `unless`."""
        try:
            given: dict[str, Any] = {"params": body} if method == "GET" else {"json": body}
            answer = self._client.request(method, path, **given)
        except httpx.HTTPError as error:
            raise TrackerAway(f"doesn't answer ({type(error).__name__})") from None
        if answers_later(answer.status_code):
            raise TrackerAway(f"answers with {answer.status_code}")
        try:
            said = answer.json()
        except ValueError:
            said = {}
        if answer.status_code == 200 and isinstance(said, dict):
            return said
        code = said.get("error_code", "") if isinstance(said, dict) else ""
        if unless and code == unless:
            return None
        # Of its own words only the code is shown: the rest may quote what it was sent.
        shown = f", {code}" if isinstance(code, str) and ERROR_CODE.fullmatch(code) else ""
        raise TrackerRefused(f"refuses what it is sent ({answer.status_code}{shown})")


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """The settings as MLflow's parameters: dotted names, and values that are text."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", (value if isinstance(value, str) else json.dumps(value))[:MAX_VALUE_CHARS]


def _now_ms() -> int:
    return int(time.time() * 1000)
