"""What routes answer is what the OpenAPI document says, field by field: nothing missing, nothing more."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError
from starlette.testclient import TestClient

from serve_app.app import build_app
from serve_app.auth import mint_token
from serve_app.lifecycle import Status
from serve_app.routes import answers, service
from serve_app.storage import run_uri
from serve_app.store.journal import Notes
from serve_app.validation import PLAIN
from tests.conftest import CANARY, ORG, Idle
from train_loop.model.source import ModelPlaces
from train_loop.plan import make_plan, this_machine
from train_loop.spec import JobSpec

POINT = {"step": 1, "epoch": 0.5, "loss": float("nan"), "learning_rate": 1e-4, "grad_norm": 0.5}
POINT |= {"tokens": 9, "tokens_per_second": 9.5, "memory_bytes": 9, "time": 1.5}
METRICS = {"last": POINT, "best": {"step": 1, "eval_loss": 1.0}, "eval_loss_before": 2.0, "eval_loss_after": 1.0}


@pytest.fixture
def http(settings, store, local_job, mirror, monkeypatch):
    """As in conftest, over a cluster on which one job trains and another can be planned."""

    monkeypatch.setattr(service, "FRESH_S", -60.0)  # ask the actor, however fresh the store's row is

    class Busy(Idle):
        def live_statuses(self, jobs):
            live = {"phase": "training", "step": 1, "total_steps": 2, "epoch": 0.5, "metrics": METRICS}
            return {job.request_id: live for job in jobs}

        def plan(self, spec, deadline):
            return make_plan(JobSpec.model_validate(local_job()), ModelPlaces(str(mirror)), this_machine())

    with TestClient(build_app(settings, store, Busy()), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {mint_token(settings, ORG, 'tester', 600)}"
        yield client


def play(http, store, settings, job):
    """Jobs in every state, with all that a job leaves behind: (waiting, running, failed, completed)."""
    ids = [http.post("/job/", json=job | {"experiment_name": name}).json()["request_id"] for name in "abcd"]
    for request_id in ids[1:]:
        store.start_attempt(request_id, 0, 1)
        points = [{"step": 0, "eval_loss": 2.0, "time": 1.0}, POINT]
        store.report(request_id, 1, Notes(points=points, lines=[(0, 1.0, "a line")]))
    store.finish(ids[2], 1, Status.FAILED, message="no", error_code="x", error_message="no")
    folder = Path(run_uri(settings, ORG, ids[3]))
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps({"adapter_files": [{"name": "adapter_config.json", "sha256": "0" * 64}]}))
    store.report(ids[3], 1, metrics=METRICS, phase="done")
    store.finish(ids[3], 1, Status.COMPLETED, message="yes", output_model_path=str(folder / "adapter"))
    return ids


def test_every_answer_holds_what_the_document_says_and_nothing_else(http, store, settings, job, secret_id):
    document = http.get("/openapi.json").json()
    waiting, running, failed, completed = play(http, store, settings, job)
    by_query = [{"params": {"org_id": ORG, "request_id": i}} for i in (waiting, running, failed, completed)]
    by_path = [{"path": {"request_id": i}} for i in (waiting, running, failed, completed)]
    keys = {"access_key_id": "x", "secret_access_key": CANARY}
    again = {"org_id": ORG, "request_id": failed}
    webhook = {"org": ORG, "url": "http://127.0.0.1:9/nobody-listens"}
    named = {"path": {"webhook_id": http.post("/webhook/", json=webhook).json()["webhook_id"]}, "params": {"org_id": ORG}}
    requests = {
        "GET /healthz": [{}],
        "GET /readyz": [{}],
        "POST /job/": [{"json": job | {"experiment_name": "e"}}],
        "POST /job/plan/": [{"json": job}, {"files": {k: (None, v if k in PLAIN else json.dumps(v)) for k, v in job.items()}}],
        "GET /job/get/": by_query,
        "GET /job/{request_id}": by_path,
        "GET /job/list/": [{"params": {"org_id": ORG, "limit": 2}}, {"params": {"org_id": ORG}}],
        "GET /job/metrics/": by_query,
        "GET /job/events/": by_query,
        "GET /job/logs/": by_query,
        "GET /job/artifacts/": by_query,
        "POST /job/resume/": [{"json": again}],
        "POST /job/cancel/": [{"json": again}],
        "POST /job/{request_id}/resume": [{"path": {"request_id": failed}}],
        "POST /job/{request_id}/cancel": [{"path": {"request_id": running}}],
        "POST /secret/": [{"json": {"org": ORG, "name": "n", "type": "aws", "data": keys}}],
        "GET /secret/list/": [{"params": {"org_id": ORG}}],
        "DELETE /secret/{secret_id}": [{"path": {"secret_id": secret_id}, "params": {"org_id": ORG}}],
        "POST /webhook/": [{"json": webhook}],
        "GET /webhook/list/": [{"params": {"org_id": ORG}}],
        "POST /webhook/{webhook_id}/test": [dict(named)],
        "DELETE /webhook/{webhook_id}": [dict(named)],
    }
    operations = {f"{m.upper()} {path}": o for path, methods in document["paths"].items() for m, o in methods.items()}
    assert requests.keys() == operations.keys()
    for name, asked in requests.items():
        method, path = name.split()
        schema = operations[name]["responses"]["200"]["content"]["application/json"]["schema"]
        model = TypeAdapter(getattr(answers, schema["$ref"].rpartition("/")[2]))
        for request in asked:
            answer = http.request(method, path.format(**request.pop("path", {})), **request)
            assert answer.status_code == 200, (name, answer.text)
            model.validate_json(answer.content, extra="forbid")
            assert "NaN" not in answer.text


def test_an_answer_with_another_field_would_not_pass():
    model = TypeAdapter(answers.Deleted)
    with pytest.raises(ValidationError):
        model.validate_python({"secret_id": "x", "deleted": True, "more": 1}, extra="forbid")


def test_the_examples_of_the_document_are_answers(http):
    document = http.get("/openapi.json").json()
    without = set()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = operation["responses"]["200"]["content"]["application/json"]
            if "example" in content:
                model = getattr(answers, content["schema"]["$ref"].rpartition("/")[2])
                TypeAdapter(model).validate_json(json.dumps(content["example"]), extra="forbid")
            else:
                without.add(f"{method} {path}")
    assert without == {"get /healthz", "get /readyz", "delete /secret/{secret_id}", "delete /webhook/{webhook_id}"}


def test_the_examples_of_requests_are_what_the_service_takes(http, store):
    posts = {p: o["post"] for p, o in http.get("/openapi.json").json()["paths"].items() if "post" in o}
    bodies = {p: o["requestBody"]["content"]["application/json"] for p, o in posts.items() if "requestBody" in o}
    example = {path: body["example"] for path, body in bodies.items()}
    assert example.keys() == {"/job/", "/job/plan/", "/job/cancel/", "/job/resume/", "/secret/", "/webhook/"}
    assert http.post("/secret/", json=example["/secret/"]).status_code == 200
    assert http.post("/webhook/", json=example["/webhook/"]).status_code == 200
    for path in ("/job/cancel/", "/job/resume/"):
        assert http.post(path, json=example[path]).status_code == 404  # understood; there is just no such job


def test_every_field_of_an_answer_is_described(http):
    components = http.get("/openapi.json").json()["components"]["schemas"]
    ours = {n: s for n, s in components.items() if isinstance(getattr(answers, n, None), type) and "properties" in s}
    bare = {f"{n}.{f}" for n, s in ours.items() for f, p in s["properties"].items() if "description" not in p and "$ref" not in p}
    assert {n.partition(".")[0] for n in bare} <= {
        "DatasetConfig",
        "ModelDetails",
        "TrainConfig",
        "DatasetDetails",
        "InfraConfig",
    }
