"""`tuneyard serve` on a Ray of the operator's own: `ray start` with a token, PostgreSQL, S3, an issuer's public key.

The head has no CPUs to train on, and the machine that has some knows nothing of the service's settings.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import httpx
import jwt
import psutil
import pytest
import sqlalchemy as sa
import yaml
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from serve_app.client import Client
from serve_app.embedded.ports import free_ports
from serve_app.embedded.s3 import BUCKET
from serve_app.settings import write_private
from serve_app.store.jobs import JobStore
from serve_app.store.tables import leases
from tests.conftest import CANARY, DOCUMENTED, ORG, TINY, postgres_server, rows, with_fields
from tests.running import TUNEYARD, members
from tests.service.test_canaries import Canaries

pytestmark = pytest.mark.service
PATIENCE_S = 180
HP = "train_config.hyperparameters"


class Head:
    """A Ray head and another node that `ray start` left running, and what their service is to have."""

    def __init__(self, folder: Path, mirror: Path, database_url: str, s3) -> None:
        self.mark, self.home, self.store = uuid.uuid4().hex, folder / "home", JobStore.open(database_url)
        self.ray_dir = Path(f"/tmp/tuneyard-test-{self.mark[:8]}")  # sockets below it must stay under 108 characters
        self.gcs_port, self.http_port, self.dashboard_port, client_port, *agent_ports = free_ports(6)
        self.key = ec.generate_private_key(ec.SECP256R1())
        public = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        self.secret_key = Fernet.generate_key().decode()
        self.s3_keys = {
            "endpoint_url": s3.endpoint_url,
            "access_key_id": s3.access_key_id,
            "secret_access_key": s3.secret_access_key,
        }
        self.settings = {
            "database_url": database_url,
            "jwt_public_key": public,
            "secret_key": self.secret_key,
            "storage_uri": f"s3://{BUCKET}/on-a-cluster",
            "storage_region": "us-east-1",
            **{f"storage_{name}": value for name, value in self.s3_keys.items()},
            "allowed_s3_endpoints": ["127.0.0.1"],
            "profiles": {"cpu": {"resources": {"CPU": 0.5}}},
            "data_cpus": 0.25,
            "rate_limit": "1000000/minute",
        }
        write_private(folder / "auth_token", uuid.uuid4().hex + uuid.uuid4().hex)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "TUNEYARD_", "RAY_"))}
        # Of the service's settings only the mirror is here: `tuneyard serve` may be typed in any shell.
        self.env = clean | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "TUNEYARD_HOME": str(folder / "somewhere-else"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token"),
        }
        self.on_head = self.env | {
            "TUNEYARD_HOME": str(self.home),
            "TUNEYARD_INSTANCE": self.mark,
            "TUNEYARD_MODEL_MIRROR": str(mirror),
            "TUNEYARD_HUB_OFFLINE": "true",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        }
        start = ["ray", "start", "--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"]
        listen, other = (f"--dashboard-agent-listen-port={port}" for port in agent_ports)
        dashboard = ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}"]
        where = [f"--port={self.gcs_port}", f"--ray-client-server-port={client_port}", f"--temp-dir={self.ray_dir}"]
        self.commands = [
            ([*start, "--head", *where, *dashboard, listen, "--num-cpus=0"], self.on_head),
            (
                [*start, f"--address=127.0.0.1:{self.gcs_port}", other, "--num-cpus=2"],
                self.env | {"TUNEYARD_INSTANCE": self.mark},
            ),
        ]

    def start(self) -> None:
        for command, env in self.commands:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
            assert done.returncode == 0, done.stdout + done.stderr

    def end(self) -> None:
        for process in members(self.mark):
            process.kill()
        shutil.rmtree(self.ray_dir, ignore_errors=True)

    def has(self, **changes) -> None:
        """Have these settings on the head, without those that are None."""
        chosen = {name: value for name, value in (self.settings | changes).items() if value is not None}
        write_private(self.home / "settings.json", json.dumps(chosen))

    def command(self, *arguments) -> list:
        listen = [] if "--stop" in arguments else ["--host", "127.0.0.1", "--port", str(self.http_port)]
        return [TUNEYARD, "serve", "--address", f"127.0.0.1:{self.gcs_port}", *listen, *arguments]

    def serve(self, *arguments, env=None, check=True):
        command = self.command(*arguments)
        done = subprocess.run(command, env=env or self.env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0 or not check, done.stderr
        return done

    def serve_deploy(self, path: Path) -> None:
        command = [TUNEYARD.parent / "serve", "deploy", "--address", f"http://127.0.0.1:{self.dashboard_port}", path]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def upgrade(self) -> None:
        subprocess.run([TUNEYARD, "db", "upgrade"], env=self.on_head, check=True, capture_output=True, timeout=PATIENCE_S)

    def token(self) -> str:
        return jwt.encode({"sub": "tester", "org": ORG, "exp": int(time.time()) + 3600}, self.key, "ES256")

    def client(self) -> Client:
        return Client(f"http://127.0.0.1:{self.http_port}", self.token())

    def pids(self, actor: str) -> set[int]:
        """The processes of this kind of actor, as Ray titles them."""
        return {p.pid for p in members(self.mark) if (p.info["cmdline"] or [""])[0].startswith(f"ray::{actor}")}

    def leader(self) -> str | None:
        """Which dispatcher has the lease."""
        with self.store.read() as connection:
            return connection.execute(sa.select(leases.c.owner)).scalar_one_or_none()


def until(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def head(tmp_path_factory, mirror, s3):
    with postgres_server() as server:
        server.psql("CREATE DATABASE cluster;")
        url = server.get_uri(database="cluster").replace("postgresql://", "postgresql+psycopg://")
        head = Head(tmp_path_factory.mktemp("cluster"), mirror, url, s3)
        try:
            head.start()
            yield head
        finally:
            head.end()
            head.store.engine.dispose()


def test_without_a_cluster_or_its_token_it_says_so(head):
    (nobody,) = free_ports(1)
    nowhere = head.serve("--address", f"127.0.0.1:{nobody}", check=False)
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (3, 1)
    assert "Ray can't be reached" in nowhere.stderr
    stranger = {k: v for k, v in head.env.items() if k != "RAY_AUTH_TOKEN_PATH"} | {"RAY_AUTH_TOKEN": "0" * 64}
    refused = head.serve(env=stranger, check=False)
    assert refused.returncode == 1
    assert "set RAY_AUTH_MODE=token" in refused.stderr.splitlines()[-1]  # before it, a line of Ray's own


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"database_url": None}, "set TUNEYARD_DATABASE_URL to a PostgreSQL"),
        ({"database_url": f"postgresql+psycopg://me:{CANARY}@127.0.0.1:9/nowhere"}, "the job store can't be reached"),
        ({}, "run tuneyard db upgrade"),
    ],
)
def test_settings_of_the_head_that_do_not_allow_a_service_are_named_and_nothing_is_started(head, changes, said):
    """tests/serve_app/test_deployment.py has more of them."""
    head.has(**changes)
    refused = head.serve(check=False)
    assert (refused.returncode, refused.stderr.count("\n"), refused.stdout) == (1, 1, ""), refused.stderr
    assert said in refused.stderr
    assert CANARY not in refused.stderr
    assert head.pids("ServeController") == head.pids("Dispatcher") == set()


class Using(threading.Thread):
    """A client that submits jobs and reads them back, one after the other. Retries nothing, and keeps what was no good answer."""

    def __init__(self, head: Head, name: str, secret_id: str) -> None:
        super().__init__(daemon=True)
        self.head, self.prefix, self.secret_id = head, name, secret_id
        self.bad, self.submitted, self.stop = [], {}, threading.Event()

    def run(self) -> None:
        headers = {"Authorization": f"Bearer {self.head.token()}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{self.head.http_port}", headers=headers, timeout=60) as http:
            while not self.stop.wait(0.05):
                name = f"{self.prefix}-{len(self.submitted)}"
                request_id = self._ask(http, "POST", "/job/", json=job(self.secret_id, name, gpu_count=8))["request_id"]
                self.submitted[name] = request_id
                self._ask(http, "GET", "/job/get/", params={"org_id": ORG, "request_id": request_id})
                self._ask(http, "GET", "/job/list/", params={"org_id": ORG, "limit": 5})
                self._ask(http, "GET", "/healthz")

    def _ask(self, http, method, path, **more):
        try:
            answer = http.request(method, path, **more)
        except httpx.TransportError as error:
            self.bad.append(f"{method} {path}: {error!r}")
            return {"request_id": None}
        if answer.status_code != 200:
            self.bad.append(f"{method} {path}: {answer.status_code} {answer.text}")
            return {"request_id": None}
        return answer.json()


def test_one_that_is_killed_in_the_midst_of_it_is_mended_by_another(head):
    head.has()
    head.upgrade()
    killed = subprocess.Popen(head.command(), env=head.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: head.pids("ServeController"), "Serve is on its way")
    killed.kill()
    killed.wait()
    assert head.http_port == int(head.serve().stdout.split()[3].rpartition(":")[2])
    assert httpx.get(f"http://127.0.0.1:{head.http_port}/readyz").json() == {"status": "ready"}
    assert (len(head.pids("Dispatcher")), len(head.pids("ServeReplica"))) == (1, 2)


def serve_config(folder: Path, port: int) -> Path:
    """The documented one, of three replicas, for this port."""
    config = yaml.safe_load((Path(__file__).parent.parent.parent / "deploy" / "serve.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"]["ingress_replicas"] = 3
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_no_request_fails_while_the_service_is_replaced_by_either_command(head, tmp_path):
    client = head.client()
    secret_id = client.create_secret(ORG, "keys", "s3", head.s3_keys)["secret_id"]
    before, ingress = head.pids("Dispatcher"), head.pids("ServeReplica")
    # Their jobs wait, for more than this cluster has.
    using = [Using(head, f"client-{i}", secret_id) for i in range(3)]
    with ExitStack() as ending:
        for each in using:
            each.start()
            ending.callback(each.join)
            ending.callback(each.stop.set)
        head.serve()
        assert len(head.pids("Dispatcher") - before) == len(head.pids("Dispatcher")) == 1
        until(lambda: len(head.pids("ServeReplica") - ingress) == len(head.pids("ServeReplica")) == 2, "new replicas alone")
        before, ingress = head.pids("Dispatcher"), head.pids("ServeReplica")
        head.serve_deploy(serve_config(tmp_path, head.http_port))
        until(lambda: len(head.pids("ServeReplica") - ingress) == len(head.pids("ServeReplica")) == 3, "three of the config")
        assert len(head.pids("Dispatcher") - before) == len(head.pids("Dispatcher")) == 1
    assert [bad for each in using for bad in each.bad] == []
    assert all(len(each.submitted) > 2 for each in using)
    submitted = {name: request_id for each in using for name, request_id in each.submitted.items()}
    listed = [(job["experiment_name"], job["request_id"]) for job in client.iter_jobs(ORG)]
    assert sorted(listed) == sorted(submitted.items())
    for request_id in submitted.values():
        assert client.cancel(request_id, ORG)["attempt"] == 0


def test_a_job_goes_on_while_the_service_is_replaced_and_taken_off(head, s3):
    """One job, from its submission to its end: the service is deployed again under it, taken off, and put back."""
    client = head.client()
    elsewhere = head.serve("--port", "1", check=False)
    assert elsewhere.returncode == 1
    assert f"give --host 127.0.0.1 --port {head.http_port}" in elsewhere.stderr

    upload(s3, "\n".join(json.dumps(row) for row in rows(40)).encode())
    secret_id = client.create_secret(ORG, "of-the-job", "s3", head.s3_keys)["secret_id"]
    request_id = client.submit(job(secret_id, "on-a-cluster", max_steps=300))["request_id"]  # longer than both deployments
    until(lambda: client.get(request_id, ORG)["status"] == "RUNNING", "running")
    (actor,), before, leader = until(lambda: head.pids("JobActor"), "an actor"), head.pids("Dispatcher"), head.leader()
    head.serve()
    assert len(head.pids("Dispatcher") - before) == len(head.pids("Dispatcher")) == 1
    until(lambda: head.leader() != leader, "the new dispatcher has the lease")
    assert head.pids("JobActor") == {actor}

    assert "off this cluster" in head.serve("--stop").stderr
    assert head.pids("Dispatcher") == head.pids("ServeReplica") == head.pids("ServeController") == set()
    assert head.pids("JobActor") == {actor}
    (worker,) = until(lambda: head.pids("RayTrainWorker"), "a worker")
    homes = {psutil.Process(pid).environ()["TUNEYARD_HOME"] for pid in (actor, worker)}
    assert homes == {str(head.home), head.env["TUNEYARD_HOME"]}
    until(lambda: head.store.get(request_id).completed_at, "the end of the job")
    assert json.loads(head.serve("--json").stdout) == {"url": f"http://127.0.0.1:{head.http_port}"}
    done = client.get(request_id, ORG)
    assert (done["status"], done["attempt"]) == ("COMPLETED", 1), done


def test_the_head_s_keys_are_in_no_process_and_no_file_of_ray(head):
    keys = Canaries({"secret key": head.secret_key, "storage key": head.s3_keys["secret_access_key"]})
    assert keys.in_processes(head.mark) == {}
    found, count = keys.in_files(head.ray_dir)
    assert (found, count > 20) == ({}, True)


def upload(s3, content: bytes) -> None:
    import boto3

    keys = {"aws_access_key_id": s3.access_key_id, "aws_secret_access_key": s3.secret_access_key}
    client = boto3.client("s3", endpoint_url=s3.endpoint_url, region_name="us-east-1", **keys)
    client.put_object(Bucket=BUCKET, Key="rows.jsonl", Body=content)


def job(secret_id: str, name: str, gpu_count: int = 1, max_steps: int = 60):
    changes = {
        "experiment_name": name,
        "model_details.base_model": TINY,
        "dataset_details.secret_id": secret_id,
        "dataset_details.dataset_path": f"s3://{BUCKET}/rows.jsonl",
        "dataset_config.preprocessing.prompt.max_length": 128,
        f"{HP}.max_steps": max_steps,
        f"{HP}.logging_steps": 20,
        f"{HP}.dataloader_num_workers": 0,
        "infra_config": {"gpu_type": "cpu", "gpu_count": gpu_count, "infra_type": "simplismart", "node_count": 1},
    }
    return with_fields(DOCUMENTED, changes)
