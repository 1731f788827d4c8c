"""The AWS policies: well formed, free of wildcards, and just what Ray's provider and the service call."""

import ast
import fnmatch
import inspect
import json
import re
import textwrap
from pathlib import Path

import pytest
import yaml
from botocore.session import Session
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

from serve_app.aws import session_name
from tests.conftest import ORG

ROOT = Path(__file__).parent.parent
POLICIES = {path.stem: json.loads(path.read_text()) for path in (ROOT / "deploy" / "iam").glob("*.json")}
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
# The calls of S3's interface that each permission is for; of other services permissions are called as the calls are.
S3 = {
    "s3:AbortMultipartUpload": "AbortMultipartUpload",
    "s3:DeleteObject": "DeleteObject",
    "s3:GetBucketLocation": "GetBucketLocation",
    "s3:GetObject": "GetObject",
    "s3:ListBucket": "ListObjectsV2",
    "s3:ListBucketMultipartUploads": "ListMultipartUploads",
    "s3:ListMultipartUploadParts": "ListParts",
    "s3:PutObject": "PutObject",
}
LOOKS = re.compile(r"ec2:Describe\w+")  # which EC2 lets nobody narrow to a resource


def listed(value):
    return value if isinstance(value, list) else [value]


def actions(name, service=""):
    found = (a for s in POLICIES[name]["Statement"] for a in listed(s["Action"]))
    return {a for a in found if a.startswith(service)}


def test_every_file_is_described():
    assert POLICIES.keys() == {"head", "head-tenants", "launcher", "tenant-data", "tenant-trust", "worker"}
    described = (ROOT / "deploy" / "iam" / "README.md").read_text()
    assert [name for name in POLICIES if f"`{name}.json`" not in described] == []


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_of_the_grammar_and_allows_by_name(name):
    policy, is_trust = POLICIES[name], name == "tenant-trust"
    assert policy.keys() == {"Version", "Statement"}
    assert policy["Version"] == "2012-10-17"
    assert len(json.dumps(policy, separators=(",", ":"))) < 6144  # AWS's limit for a managed one
    sids = [s["Sid"] for s in policy["Statement"]]
    assert len(sids) == len(set(sids))
    for statement in policy["Statement"]:
        assert statement.keys() - {"Condition"} == {"Sid", "Effect", "Action", "Principal" if is_trust else "Resource"}
        assert statement["Effect"] == "Allow"
        assert re.fullmatch(r"[A-Za-z0-9]+", statement["Sid"])
        for action in listed(statement["Action"]):
            assert re.fullmatch(r"[a-z0-9]+:[A-Za-z]+", action), action
        if not is_trust:
            looks = all(LOOKS.fullmatch(action) for action in listed(statement["Action"]))
            for resource in listed(statement["Resource"]):
                assert resource.startswith("arn:aws:") or (resource == "*" and looks), resource
        for operator, keys in statement.get("Condition", {}).items():
            assert operator in ("StringEquals", "StringLike")
            assert all(re.fullmatch(r"[a-z0-9-]+:[\w/-]+", key) and listed(value) for key, value in keys.items())


def test_every_action_is_a_call_that_aws_has():
    session = Session()
    calls = {
        name: session.get_service_model(name).operation_names for name in ("ec2", "iam", "sts", "secretsmanager", "ssm", "s3")
    }
    for action in set().union(*(actions(name) for name in POLICIES)):
        service, _, call = action.partition(":")
        if action != "iam:PassRole":  # a permission that no call is called like
            assert S3.get(action, call) in calls[service], action


def called_by_the_provider():
    """EC2's calls in the methods of Ray's provider, but for those that only the launcher or a cache of stopped machines needs."""
    as_called = {
        "filter": "DescribeInstances",  # of the resource `instances`
        "create_instances": "RunInstances",
        "terminate": "TerminateInstances",
        "create_tags": "CreateTags",
        "terminate_instances": "TerminateInstances",
        "start_instances": "StartInstances",
        "stop_instances": "StopInstances",
        "stop": "StopInstances",
        "describe_images": "DescribeImages",  # of AMIs with CloudWatch's agent
    }
    tree = ast.parse(textwrap.dedent(inspect.getsource(AWSNodeProvider)))
    names = {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
    return {f"ec2:{call}" for name, call in as_called.items() if name in names}


def test_the_head_may_do_what_rays_provider_does_there_and_no_more():
    assert CLUSTER["provider"]["cache_stopped_nodes"] is False
    unused = {"ec2:StartInstances", "ec2:StopInstances", "ec2:DescribeImages"}
    assert actions("head", "ec2:") == called_by_the_provider() - unused
    assert len(actions("head", "ec2:")) == 4


def test_what_changes_machines_is_bound_to_the_cluster():
    tag = CLUSTER["cluster_name"]
    for name in ("head", "launcher"):
        for statement in POLICIES[name]["Statement"]:
            changes = [a for a in listed(statement["Action"]) if a.startswith("ec2:") and not LOOKS.fullmatch(a)]
            if changes and statement["Sid"] not in ("StartThemOfTheseParts", "NameMachinesAsTheyStart"):
                (bound,) = statement["Condition"]["StringEquals"].items()
                assert bound in (("aws:RequestTag/ray-cluster-name", tag), ("aws:ResourceTag/ray-cluster-name", tag))


def test_the_head_gives_away_the_workers_role_alone():
    (passes,) = [s for s in POLICIES["head"]["Statement"] if "iam:PassRole" in listed(s["Action"])]
    assert passes["Resource"].endswith(":role/tuneyard-worker")
    assert passes["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    assert actions("head", "iam:") == {"iam:PassRole"}


def test_workers_have_the_runs_prefix_and_nothing_else():
    assert {a.partition(":")[0] for a in actions("worker")} == {"s3"}
    for name in ("worker", "head"):
        for statement in POLICIES[name]["Statement"]:
            if "s3:PutObject" in listed(statement["Action"]):
                assert statement["Resource"] == "arn:aws:s3:::BUCKET/runs/*"
    assert actions("worker") | {"s3:GetBucketLocation"} == actions("head", "s3:")


def test_the_head_reads_the_settings_that_the_cluster_file_fetches():
    (fetch,) = [line for line in CLUSTER["head_start_ray_commands"] if "settings.json" in line]
    (wanted,) = re.findall(r"SecretId='([^']+)'", fetch)
    (reads,) = [s for s in POLICIES["head"]["Statement"] if "secretsmanager:GetSecretValue" in listed(s["Action"])]
    assert fnmatch.fnmatch(f"arn:aws:secretsmanager:REGION:ACCOUNT:secret:{wanted}-a1B2c3", reads["Resource"])


def test_a_tenants_role_is_for_one_org_and_asks_for_the_external_id():
    (trust,) = POLICIES["tenant-trust"]["Statement"]
    asked = trust["Condition"]["StringEquals"]
    assert asked["sts:RoleSessionName"].replace("ORG", ORG) == session_name(ORG)
    assert "sts:ExternalId" in asked
    (become,) = [s for s in POLICIES["head-tenants"]["Statement"] if s["Action"] == "sts:AssumeRole"]
    assert fnmatch.fnmatch(session_name(ORG), become["Condition"]["StringLike"]["sts:RoleSessionName"])
    assert actions("tenant-data") == {"s3:GetObject", "s3:ListBucket"}
