import json
import os
import re
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.util import prepare_config, validate_config

from serve_app.proxy import CALLBACK
from tests.conftest import CANARY

CONFIG = yaml.safe_load((Path(__file__).parent.parent / "cluster.yaml").read_text())
ON_HEAD = CONFIG["head_start_ray_commands"]
ON_WORKERS = [*CONFIG["setup_commands"], *CONFIG["worker_start_ray_commands"]]


def test_ray_accepts_the_cluster_file():
    validate_config(prepare_config(CONFIG))


def test_ray_would_refuse_a_broken_one():
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config(CONFIG | {"head_node_type": "missing"}))


def test_the_head_has_what_stands_before_the_proxy():
    (start,) = [command for command in ON_HEAD if " ray start " in command]
    assert all(f" {name}={value} " in start for name, value in CALLBACK.items())


def test_the_head_starts_the_service_after_ray_and_the_schema():
    def place(command):
        (found,) = [i for i, line in enumerate(ON_HEAD) if command in line]
        return found

    assert place("settings.json") < place("tuneyard db upgrade") < place("tuneyard serve")
    assert place("ray stop") < place("ray start --head") < place("tuneyard serve")


def test_whatever_connects_to_ray_has_its_token():
    commands = [line for line in [*ON_HEAD, *ON_WORKERS] if re.search(r"\bray start\b|\btuneyard serve\b", line)]
    assert len(commands) == 3
    assert all(line.startswith("RAY_AUTH_MODE=token ") for line in commands)
    assert "~/.ray/auth_token" in CONFIG["file_mounts"]


@pytest.fixture
def aws(tmp_path):
    """The environment of a head whose role may read a local AWS, with a home of its own."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    own = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "TUNEYARD_"))} | {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "AK",
        "AWS_SECRET_ACCESS_KEY": "SK",
        "AWS_CONFIG_FILE": "/nonexistent",
        "HOME": str(tmp_path),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    yield own
    server.stop()


def test_the_service_s_settings_come_to_the_head_alone_readable_by_their_owner_only(aws, tmp_path):
    # What is mounted goes to every machine.
    assert CONFIG["file_mounts"].keys() == {"~/tuneyard", "~/.ray/auth_token"}
    assert not [line for line in ON_WORKERS if "settings" in line]
    (fetch,) = [line for line in ON_HEAD if "settings.json" in line]
    settings = tmp_path / ".tuneyard" / "settings.json"

    def fetched():
        return subprocess.run(["bash", "-c", fetch], env=aws, capture_output=True, check=False, timeout=60)

    assert fetched().returncode != 0
    assert not settings.exists()
    text = json.dumps({"database_url": f"postgresql+psycopg://tuneyard:{CANARY}@db/tuneyard"})
    keys = {"aws_access_key_id": "AK", "aws_secret_access_key": "SK", "endpoint_url": aws["AWS_ENDPOINT_URL"]}
    boto3.client("secretsmanager", "us-west-2", **keys).create_secret(Name="tuneyard/settings", SecretString=text)
    done = fetched()
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    assert (json.loads(settings.read_text()), settings.stat().st_mode & 0o777) == (json.loads(text), 0o600)
    code = f"from serve_app.settings import Settings; assert {CANARY!r} in Settings.load().database_url"
    subprocess.run([sys.executable, "-c", code], env=aws | {"PYTHONPATH": os.getcwd()}, check=True, timeout=60)
