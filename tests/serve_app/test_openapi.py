"""Requests made from the OpenAPI document itself: none is a server error, and every answer is one that the document knows."""

import json
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, seed
from hypothesis import settings as limits
from hypothesis import strategies as st

from serve_app.app import build_app
from serve_app.auth import mint_token
from serve_app.embedded.s3 import BUCKET
from serve_app.planner import plan_job
from serve_app.reference.http import markdown
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.validation import SECTIONS
from tests.conftest import DOCUMENTED, ORG, TINY, Idle, rows, with_fields
from train_loop.spec import JobSpec

EXAMPLES, PLANS = 15, 15
CHECKS = (
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
)


def pytest_generate_tests(metafunc):
    """Half of the requests meet the one database, half the other."""
    if "halves" in metafunc.fixturenames:
        metafunc.parametrize(("store", "halves"), [("sqlite", 0), ("postgresql", 1)], indirect=["store"])


def some(halves, count):
    """So many examples, the same at each run, and others on each database."""

    def of(test):
        check = limits(max_examples=count, database=None, suppress_health_check=list(HealthCheck))
        return seed(halves)(check(test))

    return of


@pytest.fixture
def api(settings, store, monkeypatch):
    """The document, over a service that can plan jobs."""

    class Planning(Idle):
        def plan(self, spec, deadline):
            return plan_job(spec, settings, SecretVault.from_settings(store, settings))

    monkeypatch.setenv("TUNEYARD_RATE_LIMIT", "1000000/second")
    return schemathesis.openapi.from_asgi("/openapi.json", build_app(Settings.load(), store, Planning()))


@pytest.fixture
def sound(settings, store, s3):
    """A job that can be planned here: the tiny model, and rows in a bucket that its secret opens."""
    lines = "".join(json.dumps(row) + "\n" for row in rows(8))
    s3.client().put_object(Bucket=BUCKET, Key="fuzzed.jsonl", Body=lines.encode())
    keys = {"access_key_id": s3.access_key_id, "secret_access_key": s3.secret_access_key, "endpoint_url": s3.endpoint_url}
    secret = SecretVault.from_settings(store, settings).create(ORG, "keys", "s3", keys)
    data = {"dataset_details.dataset_path": f"s3://{BUCKET}/fuzzed.jsonl", "dataset_details.secret_id": secret.secret_id}
    return with_fields(DOCUMENTED, data | {"model_details.base_model": TINY})


def test_no_request_made_from_the_document_is_a_server_error(api, settings, store, halves):
    job = store.insert(JobSpec.model_validate(DOCUMENTED), "queued")[0]
    known = {"org": ORG, "org_id": ORG, "request_id": job.request_id}
    token = mint_token(settings, ORG, "x", 3600)
    operations = [found.ok() for found in api.get_all_operations()]
    assert len(operations) >= 18
    statuses = set()
    for operation in operations:

        @some(halves, EXAMPLES)
        @given(case=operation.as_strategy(), ours=st.booleans())
        def ask(case, ours):
            if ours:  # random ids come no further than the check of the org
                for place in (case.path_parameters, case.query, case.body):
                    if isinstance(place, dict):
                        place |= {name: known[name] for name in place.keys() & known.keys()}
            answer = case.call(headers={"Authorization": f"Bearer {token}"})
            statuses.add(answer.status_code)
            case.validate_response(answer, checks=CHECKS)

        ask()
    assert {200, 403, 409, 422} <= statuses


def leaves(section, above=""):
    """Every field that is no section itself, by its dotted name."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def test_no_plan_made_from_the_document_is_a_server_error(api, settings, sound, halves):
    """Jobs that can be planned but for a field or two: whole random ones come no further than the check of their fields."""
    token = mint_token(settings, ORG, "x", 3600)
    statuses = set()

    @some(halves, PLANS)
    @given(case=api["/job/plan/"]["POST"].as_strategy(), data=st.data())
    def ask(case, data):
        assume(case.media_type == "application/json")
        made = list(leaves({name: section for name, section in case.body.items() if name in SECTIONS}))
        changes = data.draw(st.lists(st.sampled_from(made), min_size=1, max_size=2)) if made else []
        case.body = with_fields(sound, dict(changes))
        answer = case.call(headers={"Authorization": f"Bearer {token}"})
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)

    ask()
    assert {200, 422} <= statuses


def test_every_operation_is_described(api):
    for found in api.get_all_operations():
        operation = found.ok()
        assert operation.definition.raw.get("description"), operation.label
        assert "200" in operation.definition.raw["responses"], operation.label


NUMBERS = st.integers() | st.floats() | st.just(10**400)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
KINDS = [
    "application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "multipart/form-data; boundary=b",
    "text/plain",
]
PARTS = ["org", "experiment_name", "dataset_config", "model_details", "train_config", "dataset_details", "infra_config", "other"]


@st.composite
def multipart(draw):
    """A form with parts that are missing, doubled, files, or hold anything."""
    body = b""
    for name in draw(st.lists(st.sampled_from(PARTS), max_size=9)):
        file = draw(st.sampled_from(["", '; filename="f"']))
        value = draw(st.binary(max_size=30)) if draw(st.booleans()) else json.dumps(draw(JSON)).encode()
        body += f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + value + b"\r\n"
    return body + draw(st.sampled_from([b"--b--\r\n", b"", b"--b"]))


@pytest.mark.parametrize("path", ["/job/", "/job/plan/", "/job/cancel/", "/job/resume/", "/secret/", "/webhook/"])
def test_no_body_is_a_server_error(http, path, halves):
    @some(halves, 30)
    @given(
        kind=st.sampled_from(KINDS),
        body=st.binary(max_size=200) | multipart() | JSON.map(lambda v: json.dumps(v).encode()) | st.just(b"[" * 100_000),
    )
    def ask(kind, body):
        assert http.post(path, content=body, headers={"content-type": kind}).status_code < 500

    ask()


def test_the_reference_in_the_docs_is_what_the_service_has(settings, store):
    written = (Path(__file__).parent.parent.parent / "docs" / "api.md").read_text()
    assert written == markdown(build_app(settings, store, Idle()).openapi()), "run make docs"


def test_the_example_of_the_document_is_a_job(api):
    example = api.raw_schema["paths"]["/job/"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert JobSpec.model_validate(example).infra_config.num_workers == 4
