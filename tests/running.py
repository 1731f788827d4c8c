"""A whole service as a user has it: `tuneyard up --detach` in a home of its own, then HTTP and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from serve_app.client import FINAL, ApiError, Client
from serve_app.client.answers import is_transient
from tests.conftest import DOCUMENTED, ORG, TINY, with_fields

TUNEYARD = Path(sys.executable).parent / "tuneyard"
DATASETS = "datasets"
FINISH_S = 300


class Running:
    """A service of its own home; `settings` are further TUNEYARD_ variables."""

    def __init__(self, home: Path, mirror: Path, **settings: str) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "TUNEYARD_", "RAY_"))}
        self.env = clean | {
            "TUNEYARD_HOME": str(home),
            "TUNEYARD_MODEL_MIRROR": str(mirror),
            "TUNEYARD_MODEL_CACHE": str(home / "model-cache"),
            "TUNEYARD_HUB_OFFLINE": "true",
            "TUNEYARD_ORG": ORG,
            **settings,
        }
        self.home = home
        self.instances: list[str] = []

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run([TUNEYARD, *arguments], env=self.env, check=check, capture_output=True, text=True, timeout=FINISH_S)

    def start(self) -> None:
        """`tuneyard up`; again after it went down or was killed."""
        self.up = json.loads(self.run("up", "--detach", "--json").stdout)
        self.instances.append(self.state()["instance"])
        self.token = self.run("token", "--org", ORG).stdout.strip()
        self.client = Client(self.up["url"], self.token)
        keys = {"access_key_id": self.up["s3_access_key_id"], "secret_access_key": self.up["s3_secret_access_key"]}
        self.keys = keys | {"endpoint_url": self.up["s3_endpoint_url"]}
        if not hasattr(self, "secret_id"):
            self.secret_id = self.client.create_secret(ORG, "keys", "s3", self.keys)["secret_id"]

    def down(self) -> None:
        """`tuneyard down`, after which nothing that any `up` of this home started may be left."""
        self.run("down")
        left = [process.info for instance in self.instances for process in members(instance)]
        assert left == []

    def state(self) -> dict[str, Any]:
        """What the supervisor wrote about itself."""
        state: dict[str, Any] = json.loads((self.home / "up.json").read_text())
        return state

    def s3(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.up["s3_endpoint_url"],
            aws_access_key_id=self.up["s3_access_key_id"],
            aws_secret_access_key=self.up["s3_secret_access_key"],
            region_name="us-east-1",
        )

    def job(self, name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        base = {
            "experiment_name": name,
            "model_details.base_model": TINY,
            "dataset_details.secret_id": self.secret_id,
            "dataset_details.dataset_path": f"s3://{DATASETS}/rows.jsonl",
            "dataset_config.preprocessing.prompt.max_length": 128,
            "train_config.hyperparameters.logging_steps": 1,
            "infra_config": {"gpu_type": "h100", "gpu_count": 1, "infra_type": "simplismart", "node_count": 1},
        }
        return with_fields(DOCUMENTED, base | (changes or {}))

    def wait(
        self,
        request_id: str,
        until: Callable[[dict[str, Any]], bool] = lambda job: job["status"] in FINAL,
        *,
        every_s: float = 0.5,
        timeout_s: float = FINISH_S,
        client: Client | None = None,
        org: str = ORG,
    ) -> dict[str, Any]:
        """The job once `until` holds of it. A service that is away meanwhile is asked again."""
        deadline = time.monotonic() + timeout_s
        job: dict[str, Any] = {}
        while time.monotonic() < deadline:
            try:
                job = (client or self.client).get(request_id, org)
            except (httpx.TransportError, ApiError) as error:
                if not is_transient(error):
                    raise
            else:
                if until(job):
                    return job
            time.sleep(every_s)
        raise AssertionError(f"job {request_id} hangs: {self.describe(request_id, job)}")

    def describe(self, request_id: str, job: dict[str, Any]) -> str:
        """Where a job stands and how it got there."""
        stands = {k: job.get(k) for k in ("status", "phase", "step", "total_steps", "attempt", "message", "updated_at")}
        try:
            events = [f"{e['time']} {e['kind']}: {e['message']}" for e in self.client.events(request_id, ORG)["events"]]
        except (httpx.TransportError, ApiError) as error:
            events = [f"its events can't be read: {error}"]
        return "\n  ".join([str(stands), *events[-12:]])


def members(instance: str) -> list[psutil.Process]:
    """The processes that a supervisor and all below it inherited their mark from."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        try:
            if process.environ().get("TUNEYARD_INSTANCE") == instance and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
