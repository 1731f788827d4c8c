"""A node of a cluster is lost or taken back under a job: it goes on on another node, or on fewer."""

import json
import math
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
from tests.faults.harness import HP, Row, Service
from tests.running import members

pytestmark = [pytest.mark.faults, pytest.mark.faults_full, pytest.mark.timeout(600)]
NOTICE_S = 5  # from the notice until the machine goes


class OnSeveralNodes(Service):
    """The service on a head and further nodes, each a raylet of its own."""

    def start(self) -> None:
        instance = uuid.uuid4().hex
        self.instances.append(instance)
        # Unix sockets below this folder must stay under 108 characters.
        self.ray_dir = tempfile.mkdtemp(prefix="tuneyard-ray-")
        (self.home / "up.json").write_text(json.dumps({"instance": instance, "ray_dir": self.ray_dir}))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.several_nodes", str(self.home)],
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
        self.raylets: dict[str, int] = {}
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

    def have(self, count: int) -> None:
        """So many nodes besides the head: what is missing is added."""
        assert count >= len(self.raylets)
        for _ in range(count - len(self.raylets)):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            node, pid = json.loads(self.process.stdout.readline())
            self.raylets[node] = pid

    def a_node_that_trains(self) -> str:
        """Ray's id of one, not the head."""
        answer = httpx.get(f"{self.up['dashboard_url']}/api/v0/actors", params={"detail": 1, "limit": 10_000}, timeout=30)
        actors = answer.raise_for_status().json()["data"]["result"]["result"]
        busy = {a["node_id"] for a in actors if a["class_name"] == "RayTrainWorker" and a["state"] == "ALIVE"}
        return next(node for node in self.raylets if node in busy)

    def lose(self, node: str) -> None:
        """A machine goes with everything on it: its raylet first."""
        raylet = psutil.Process(self.raylets.pop(node))
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()

    def give_notice(self, node: str) -> None:
        """Say that a machine will be taken back, as an autoscaler does that its cloud has told so."""
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"]
        when = ["--deadline-remaining-seconds", str(NOTICE_S)]
        command = [Path(sys.executable).parent / "ray", "drain-node", "--address", self.up["ray_address"], "--node-id", node]
        subprocess.run([*command, *why, *when], check=True, env=self.env | {"RAY_AUTH_MODE": "disabled"}, capture_output=True)

    def events_of(self, request_id: str, kind: str) -> list[str]:
        """What was said of that kind, in order."""
        return [e["message"] for e in self.client.events(request_id, ORG)["events"] if e["kind"] == kind]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory, mirror, postgres):
    postgres.psql("CREATE DATABASE nodes;")
    url = postgres.get_uri(database="nodes").replace("postgresql://", "postgresql+psycopg://")
    settings = {"TUNEYARD_DATABASE_URL": url}
    with OnSeveralNodes(tmp_path_factory.mktemp("nodes"), mirror, **SETTINGS, **settings).up_with_data() as running:
        yield running


def submit(nodes, name, save_steps=100_000, **infra):
    """A job on two nodes that may not fail and lasts longer than a notice; by default only the best evaluations are saved."""
    infra = {"gpu_type": "cpu", "gpu_count": 1, "node_count": 2, "max_retries": 0} | infra
    steps = {f"{HP}.max_steps": 120, f"{HP}.save_steps": save_steps}
    return nodes.submit(name, {f"infra_config.{key}": value for key, value in infra.items()} | steps)


@pytest.fixture(scope="module")
def undisturbed(nodes):
    nodes.have(2)
    return nodes.result(nodes.finished(submit(nodes, "undisturbed")))


@pytest.fixture
def ends_well(nodes, undisturbed, table_rows):
    """Wait for a job that lost nodes, add it to the table, and hold its losses against the undisturbed ones."""

    def wait(request_id, victim, since, same_until):
        job = nodes.finished(request_id)
        result = nodes.result(job)
        row = Row(victim, "training", job["status"], job["attempt"], time.monotonic() - since, result.final_loss)
        table_rows.append(row)
        assert sorted(result.losses) == sorted(undisturbed.losses)
        for step, loss in undisturbed.losses.items():
            # On another number of workers dropout is drawn anew.
            assert result.losses[step] == loss if step <= same_until else abs(result.losses[step] - loss) < 0.05 * abs(loss)
        return job, result

    return wait


def test_a_lost_node_is_no_retry_and_fewer_nodes_take_the_same_steps(nodes, ends_well):
    """Three nodes, a job on two: the first loss leaves two, the second one, on which an elastic job goes on."""
    nodes.have(3)
    request_id = submit(nodes, "lost", save_steps=4, min_node_count=1)
    for step in (5, 12):
        nodes.until(request_id, lambda job, step=step: job["phase"] == "training" and job["step"] >= step, f"step {step}")
        attempt = nodes.look(request_id)["attempt"]
        nodes.lose(nodes.a_node_that_trains())
        nodes.until(request_id, lambda job, attempt=attempt: job["attempt"] > attempt, "another attempt")
    job, _ = ends_well(request_id, "two of three nodes", time.monotonic(), same_until=0)
    assert job["attempt"] == 3


def until_taken_back(nodes, request_id):
    """Give a node of the job notice and take it at the deadline; the step saved meanwhile, once another attempt began."""
    nodes.until(request_id, lambda job: job["phase"] == "training" and job["step"] >= 5, "step 5")
    node = nodes.a_node_that_trains()
    nodes.give_notice(node)
    gone_at = time.monotonic() + NOTICE_S
    nodes.until(request_id, lambda _: nodes.events_of(request_id, "preempted"), "a checkpoint because of the notice")
    saved = nodes.events_of(request_id, "preempted")[0]
    time.sleep(max(0.0, gone_at - time.monotonic()))
    nodes.lose(node)
    nodes.until(request_id, lambda job: job["attempt"] > 1, "another attempt")
    return int(saved.removesuffix(" is saved").rpartition(" ")[2])


def test_after_a_notice_a_job_goes_on_from_that_step_on_another_node_as_if_nothing_had_been(nodes, undisturbed, ends_well):
    nodes.have(3)
    request_id = submit(nodes, "taken-back")
    saved, since = until_taken_back(nodes, request_id), time.monotonic()
    job, result = ends_well(request_id, "one of three nodes, with notice", since, same_until=math.inf)
    assert result == undisturbed
    assert job["attempt"] == 2
    assert nodes.resumed_at(request_id)[2] >= saved  # later where an evaluation was the best yet, and saved too


def test_after_a_notice_an_elastic_job_that_no_other_node_has_room_for_goes_on_smaller(nodes, ends_well):
    nodes.have(2)
    request_id = submit(nodes, "taken-back-for-good", min_node_count=1)
    saved, since = until_taken_back(nodes, request_id), time.monotonic()
    job, _ = ends_well(request_id, "one of two nodes, with notice", since, same_until=saved)
    assert job["attempt"] == 2
    assert nodes.resumed_at(request_id)[2] >= saved  # later where an evaluation was the best yet, and saved too
