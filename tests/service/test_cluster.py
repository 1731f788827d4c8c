"""What the dispatcher sees and does of a real Ray: job actors and what they started, nodes an autoscaler brings and takes."""

import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import boto3
import psutil
import pytest
from cryptography.fernet import Fernet

from serve_app.client import FINAL, Client
from serve_app.cluster import Growth, RayCluster, actor_name
from serve_app.embedded.ports import free_ports
from serve_app.embedded.s3 import BUCKET
from serve_app.scheduler import Gang, Limits, Shares, decide
from serve_app.settings import write_private
from tests.conftest import DOCUMENTED, ORG, TINY, postgres_server, rows, with_fields

pytestmark = pytest.mark.service
NAMESPACE = "tuneyard-test"
SLOT = {"slot": 1.0}
PATIENCE_S, FINISH_S = 120, 300
# By its module: the package leaves out the default settings that the name stands for.
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


def until(condition, what, patience_s=PATIENCE_S):
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.2)


@dataclass
class Head:
    """A head that `ray start` left running; `env` is its environment."""

    address: str
    env: dict[str, str]
    home: Path


@pytest.fixture(scope="module")
def neighbour():
    """What the autoscaler of another Ray on this machine looks like."""
    its = ["/another/autoscaler/_private/monitor.py", "--gcs-address=127.0.0.1:1", "--autoscaling-config="]
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)", *its]) as process:
        yield
        process.kill()


@pytest.fixture(scope="module")
def head(tmp_path_factory, mirror, neighbour):
    """A Ray of this test's own with Ray's fake node provider: raylets on this machine play the cloud's nodes."""
    import ray
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    folder, mark = tmp_path_factory.mktemp("ray"), uuid.uuid4().hex
    gcs_port, client_port, agent_port = free_ports(3)
    where = {"gcs_address": f"127.0.0.1:{gcs_port}", "head_node_id": FAKE_HEAD_NODE_ID}
    config = {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 0.05,
        "provider": {"type": "external", "module": PROVIDER, "launch_multiple": True} | where,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "slots": {"resources": {"CPU": 1, "slot": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
            # A job's rows are prepared before its workers take their places.
            "places": {
                "resources": {"CPU": 1, "place": 2},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 1,
                "idle_timeout_s": 15,
            },
        },
        **{"upscaling_speed": 1.0, "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": []},
        **{"file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": []},
        **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
    }
    (folder / "autoscaling.json").write_text(json.dumps(config))

    short = f"/tmp/tuneyard-test-{mark[:8]}"  # sockets below it must stay under 108 characters
    env = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "TUNEYARD_INSTANCE": mark,
        "TUNEYARD_HOME": str(folder / "home"),
        "TUNEYARD_MODEL_MIRROR": str(mirror),
        "TUNEYARD_HUB_OFFLINE": "true",
        "RAY_AUTH_MODE": "disabled",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    command = [
        *("ray", "start", "--head", "--node-ip-address=127.0.0.1", f"--port={gcs_port}", f"--temp-dir={short}"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={client_port}"),
        *(
            f"--dashboard-agent-listen-port={agent_port}",
            "--num-cpus=1",
            "--include-dashboard=false",
            f"--autoscaling-config={folder / 'autoscaling.json'}",
        ),
    ]
    started = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        ray.init(address=f"127.0.0.1:{gcs_port}", namespace=NAMESPACE, log_to_driver=False)
        yield Head(f"127.0.0.1:{gcs_port}", env, folder / "home")
    finally:
        ray.shutdown()
        for process in psutil.process_iter():
            try:
                if process.environ().get("TUNEYARD_INSTANCE") == mark:
                    process.kill()
            except psutil.Error:
                continue
        shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(head):
    return RayCluster(NAMESPACE)


@pytest.fixture
def client(head, s3):
    """Of the service on that cluster, whose workers take a place each."""
    (port,) = free_ports(1)
    keys = {"endpoint_url": s3.endpoint_url, "access_key_id": s3.access_key_id, "secret_access_key": s3.secret_access_key}
    with postgres_server() as server:
        settings = {
            "database_url": server.get_uri().replace("postgresql://", "postgresql+psycopg://"),
            "storage_uri": f"s3://{BUCKET}/on-nodes-that-come-and-go",
            "storage_region": "us-east-1",
            **{f"storage_{name}": value for name, value in keys.items()},
            "allowed_s3_endpoints": ["127.0.0.1"],
            "profiles": {"cpu": {"resources": {"CPU": 0.25, "place": 1}}},
            "data_cpus": 0.25,
            "ingress_replicas": 1,
            "ray_namespace": NAMESPACE,
            "jwt_secret": "x" * 32,
            "secret_key": Fernet.generate_key().decode(),
        }
        write_private(head.home / "settings.json", json.dumps(settings))

        def tuneyard(*arguments):
            command = [sys.executable, "-m", "serve_app.cli", *arguments]
            done = subprocess.run(command, env=head.env, capture_output=True, text=True, timeout=FINISH_S, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        tuneyard("db", "upgrade")
        tuneyard("serve", "--address", head.address, "--host", "127.0.0.1", "--port", str(port))
        client = Client(f"http://127.0.0.1:{port}", tuneyard("token", "--org", ORG))
        yield client, client.create_secret(ORG, "keys", "s3", keys)["secret_id"]
        tuneyard("serve", "--address", head.address, "--stop")


def nodes_with(cluster, resource):
    return [node for node in cluster.nodes() if resource in node.resources]


def slots(cluster):
    return nodes_with(cluster, "slot")


def test_nodes_come_for_what_is_asked_and_go_again(cluster):
    assert slots(cluster) == []
    assert cluster.growth() == Growth([({"CPU": 1, "slot": 2}, 2), ({"CPU": 1, "place": 2}, 1)], max_nodes=2)
    cluster.ask_for([SLOT] * 3)
    until(lambda: len(slots(cluster)) == 2, "two nodes for three workers")
    assert not any(node.draining for node in slots(cluster))
    cluster.ask_for([])
    until(lambda: slots(cluster) == [], "no nodes")


def test_a_queued_job_brings_a_node_trains_on_it_and_the_node_goes(cluster, client, s3):
    client, secret_id = client
    keys = {"aws_access_key_id": s3.access_key_id, "aws_secret_access_key": s3.secret_access_key}
    store = boto3.client("s3", endpoint_url=s3.endpoint_url, region_name="us-east-1", **keys)
    store.put_object(Bucket=BUCKET, Key="few.jsonl", Body="\n".join(json.dumps(row) for row in rows(12)).encode())
    assert nodes_with(cluster, "place") == []
    changes = {
        "experiment_name": "brings-a-node",
        "model_details.base_model": TINY,
        "dataset_details.secret_id": secret_id,
        "dataset_details.dataset_path": f"s3://{BUCKET}/few.jsonl",
        "dataset_config.preprocessing.prompt.max_length": 64,
        "train_config.hyperparameters.max_steps": 2,
        "train_config.hyperparameters.dataloader_num_workers": 0,
        "infra_config": {"gpu_type": "cpu", "gpu_count": 2},
    }
    request_id = client.submit(with_fields(DOCUMENTED, changes))["request_id"]
    until(lambda: nodes_with(cluster, "place"), "a node for the job")
    until(lambda: client.get(request_id, ORG)["status"] in FINAL, "the end of the job", FINISH_S)
    done = client.get(request_id, ORG)
    assert (done["status"], done["attempt"]) == ("COMPLETED", 1), done
    until(lambda: nodes_with(cluster, "place") == [], "the node goes")


def test_what_somebody_else_holds_of_the_cluster_is_not_free_and_no_job_starts_on_it(cluster):
    import ray

    @ray.remote(num_cpus=0.75)
    class Stranger:
        def ping(self):
            return True

    def starts():
        free = [node.free for node in cluster.nodes()]
        gang = Gang("job", "org", 1, 0, dt.datetime.now(dt.UTC), {"CPU": 0.5}, per_node=2, min_nodes=1, max_nodes=1)
        return decide([gang], [], free, Limits(1), Shares(), gang.waiting_since).starts

    until(starts, "room on the idle head")
    stranger = Stranger.remote()
    assert ray.get(stranger.ping.remote())
    until(lambda: [node.free["CPU"] for node in cluster.nodes()] == [0.25], "the stranger's CPU is gone")
    assert [node.resources["CPU"] for node in cluster.nodes()] == [1.0]
    assert not starts()
    ray.kill(stranger)
    until(starts, "room again")


def test_a_placement_group_that_an_attempt_left_is_waited_for(cluster):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    @ray.remote(num_cpus=0)
    class Child:
        def hold(self):
            self.group = placement_group([{"CPU": 0.5}])
            ray.get(self.group.ready())
            return self.group

    @ray.remote(num_cpus=0)
    class Parent:
        def hold(self):
            self.child = Child.remote()
            return ray.get(self.child.hold.remote())

    request_id = str(uuid.uuid4())
    parent = Parent.options(name=actor_name(request_id, 1), namespace=NAMESPACE, lifetime="detached").remote()
    group = ray.get(parent.hold.remote())
    assert cluster.leftovers(request_id) == 2
    cluster.end((request_id, 1))
    until(lambda: cluster.attempts() == set() and cluster.leftovers(request_id) == 1, "only the placement group is left")
    remove_placement_group(group)
    until(lambda: cluster.leftovers(request_id) == 0, "nothing is left")


def test_an_attempts_actor_is_seen_and_ends_with_all_that_it_started(cluster):
    import ray

    @ray.remote(num_cpus=0)
    class Child:
        def ping(self):
            return True

    @ray.remote(num_cpus=0)
    class Parent:
        def __init__(self):
            self.child = Child.remote()
            ray.get(self.child.ping.remote())

        def ping(self):
            return True

    request_id = str(uuid.uuid4())
    parent = Parent.options(name=actor_name(request_id, 2), namespace=NAMESPACE, lifetime="detached").remote()
    assert ray.get(parent.ping.remote())
    assert cluster.attempts() == {(request_id, 2)}
    assert cluster.leftovers(request_id) == 1
    assert cluster.leftovers(str(uuid.uuid4())) == 0
    cluster.end((request_id, 1))  # which never was
    assert ray.get(parent.ping.remote())
    cluster.end((request_id, 2))
    until(lambda: cluster.attempts() == set() and cluster.leftovers(request_id) == 0, "nothing is left")
    cluster.end((request_id, 2))
