"""The service on a Ray of several nodes on this machine: `python -m tests.faults.several_nodes <home>`.

Prints one line of JSON once it answers, adds a node for each line of its standard input (and prints its id and its raylet's pid),
and ends with it. Each node but the head has one `slot`, and a worker takes one, so that losing a node is losing one worker's
place. Settings come from the environment, as for any cluster.
"""

import json
import os
import sys
from pathlib import Path

from serve_app.embedded.ports import free_ports
from serve_app.embedded.s3 import BUCKET, start_s3
from serve_app.settings import Settings, write_private
from serve_app.store.jobs import JobStore


def main(home: Path) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # Ray prints what it has to say of lost nodes
    s3 = start_s3(home / "s3", home / "s3.log")
    storage = {
        "storage_uri": f"s3://{BUCKET}/runs",
        "storage_endpoint_url": s3.endpoint_url,
        "storage_access_key_id": s3.access_key_id,
        "storage_secret_access_key": s3.secret_access_key,
        "storage_region": "us-east-1",
        "data_cpus": 0.25,
        "allowed_s3_endpoints": ["127.0.0.1"],
        "profiles": {"cpu": {"resources": {"CPU": 0.5, "slot": 1}, "gpus_per_node": 1}},
    }
    write_private(home / "settings.json", json.dumps(storage))
    Settings.load().prepare_embedded_keys()
    settings = Settings.load()
    JobStore.open(settings.database_url).migrate()

    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"  # 5 s are more than a small job has
    import ray
    from ray.cluster_utils import Cluster

    from serve_app.deployment import deploy

    http_port, dashboard_port = free_ports(2)
    # Ray writes there which cluster is the machine's, wherever its own folder is, and takes it for granted.
    Path("/tmp/ray").mkdir(exist_ok=True)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": dashboard_port,
            "temp_dir": os.environ["TUNEYARD_RAY_DIR"],
        },
    )
    ray.init(address=cluster.address, namespace=settings.ray_namespace, log_to_driver=False)
    deploy(settings, "127.0.0.1", http_port)
    found = {
        "url": f"http://127.0.0.1:{http_port}",
        "ray_address": cluster.address,
        "dashboard_url": f"http://127.0.0.1:{dashboard_port}",
        "s3_endpoint_url": s3.endpoint_url,
        "s3_access_key_id": s3.access_key_id,
        "s3_secret_access_key": s3.secret_access_key,
    }
    print(json.dumps(found), file=answers, flush=True)
    for _ in sys.stdin:
        node = cluster.add_node(num_cpus=1, resources={"slot": 1})
        raylet = node.all_processes["raylet"][0].process.pid
        print(json.dumps([node.node_id, raylet]), file=answers, flush=True)
    ray.shutdown()
    cluster.shutdown()
    s3.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
