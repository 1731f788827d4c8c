"""`python -m train_loop --keys`: where a run's keys are, instead of the keys."""

import json
import os

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.conftest import CANARY
from train_loop.__main__ import main


@pytest.fixture
def secrets(monkeypatch):
    """A client of a local AWS Secrets Manager, which this process's role may read."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "role")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # whatever is set meanwhile goes again
    yield boto3.client("secretsmanager", "eu-west-1")
    server.stop()


@pytest.fixture
def ended(local_job, tmp_path, capsys):
    """The exit code and what is said of a run without rows, with keys by this reference."""

    def run(reference):
        path = tmp_path / "job.json"
        path.write_text(json.dumps(local_job({"dataset_details.dataset_path": str(tmp_path / "missing.jsonl")})))
        code = main([str(path), "--local", "--storage", str(tmp_path / "runs"), "--keys", reference])
        return code, capsys.readouterr().err

    return run


def test_keys_in_aws_secrets_manager_come_into_this_process(secrets, ended):
    arn = secrets.create_secret(Name="mine", SecretString=json.dumps({"MLFLOW_TRACKING_URI": f"http://{CANARY}"}))["ARN"]
    code, said = ended(arn)
    assert (code, "missing.jsonl" in said, CANARY in said) == (1, True, False)
    assert os.environ["MLFLOW_TRACKING_URI"] == f"http://{CANARY}"


@pytest.mark.parametrize("content", [CANARY, f'["{CANARY}"]', f'{{"HF_TOKEN": ["{CANARY}"]}}', '{"HF_TOKEN": ""}'])
def test_what_is_no_object_of_variables_is_said_without_its_content(secrets, ended, tmp_path, content):
    (tmp_path / "keys.json").write_text(content)
    arn = secrets.create_secret(Name="odd", SecretString=content)["ARN"]
    for reference in (str(tmp_path / "keys.json"), arn):
        code, said = ended(reference)
        assert (code, CANARY in said) == (1, False)
        assert f"FAILED --keys {reference} must hold a JSON object" in said
    secrets.delete_secret(SecretId=arn, ForceDeleteWithoutRecovery=True)


@pytest.mark.parametrize("reference", ["arn:aws:secretsmanager:eu-west-1:123456789012:secret:none", "arn:", "/nonexistent"])
def test_keys_that_are_not_there_are_named(secrets, ended, reference):
    code, said = ended(reference)
    assert code == 1
    assert f"FAILED --keys {reference} can't be read: " in said
