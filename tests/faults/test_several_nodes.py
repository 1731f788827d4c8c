"""A node of a cluster is lost under a job: it goes on on another node, or on fewer."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import httpx
import psutil
import pytest

from serve_app.client import Client
from tests.conftest import ORG
from tests.faults.conftest import SETTINGS
from tests.faults.harness import Row, Service
from tests.running import members

pytestmark = [pytest.mark.faults, pytest.mark.faults_full]
SLOTS = 3


class OnSeveralNodes(Service):
    """The service on a head and three nodes, each a raylet of its own."""

    def start(self) -> None:
        instance = uuid.uuid4().hex
        self.instances.append(instance)
        # Unix sockets below this folder must stay under 108 characters.
        self.ray_dir = tempfile.mkdtemp(prefix="tuneyard-ray-")
        (self.home / "up.json").write_text(json.dumps({"instance": instance, "ray_dir": self.ray_dir}))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.several_nodes", str(self.home), str(SLOTS)],
            env=self.env | {"TUNEYARD_INSTANCE": instance, "TUNEYARD_RAY_DIR": self.ray_dir},
            cwd=Path(__file__).parent.parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.home / "nodes.log").open("ab"),
            text=True,
        )
        line = self.process.stdout.readline()
        assert line, (self.home / "nodes.log").read_text()[-3000:]
        self.up = json.loads(line)
        self.token = self.run("token", "--org", ORG).stdout.strip()
        self.client = Client(self.up["url"], self.token)
        self.keys = {
            "access_key_id": self.up["s3_access_key_id"],
            "secret_access_key": self.up["s3_secret_access_key"],
            "endpoint_url": self.up["s3_endpoint_url"],
        }
        self.secret_id = self.client.create_secret(ORG, "keys", "s3", self.keys)["secret_id"]
        self.prepare_looking()

    def down(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            for process in members(self.instances[-1]):
                process.kill()
            shutil.rmtree(self.ray_dir, ignore_errors=True)

    def lose_a_node_that_trains(self) -> None:
        """A machine goes with everything on it: its raylet first."""
        answer = httpx.get(f"{self.up['dashboard_url']}/api/v0/actors", params={"detail": 1, "limit": 10_000}, timeout=30)
        actors = answer.raise_for_status().json()["data"]["result"]["result"]
        busy = {a["node_id"] for a in actors if a["class_name"] == "RayTrainWorker" and a["state"] == "ALIVE"}
        raylets = [psutil.Process(pid) for node, pid in self.up["raylets"].items() if node in busy]
        assert raylets
        lost = [raylets[0], *raylets[0].children(recursive=True)]
        for process in lost:
            process.kill()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory, mirror, postgres):
    postgres.psql("CREATE DATABASE nodes;")
    url = postgres.get_uri(database="nodes").replace("postgresql://", "postgresql+psycopg://")
    settings = {"TUNEYARD_DATABASE_URL": url}
    with OnSeveralNodes(tmp_path_factory.mktemp("nodes"), mirror, **SETTINGS, **settings).up_with_data() as running:
        yield running


def test_a_lost_node_is_no_retry_and_fewer_nodes_take_the_same_steps(nodes, table):
    """Three nodes, a job on two: the first loss leaves two, the second one, on which an elastic job goes on."""
    infra = {"gpu_type": "cpu", "gpu_count": 1, "node_count": 2, "min_node_count": 1, "max_retries": 0}
    request_id = nodes.submit("nodes", {f"infra_config.{name}": value for name, value in infra.items()})
    for step in (5, 12):
        nodes.until(request_id, lambda job, step=step: job["phase"] == "training" and job["step"] >= step, f"step {step}")
        attempt = nodes.look(request_id)["attempt"]
        nodes.lose_a_node_that_trains()
        nodes.until(request_id, lambda job, attempt=attempt: job["attempt"] > attempt, "another attempt")
    started = time.monotonic()
    job = nodes.finished(request_id)
    assert job["attempt"] == 3
    result = nodes.result(job)
    same = all(abs(result.losses[s] - loss) < 0.05 * abs(loss) for s, loss in table.undisturbed.losses.items())
    table.rows.append(
        Row("two of three nodes", "training", job["status"], 3, time.monotonic() - started, result.final_loss, None)
    )
    assert sorted(result.losses) == sorted(table.undisturbed.losses)
    assert same
