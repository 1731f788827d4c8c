"""Trackers that a job names: which secrets it may, and what the run gets of them."""

import pytest

from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from tests.conftest import CANARY, ORG, OTHER_ORG, fields, with_fields
from train_loop.errors import UserError
from train_loop.trackers import weights_and_biases

FIELD = "train_config.report_to"
SECRETS = {
    "mlflow": {"tracking_uri": "http://localhost:5000/below", "token": CANARY},
    "wandb": {"api_key": CANARY, "project": "project"},
}


@pytest.fixture
def trackers(http):
    """A secret of each kind of tracker, by kind."""

    def made(kind):
        return http.post("/secret/", json={"org": ORG, "name": kind, "type": kind, "data": SECRETS[kind]}).json()["secret_id"]

    return {kind: made(kind) for kind in SECRETS}


def test_a_job_may_report_to_the_orgs_trackers(http, job, trackers, settings, store):
    answer = http.post("/job/", json=with_fields(job, {FIELD: list(trackers.values())}))
    assert answer.status_code == 200, answer.text
    told = http.get(f"/job/{answer.json()['request_id']}").json()
    assert told["train_config"]["report_to"] == list(trackers.values())
    vault = SecretVault.from_settings(store, settings)
    for kind, secret_id in trackers.items():
        keys = vault.tracker(ORG, secret_id)
        assert (keys.kind, keys.data, keys.values()) == (kind, SECRETS[kind], [CANARY])
        assert CANARY not in repr(keys)


def test_report_to_takes_no_other_secrets(http, job, trackers, secret_id):
    unknown = "00000000-0000-4000-8000-000000000000"
    arn = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:x"
    names = [trackers["mlflow"], secret_id, unknown, arn]
    found = fields(http.post("/job/", json=with_fields(job, {FIELD: names})))
    assert found[f"{FIELD}.1"]["allowed"] == ["mlflow", "wandb"]
    assert "no such secret" in found[f"{FIELD}.2"]["message"]
    assert "stored by POST /secret/" in found[f"{FIELD}.3"]["message"]
    assert f"{FIELD}.0" not in found
    as_data = with_fields(job, {"dataset_details.secret_id": trackers["wandb"]})
    assert fields(http.post("/job/", json=as_data))["dataset_details.secret_id"]["allowed"] == ["aws", "s3"]


def test_a_service_without_wandbs_client_refuses_the_job(http, job, trackers, monkeypatch):
    monkeypatch.setattr(weights_and_biases, "is_installed", lambda: False)
    found = fields(http.post("/job/", json=with_fields(job, {FIELD: list(trackers.values())})))
    assert list(found) == [f"{FIELD}.1"]
    assert "tuneyard[wandb]" in found[f"{FIELD}.1"]["message"]


def test_a_run_gets_keys_only_of_its_orgs_trackers_on_the_operators_list(http, trackers, secret_id, store, settings, monkeypatch):
    def refusal(secret_id, org=ORG):
        with pytest.raises(UserError) as caught:
            SecretVault.from_settings(store, Settings.load()).tracker(org, secret_id)
        assert CANARY not in str(caught.value)
        return caught.value.code

    assert refusal(secret_id) == "secret_wrong_type"
    assert refusal(trackers["mlflow"], OTHER_ORG) == "secret_not_found"
    monkeypatch.setenv("TUNEYARD_ALLOWED_TRACKER_ENDPOINTS", '["elsewhere.example"]')
    assert refusal(trackers["mlflow"]) == "endpoint_refused"
    monkeypatch.setenv("TUNEYARD_ALLOWED_TRACKER_ENDPOINTS", '["*"]')
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [(0, 0, 0, "", ("169.254.169.254", 0))])
    assert refusal(trackers["mlflow"]) == "endpoint_refused"
