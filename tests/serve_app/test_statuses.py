"""Every refusal that the document has for an operation is one it answers with. That none is missing is for conftest to see."""

import asyncio
import uuid

import httpx
import pytest
from starlette.testclient import TestClient

from serve_app import body
from serve_app.app import build_app
from serve_app.auth import mint_token
from serve_app.lifecycle import Status
from serve_app.store.jobs import JobStore
from serve_app.webhooks import MAX_PER_ORG
from tests.conftest import ORG, Idle, with_fields
from tests.serve_app.conftest import documented_statuses
from train_loop.section import models_in
from train_loop.spec import JobSpec

LONG = b"x" * (2 << 20)


def operations():
    return [pytest.param(*name, id=" ".join(name)) for name in documented_statuses()]


class Refusing:
    """An operation, and what makes it refuse: a method for each status, which gives the answer."""

    def __init__(self, http, settings, store, job, tmp_path, method, path):
        self.http, self.settings, self.store, self.job, self.tmp_path = http, settings, store, job, tmp_path
        self.method, self.path = method, path

    def insert(self, name, completed=False):
        spec = JobSpec.model_validate(self.job | {"experiment_name": name})
        request_id = self.store.insert(spec, "queued")[0].request_id
        if completed:
            self.store.start_attempt(request_id, 0, 1)
            self.store.finish(request_id, 1, Status.COMPLETED, message="done", output_model_path="s3://x/adapter")
        return request_id

    @property
    def body(self):
        """What the operation takes, but for the ids."""
        match self.path:
            case "/job/" | "/job/plan/":
                return self.job
            case "/secret/":
                data = {"access_key_id": "a", "secret_access_key": "b"}
                return {"org": ORG, "name": "n", "type": "aws", "data": data}
            case "/webhook/":
                return {"org": ORG, "url": "https://hooks.example.com/x"}
        return None

    def ask(self, request_id=None, http=None, org=ORG, **changes):
        request_id = request_id or str(uuid.uuid4())
        named = {"org_id": org, "request_id": request_id}
        path = self.path.format(request_id=request_id, secret_id=request_id, webhook_id=request_id)
        query = {"org_id": org} if "{" in self.path or "/list" in self.path else named
        takes_body = self.method == "POST" and "{" not in self.path
        how = ({"json": self.body or named} if takes_body else {"params": query}) | changes
        return (http or self.http).request(self.method, path, **how)

    def other(self, store=None, runtime=None, **settings):
        """A client of a service that differs in this."""
        here = self.settings.model_copy(update=settings)
        token = mint_token(self.settings, ORG, "tester", 600)
        app = build_app(here, store or self.store, runtime or Idle())
        return TestClient(app, raise_server_exceptions=False, headers={"Authorization": f"Bearer {token}"})

    def answer_400(self):
        return self.ask(json=None, content=b"{", headers={"content-type": "application/json"})

    def answer_401(self):
        return self.ask(headers={"Authorization": "Bearer x"})

    def answer_403(self):
        token = mint_token(self.settings, ORG, "x", 600, scope="nothing")
        return self.ask(headers={"Authorization": f"Bearer {token}"})

    def answer_404(self):
        return self.ask()

    def answer_408(self):
        async def slowly():
            yield b"{"
            await asyncio.sleep(3600)

        async def ask():
            transport = httpx.ASGITransport(self.http.app)
            headers = {"authorization": self.http.headers["Authorization"], "content-type": "application/json"}
            async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client:
                return await client.request(self.method, self.path, content=slowly())

        return asyncio.run(ask())

    def answer_409(self):
        if self.path == "/job/":
            self.insert(self.job["experiment_name"])
            return self.ask()
        if self.path == "/webhook/":
            for _ in range(MAX_PER_ORG):
                self.ask()
            return self.ask()
        return self.ask(self.insert("ended", completed=True))

    def answer_413(self):
        return self.ask(json=None, content=LONG, headers={"content-type": "application/json"})

    def answer_415(self):
        return self.ask(json=None, content=b"x", headers={"content-type": "text/plain"})

    def answer_422(self):
        return self.ask("no id", org="no org", **({"json": {}} if self.method == "POST" else {}))

    def answer_429(self):
        with self.other(rate_limit="1/minute") as http:
            self.ask(http=http)
            return self.ask(http=http)

    def answer_503(self):
        class Starting(Idle):
            def not_ready(self):
                return "not yet"

        away = JobStore.open(f"sqlite:///{self.tmp_path}/no/such/folder/jobs.db")
        with self.other(store=away, runtime=Starting()) as http:
            return self.ask(http=http)


@pytest.mark.parametrize(("method", "path"), operations())
def test_an_operation_refuses_with_every_status_that_its_document_has(
    http, settings, store, job, tmp_path, monkeypatch, method, path
):
    monkeypatch.setattr(body, "BODY_S", 0.2)
    operation = Refusing(http, settings, store, job, tmp_path, method, path)
    document = http.get("/openapi.json").json()
    refusals = {s: r for s, r in document["paths"][path][method.lower()]["responses"].items() if s >= "400"}
    assert path == "/healthz" or refusals
    for status, refusal in refusals.items():
        answer = getattr(operation, f"answer_{status}")()
        assert answer.status_code == int(status), answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        said = document["components"]["responses"][refusal["$ref"].rpartition("/")[2]]
        assert all(name in answer.headers for name in said["headers"])
        if "Retry-After" in said["headers"]:
            assert int(answer.headers["Retry-After"]) >= 1


def test_waits_are_told_by_those_that_can_be_waited_for(http):
    told = http.get("/openapi.json").json()["components"]["responses"]
    assert {name for name, said in told.items() if "Retry-After" in said["headers"]} == {"Problem429", "Problem503"}


def test_where_a_dataset_may_be_is_where_the_service_takes_it_from(http, job):
    document = http.get("/openapi.json").json()
    offered = document["components"]["schemas"]["DatasetDetails"]["properties"]["source_type"]["enum"]
    assert offered == ["s3", "gcs", "hf"]
    refused = http.post("/job/", json=with_fields(job, {"dataset_details.source_type": "local"})).json()["errors"]
    assert [e["allowed"] for e in refused] == [offered]


def enumerations(section, schemas, above=""):
    """By dotted name, the values that the document offers for each field of a job that has some."""
    for name, field in schemas[section.__name__]["properties"].items():
        if "enum" in field:
            yield f"{above}{name}", field["enum"]
        for inner in models_in(section.model_fields[name].annotation):
            yield from enumerations(inner, schemas, f"{above}{name}.")


def test_nothing_is_offered_that_is_not_built_yet(http, job):
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    offered = dict(enumerations(JobSpec, schemas))
    assert offered["train_config.torch_dtype"] == ["bfloat16", "float16", "float32"]
    assert len(offered) > 15
    for name, values in offered.items():
        for value in values:
            answer = http.post("/job/plan/", json=with_fields(job, {name: value}))
            assert answer.status_code == 422  # for there is no cluster to plan on
            assert "supported" not in answer.json()["detail"], (name, value)


@pytest.mark.parametrize("path", ["/job/", "/job/plan/"])
def test_the_parts_of_the_form_have_examples_that_are_understood(http, path):
    content = http.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]["content"]
    for kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        parts = {name: part["examples"][0] for name, part in content[kind]["schema"]["properties"].items()}
        assert parts == content[kind]["example"]
        given = {"files": {n: (None, v) for n, v in parts.items()}} if "multipart" in kind else {"data": parts}
        wrong = {e["field"] for e in http.post(path, **given).json()["errors"]}
        assert wrong == {"dataset_details.secret_id", "model_details.base_model"}  # which this service doesn't have
