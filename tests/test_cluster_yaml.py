import json
import os
import re
import subprocess
import sys
from pathlib import Path

import boto3
import httpx
import pytest
import yaml
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.aws import utils as ray_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import STATUS_UNINITIALIZED, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_NODE_STATUS
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from serve_app.cluster import bundle_of
from serve_app.proxy import CALLBACK
from serve_app.settings import CLUSTER_PROFILES
from tests.conftest import CANARY

TEXT = (Path(__file__).parent.parent / "cluster.yaml").read_text()
CONFIG = yaml.safe_load(TEXT)
KINDS = CONFIG["available_node_types"]
ON_DEMAND = [name for name in KINDS if name != "head" and not name.endswith("_spot")]
REGION = CONFIG["provider"]["region"]
ON_HEAD = CONFIG["head_start_ray_commands"]
ON_WORKERS = [*CONFIG["setup_commands"], *CONFIG["worker_start_ray_commands"]]


def test_ray_accepts_the_cluster_file():
    validate_config(prepare_config(CONFIG))


def test_ray_would_refuse_a_broken_one():
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config(CONFIG | {"head_node_type": "missing"}))


def test_every_kind_of_worker_comes_on_demand_and_as_spot_and_none_stays():
    assert set(ON_DEMAND) == {"cpu", "a10g", "l40s", "a100", "h100"}
    assert set(KINDS) == {"head", *ON_DEMAND, *(f"{name}_spot" for name in ON_DEMAND)}
    for name in ON_DEMAND:
        kind, spot = KINDS[name], KINDS[f"{name}_spot"]
        market = {"InstanceMarketOptions": {"MarketType": "spot"}}
        assert spot == kind | {"priority": 1, "node_config": kind["node_config"] | market}
        assert kind["min_workers"] == 0
    assert CONFIG["idle_timeout_minutes"] > 0


def launched(demand, failing=()):
    """How many machines of which kind Ray's autoscaler would bring for so many bundles of a gpu_type's workers."""
    config = AutoscalingConfig(CONFIG, skip_content_hash=True)
    bundles = [
        ResourceRequestUtil.make(bundle_of(CLUSTER_PROFILES[name])) for name, count in demand.items() for _ in range(count)
    ]
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(bundles),
        recoverable_resource_availabilities=dict.fromkeys(failing, 0.0),
        cloud_resource_availabilities=dict.fromkeys(failing, 0.0),
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch if launch.instance_type != "head"}


@pytest.mark.parametrize("name", ["cpu", "a10g", "l40s", "a100", "h100"])
def test_a_profiles_workers_bring_spot_machines_of_their_kind_and_others_where_there_is_no_spot(name):
    per_node = CONFIG["available_node_types"][name]["resources"]["CPU" if name == "cpu" else "GPU"]
    assert launched({name: 2 * per_node}) == {f"{name}_spot": 2}
    assert launched({name: 2 * per_node}, failing=[f"{name}_spot"]) == {name: 2}


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
    httpx.post(f"{own['AWS_ENDPOINT_URL']}/moto-api/reset").raise_for_status()  # what it has is the process's, not the server's
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


@pytest.fixture
def account(aws, tmp_path, monkeypatch):
    """What docs/clusters.md has one make in an account; a client of its EC2, and the file filled in."""
    for name, value in aws.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".ssh").mkdir()
    for cache in (ray_aws.resource_cache, ray_aws.client_cache):
        cache.cache_clear()
    ec2, iam = (boto3.client(service, REGION, endpoint_url=aws["AWS_ENDPOINT_URL"]) for service in ("ec2", "iam"))
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    zone = CONFIG["provider"]["availability_zone"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/20", AvailabilityZone=zone)["Subnet"]["SubnetId"]
    group = ec2.create_security_group(GroupName="tuneyard", Description="tuneyard", VpcId=vpc)["GroupId"]
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    for name in ("tuneyard-head", "tuneyard-worker"):
        iam.create_instance_profile(InstanceProfileName=name)
    filled = TEXT.replace("subnet-REPLACE", subnet).replace("sg-REPLACE", group).replace("ami-REPLACE", image)
    assert "REPLACE" in TEXT
    assert "-REPLACE" not in filled
    yield ec2, yaml.safe_load(filled)
    for cache in (ray_aws.resource_cache, ray_aws.client_cache):
        cache.cache_clear()


def test_resources_and_network_cards_are_what_aws_says_of_the_machines(account):
    ec2, _ = account
    for name in ON_DEMAND:
        kind = KINDS[name]
        (type_,) = ec2.describe_instance_types(InstanceTypes=[kind["node_config"]["InstanceType"]])["InstanceTypes"]
        (gpus,) = type_.get("GpuInfo", {}).get("Gpus") or [{"Count": 0, "Name": None}]
        found = {"CPU": type_["VCpuInfo"]["DefaultVCpus"], "GPU": gpus["Count"]}
        if gpus["Name"]:
            assert CLUSTER_PROFILES[name].accelerator_type == gpus["Name"]
            found[f"accelerator_type:{gpus['Name']}"] = 1
        assert kind["resources"] == found, name
        cards = kind["node_config"].get("NetworkInterfaces", [])
        assert len(cards) == type_["NetworkInfo"].get("EfaInfo", {}).get("MaximumEfaInterfaces", 0), name
        assert [card["NetworkCardIndex"] for card in cards] == list(range(len(cards)))
        # By AWS's rule for many cards; only the first can have an address, and one without can't be first.
        assert [(c["DeviceIndex"], c["InterfaceType"]) for c in cards] == [(0, "efa"), *[(1, "efa-only")] * (len(cards) - 1)][
            : len(cards)
        ]
        assert ("Placement" in kind["node_config"]) == bool(cards) == ("docker" in kind)


def test_ray_launches_each_machine_at_aws_closed_and_by_a_role(account):
    ec2, filled = account
    groups = {g["GroupId"] for g in ec2.describe_security_groups()["SecurityGroups"]}
    config = AWSNodeProvider.bootstrap_config(prepare_config(filled))
    validate_config({name: value for name, value in config.items() if name != "head_node"})
    # Ray's own security group would open port 22 to the world, and its own role may do anything with EC2 and S3.
    assert {g["GroupId"] for g in ec2.describe_security_groups()["SecurityGroups"]} == groups
    assert config["head_node"] == {}
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    asked = []
    provider.ec2_fail_fast.meta.client.meta.events.register(
        "provide-client-params.ec2.RunInstances", lambda params, **_: asked.append(params)
    )
    for name, kind in config["available_node_types"].items():
        tags = {
            TAG_RAY_NODE_KIND: "head" if name == "head" else "worker",
            TAG_RAY_NODE_NAME: name,
            TAG_RAY_NODE_STATUS: STATUS_UNINITIALIZED,
        }
        (instance,) = provider.create_node(kind["node_config"], tags, 1).values()
        role = "tuneyard-head" if name == "head" else "tuneyard-worker"
        sent, cards = asked.pop(), kind["node_config"].get("NetworkInterfaces")
        assert sent["IamInstanceProfile"] == {"Name": role}
        assert sent["InstanceType"] == instance.instance_type == KINDS[name]["node_config"]["InstanceType"]
        assert ("InstanceMarketOptions" in sent) == name.endswith("_spot")
        assert sent.get("NetworkInterfaces") == cards
        assert sent["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in sent["BlockDeviceMappings"])
        # Subnet and group are the machine's or its cards', never both: AWS refuses that.
        assert ("SubnetId" in sent, "SecurityGroupIds" in sent) == (cards is None, cards is None)
        assert not instance.public_ip_address


def test_nothing_is_open_to_the_world():
    assert CONFIG["provider"]["use_internal_ips"]
    assert CONFIG["auth"]["ssh_proxy_use_node_id"]
    (start,) = [line for line in ON_HEAD if " ray start " in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "IpPermissions" not in TEXT
