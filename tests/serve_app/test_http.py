"""The HTTP interface over a real store; nothing runs the jobs here."""

import asyncio
import base64
import contextlib
import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import jwt
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.testclient import TestClient

from serve_app.app import ROOMS, build_app
from serve_app.auth import mint_token
from serve_app.errors import MAX_ERRORS
from serve_app.lifecycle import Status
from serve_app.other_names import OTHER_NAMES
from serve_app.routes import jobs, journal
from serve_app.settings import Profile, Settings
from serve_app.store.jobs import JobStore
from serve_app.store.journal import Journal, Notes
from tests.conftest import CANARY, ORG, OTHER_ORG, Idle, fields, with_fields
from tests.docs.test_site import Page
from train_loop.errors import UserError
from train_loop.section import models_in
from train_loop.spec import JobSpec

TEMPLATE = "dataset_config.preprocessing.prompt.template"
OPTIM, REGION = "train_config.hyperparameters.optim", "dataset_details.region"
FSDP = {"train_config.distributed.type": "fsdp"}
HUB_ROWS = {"dataset_details.source_type": "hf", "dataset_details.dataset_path": "acme/rows", "dataset_details.region": None}
ARN = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:keys"
SECTIONS = ("dataset_config", "model_details", "train_config", "dataset_details", "infra_config")


def pytest_generate_tests(metafunc):
    """The interface is the same on both databases."""
    if "store" in metafunc.fixturenames:
        metafunc.parametrize("store", ["sqlite", "postgresql"], indirect=True)


def form(job):
    return {k: (None, json.dumps(v) if k in SECTIONS else v) for k, v in job.items()}


@pytest.mark.parametrize("path", ["/job/", "/job"])
@pytest.mark.parametrize("encoding", ["multipart", "urlencoded", "json"])
def test_the_documented_request_is_accepted_in_every_encoding(http, store, job, path, encoding):
    body = {
        "multipart": {"files": form(job)},
        "urlencoded": {"data": {k: v for k, (_, v) in form(job).items()}},
        "json": {"json": job},
    }[encoding]
    answer = http.post(path, **body)
    assert answer.status_code == 200, answer.text
    accepted = answer.json()
    assert accepted["status"] == "QUEUED"
    assert accepted["experiment_name"] == job["experiment_name"]
    assert "4 CPU workers" in accepted["message"]
    assert store.get(accepted["request_id"]).spec["train_config"]["hyperparameters"]["warmup_ratio"] == 0.03


def test_the_message_says_what_was_accepted_and_what_to_think_over(settings, store, job):
    class Planning(Idle):
        def plan(self, spec, deadline):
            return {}

    public = {"dataset_details.ownership": "public", "dataset_details.secret_id": None}
    with TestClient(build_app(settings, store, Planning())) as client:
        client.headers["Authorization"] = f"Bearer {mint_token(settings, ORG, 'x', 60)}"

        def said(path, name, **changes):
            changes = {f"train_config.{k}": v for k, v in changes.items()}
            asked = with_fields(job, public | {"experiment_name": name, "model_details.quantization": None} | changes)
            return client.post(path, json=asked).json()["message"]

        assert said("/job/", "a").startswith("Queued: LoRA r 16 on tuneyard/tiny-random-llama, 1 epoch with 32 samples a step")
        assert "Warning" not in said("/job/", "b")
        for path in ("/job/", "/job/plan/"):
            assert ": full fine-tuning of tuneyard/tiny-random-llama, 1 epoch" in said(path, "c", train_type="full")
        careless = {"hyperparameters.learning_rate": 0.5, "adapter_config.r": 100}
        warned = said("/job/", "d", **careless)
        assert "Warning: learning_rate 0.5 is outside what LoRA usually wants" in warned
        assert "Warning: adapter_config.r 100 is more than the model's hidden size 64" in warned
        assert "r 100" not in said("/job/", "e", train_type="full", **careless)
        public |= {"dataset_details.dataset_format": "preference"}
        assert "Warning: sft trains on the preferred answers of preference rows and leaves the others out" in said("/job/", "f")


def test_every_path_works_with_and_without_its_slash():
    taken = {r.path for room in ROOMS for r in room.router.routes}
    assert len(taken) > 40
    assert taken == {p.rstrip("/") for p in taken} | {p.rstrip("/") + "/" for p in taken}


def test_a_path_or_method_that_is_not_there_is_a_problem_in_words(http):
    assert "/docs" in http.get("/jobs/").json()["detail"]
    refused = http.put("/job/list/")
    assert (refused.status_code, refused.json()["detail"]) == (405, "this path is for GET")
    assert refused.headers["Allow"] == "GET"


def test_a_word_of_a_path_is_no_id_to_another_method(http):
    refused = [("GET", f"/job/{word}", "POST") for word in ("plan", "cancel", "resume")]
    refused += [("DELETE", f"/{kind}/list", "GET") for kind in ("secret", "webhook")]
    for method, path, allowed in [*refused, ("PUT", "/job/cancel", "POST"), ("POST", "/job/get", "GET")]:
        for slash in ("", "/"):
            answer = http.request(method, path + slash, params={"org_id": ORG})
            assert (answer.status_code, answer.headers["Allow"]) == (405, allowed), (method, path)
            assert answer.json()["detail"] == f"this path is for {allowed}"


def test_reading_a_job(http, job):
    request_id = http.post("/job/", json=job).json()["request_id"]
    got = http.get("/job/get/", params={"org_id": ORG, "request_id": request_id}).json()
    assert set(got) == {
        *("request_id", "org", "experiment_name", "status", "phase", "message", "progress", "step", "total_steps", "epoch"),
        *("eta_s", "created_at", "updated_at", "started_at", "completed_at", "queue_position", "attempt", "metrics"),
        "ray_job",
        *("output_model_path", "error_message", "error_code"),
        *SECTIONS,
    }
    assert got["queue_position"] == 1
    assert http.get(f"/job/{request_id}").json() == got
    assert http.get("/job/list", params={"org_id": ORG}).json() == {"jobs": [got], "next_cursor": None}
    canceled = http.post("/job/cancel/", json={"org_id": ORG, "request_id": request_id}).json()
    assert canceled["status"] == http.post(f"/job/{request_id}/cancel").json()["status"] == "CANCELED"
    kinds = [e["kind"] for e in http.get("/job/events/", params={"org_id": ORG, "request_id": request_id}).json()["events"]]
    assert kinds == ["queued", "cancel_requested"]


def test_a_job_is_read_with_its_defaults_filled_in(http, job):
    asked = with_fields(job, {"infra_config.gpu_type": "H100", "experiment_name": "e" * 128})
    request_id = http.post("/job/", json=asked).json()["request_id"]
    got = http.get(f"/job/{request_id}").json()
    resolved = JobSpec.model_validate(asked).model_dump(mode="json")
    assert {name: got[name] for name in SECTIONS} == {name: resolved[name] for name in SECTIONS}
    assert got["infra_config"]["gpu_type"] == "h100"
    assert (got["train_config"]["hyperparameters"]["warmup_ratio"], got["infra_config"]["min_node_count"]) == (0.03, 2)


def test_more_gpus_than_a_node_has_are_refused(http, settings, job):
    settings.profiles = settings.profiles | {"h100": Profile(resources={"CPU": 1}, gpus_per_node=1)}
    found = fields(http.post("/job/", json=job))["infra_config.gpu_count"]
    assert (found["message"], found["allowed"]) == ("a node of h100 has 1 GPU", {"le": 1})


OPEN_TO_ALL = {"/healthz", "/readyz", "/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/openapi.json"}


def closed_routes(app):
    """Every (method, path) of the app that isn't open to all, in the document or not, but for refused methods."""
    for found in app.routes:
        for route in found.original_router.routes if hasattr(found, "original_router") else [found]:
            if route.path.rstrip("/") not in OPEN_TO_ALL and route.name != "refuse":
                yield from ((method, route.path) for method in route.methods)


def test_every_route_but_the_open_ones_wants_a_token(http):
    names = {name: str(uuid.uuid4()) for name in ("request_id", "secret_id", "webhook_id")}
    del http.headers["Authorization"]
    closed = list(closed_routes(http.app))
    assert len(closed) > 30
    for method, path in closed:
        answer = http.request(method, path.format(**names))
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), (method, path)


def test_a_declared_body_that_is_too_long_is_refused_before_it_is_read(http, settings):
    class Unread(Exception):
        pass

    async def receive():
        raise Unread

    sent = []

    async def send(message):
        sent.append(message)

    assert settings.max_body_bytes == 1 << 20
    headers = {"content-type": "application/json", "authorization": http.headers["Authorization"]}
    for length, refused in ((settings.max_body_bytes + 1, True), (settings.max_body_bytes, False)):
        sent.clear()
        raw = [(k.encode(), v.encode()) for k, v in (headers | {"content-length": str(length)}).items()]
        scope = {"type": "http", "method": "POST", "path": "/job/", "query_string": b"", "headers": raw}
        with contextlib.nullcontext() if refused else pytest.raises(Unread):
            asyncio.run(http.app(scope, receive, send))
        assert (sent[0]["status"] == 413) is refused


def test_a_client_that_hangs_up_in_its_body_is_no_error_of_ours(http):
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    sent = []

    async def receive():
        return next(messages)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"authorization", http.headers["Authorization"].encode())]
    scope = {"type": "http", "method": "POST", "path": "/job/", "query_string": b"", "headers": headers}
    asyncio.run(http.app(scope, receive, send))
    assert sent[0]["status"] == 400


def test_an_empty_idempotency_key_is_refused_as_it_would_be_everybodys(http, job):
    refused = fields(http.post("/job/", json=job, headers={"Idempotency-Key": ""}))
    assert refused.keys() == {"idempotency-key"}


def test_a_form_in_a_charset_of_its_own_is_no_server_error(http):
    parts = {"org": ORG, "name": r"\ud800", "type": "s3", "data": r'{"access_key_id": "x", "secret_access_key": "y"}'}
    body = "".join(f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in parts.items()) + "--b--\r\n"
    kind = "multipart/form-data; boundary=b; charset=unicode_escape"
    assert "surrogate" in fields(http.post("/secret/", content=body, headers={"content-type": kind}))["name"]["message"]


def test_idempotency_and_names(http, job):
    first = http.post("/job/", json=job, headers={"Idempotency-Key": "k"}).json()
    assert http.post("/job/", files=form(job), headers={"Idempotency-Key": "k"}).json() == first
    assert http.post("/job/", json=job | {"experiment_name": "x"}, headers={"Idempotency-Key": "k"}).status_code == 409
    taken = http.post("/job/", json=job)
    assert taken.status_code == 409
    assert first["request_id"] in taken.json()["detail"]


def test_one_key_posted_many_times_at_once_is_one_job(http, store, job):
    together = threading.Barrier(10)

    def post(_):
        together.wait()
        return http.post("/job/", json=job, headers={"Idempotency-Key": "k"})

    with ThreadPoolExecutor(10) as others:
        answers = list(others.map(post, range(10)))
    assert {answer.status_code for answer in answers} == {200}
    (request_id,) = {answer.json()["request_id"] for answer in answers}
    assert [found.request_id for found in store.list_jobs(ORG)[0]] == [request_id]


def token(settings, key=None, algorithm="HS256", **claims):
    claims = {"sub": "x", "org": ORG, "exp": time.time() + 60} | claims
    return jwt.encode(
        {k: v for k, v in claims.items() if v is not None}, key or settings.jwt_secret.get_secret_value(), algorithm
    )


def test_bad_tokens_are_401(http, settings):
    bad = [
        None,
        "",
        "Basic abc",
        "Bearer",
        "Bearer nonsense",
        "Bearer " + token(settings, key="another key that is long enough to be used"),
        "Bearer " + token(settings, exp=time.time() - 3600),
        "Bearer " + token(settings, exp=None),
        "Bearer " + token(settings, sub=None),
        "Bearer " + token(settings, org=None),
        "Bearer " + token(settings, org="not-a-uuid"),
        "Bearer " + token(settings, algorithm="HS512"),
        "Bearer " + jwt.encode({"sub": "x", "org": ORG, "exp": time.time() + 60}, None, "none"),
    ]
    for header in bad:
        answer = http.get("/job/list/", params={"org_id": ORG}, headers={"Authorization": header or ""})
        assert answer.status_code == 401, header
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_other_orgs_are_out_of_reach(http, settings, store, job):
    request_id = http.post("/job/", json=job).json()["request_id"]
    foreign = {"Authorization": f"Bearer {mint_token(settings, OTHER_ORG, 'x', 60)}"}
    assert http.post("/job/", json=job, headers=foreign).status_code == 403
    assert http.get("/job/list/", params={"org_id": ORG}, headers=foreign).status_code == 403
    assert http.get("/job/get/", params={"org_id": OTHER_ORG, "request_id": request_id}, headers=foreign).status_code == 404
    assert http.get(f"/job/{request_id}", headers=foreign).status_code == 404
    assert http.post(f"/job/{request_id}/cancel", headers=foreign).status_code == 404
    assert fields(http.post("/job/", json=job | {"org": OTHER_ORG, "experiment_name": "y"}, headers=foreign)).keys() == {
        "dataset_details.secret_id"
    }
    reader = {"Authorization": f"Bearer {mint_token(settings, ORG, 'x', 60, scope='jobs:read')}"}
    assert http.get(f"/job/{request_id}", headers=reader).status_code == 200
    assert http.post(f"/job/{request_id}/cancel", headers=reader).status_code == 403


def test_all_field_errors_come_at_once_with_their_names(http, store, job):
    bad = with_fields(
        job,
        {
            "train_config.hyperparameters.learning_rte": 1,
            "train_config.hyperparameters.learning_rate": "fast",
            "train_config.type": "dpo",
            "dataset_config.split": {"type": "random", "ratio": [0.9, 0.1]},
            "infra_config.gpu_count": 0,
        },
    )
    found = fields(http.post("/job/", files=form(bad)))
    assert set(found) == {
        "train_config.hyperparameters.learning_rte",
        "train_config.hyperparameters.learning_rate",
        "train_config.type",
        "dataset_config.split.ratio",
        "dataset_config.split.ratios",
        "infra_config.gpu_count",
    }
    assert "did you mean learning_rate?" in found["train_config.hyperparameters.learning_rte"]["message"]
    assert "did you mean ratios?" in found["dataset_config.split.ratio"]["message"]
    assert "not supported yet" in found["train_config.type"]["message"]
    assert found["infra_config.gpu_count"]["allowed"] == {"ge": 1}
    assert store.list_jobs(ORG) == ([], None)


HP, SPLIT = "train_config.hyperparameters", "dataset_config.split"
CORRECTED = {  # what is asked, where the error is, what it says
    "a near name": ({f"{HP}.n_epochs": 3}, f"{HP}.n_epochs", "unknown field, did you mean num_epochs?"),
    "a part of a name": (
        {f"{HP}.batch_size": 8},
        f"{HP}.batch_size",
        "unknown field, did you mean per_device_train_batch_size or per_device_eval_batch_size?",
    ),
    "the initials of a name": ({f"{HP}.lr": 1e-4}, f"{HP}.lr", "unknown field, did you mean learning_rate?"),
    "a name like none of many": ({f"{HP}.dry_run": True}, f"{HP}.dry_run", "unknown field; /docs lists those that there are"),
    "another tool's name": (
        {f"{HP}.fp16": True},
        f"{HP}.fp16",
        "unknown field, did you mean train_config.torch_dtype?",
    ),
    "another tool's name that is near to one of another meaning": (
        {f"{HP}.gradient_clipping": 1},
        f"{HP}.gradient_clipping",
        "unknown field, did you mean train_config.hyperparameters.max_grad_norm?",
    ),
    "another tool's name at the top": (
        {"training_file": "file-1"},
        "training_file",
        "unknown field, did you mean dataset_details.dataset_path?",
    ),
    "another tool's value of a field that is two here": (
        {"train_config.train_type": "qlora"},
        "train_config.train_type",
        "must be lora or full; qlora is lora with model_details.quantization",
    ),
    "another tool's value": (
        {f"{HP}.optim": "adamw_torch"},
        f"{HP}.optim",
        "must be adamw, adamw_8bit or paged_adamw_8bit, did you mean adamw?",
    ),
    "another tool's value with more words of ours": (
        {f"{HP}.optim": "adamw_bnb_8bit"},
        f"{HP}.optim",
        "must be adamw, adamw_8bit or paged_adamw_8bit, did you mean adamw_8bit?",
    ),
    "too much": ({"infra_config.gpu_count": 17}, "infra_config.gpu_count", "must be less than or equal to 16"),
    "text for a number": ({f"{HP}.max_steps": "9"}, f"{HP}.max_steps", "must be an integer"),
    "too few": ({SPLIT: {"type": "random", "ratios": [1]}}, f"{SPLIT}.ratios", "must have at least 2 items, not 1"),
    "a name of elsewhere": (
        {"train_config.learning_rate": 1e-4},
        "train_config.learning_rate",
        "unknown field here: it belongs in train_config.hyperparameters",
    ),
    "a section of elsewhere": (
        {"train_config.quantization": {"quant_bits": 4}},
        "train_config.quantization",
        "unknown field here: it belongs in model_details",
    ),
    "a name of several": (
        {"model_details.type": "llm"},
        "model_details.type",
        "unknown field, did you mean source_type or model_type?",
    ),
    "a name like none": (
        {"train_config.distributed.world": 8},
        "train_config.distributed.world",
        "unknown field; there are type",
    ),
    "a near value": (
        {"train_config.torch_dtype": "BF16"},
        "train_config.torch_dtype",
        "must be bfloat16, float16 or float32, did you mean bfloat16?",
    ),
    "a value like none": ({"train_config.train_type": "x"}, "train_config.train_type", "must be lora or full"),
    "a value for the command line": (
        {"dataset_details.source_type": "disk"},
        "dataset_details.source_type",
        "must be s3, gcs or hf",
    ),
    "a number": ({"model_details.quantization.quant_bits": 16}, "model_details.quantization.quant_bits", "must be 4 or 8"),
    "what is still to come": ({"train_config.type": "rlhf"}, "train_config.type", "must be sft"),
    "no kind of split": ({SPLIT: {"ratios": [0.9, 0.1]}}, f"{SPLIT}.type", "this field is required"),
    "another kind of split": ({SPLIT: {"type": "rand"}}, f"{SPLIT}.type", "must be random, none or file, did you mean random?"),
    "a list for a section": ({SPLIT: [0.9, 0.1]}, SPLIT, "must be an object"),
    "text for a section": (
        {"train_config": '{"secret_access_key": "' + CANARY},
        "train_config",
        "must be an object: in a JSON body a section is no text",
    ),
    "null where a rule asks for more": (
        {"model_details.ownership": "private"},
        "model_details.secret_id",
        "a private model needs secret_id: the id of keys that POST /secret/ has stored",
    ),
    "null where no default is": ({"model_details": None}, "model_details", "this field is required"),
    "null for a name": ({"infra_config.gpu_type": None}, "infra_config.gpu_type", "this field is required"),
    "a blank in the name": (
        {"experiment_name": "my job"},
        "experiment_name",
        "must be 1 to 128 letters, digits and . _ - without blanks",
    ),
}


@pytest.mark.parametrize("what", CORRECTED)
def test_names_and_values_are_corrected(http, job, what):
    changes, field, said = CORRECTED[what]
    answer = http.post("/job/", json=with_fields(job, changes))
    assert {name: e["message"] for name, e in fields(answer).items()} == {field: said}
    assert CANARY not in answer.text


def test_the_values_that_a_field_may_have_are_a_list(http, job):
    changes = {"train_config.train_type": "x", "train_config.type": "x", "dataset_details.source_type": "x", SPLIT: {}}
    found = fields(http.post("/job/", json=with_fields(job, changes | {"model_details.quantization.quant_bits": 3})))
    assert {name: e["allowed"] for name, e in found.items()} == {
        "train_config.train_type": ["lora", "full"],
        "train_config.type": ["sft"],
        "dataset_details.source_type": ["s3", "gcs", "hf"],
        f"{SPLIT}.type": ["random", "none", "file"],
        "model_details.quantization.quant_bits": [4, 8],
    }


def test_a_region_is_the_endpoints_own_where_there_is_one(http, job):
    assert http.post("/job/", json=with_fields(job, {REGION: "garage"})).status_code == 200  # the secret has an endpoint
    keys = {"access_key_id": "a", "secret_access_key": "b"}
    at_aws = http.post("/secret/", json={"org": ORG, "name": "n", "type": "aws", "data": keys}).json()["secret_id"]
    asked = with_fields(job, {REGION: "garage", "dataset_details.secret_id": at_aws, "experiment_name": "b"})
    assert fields(http.post("/job/", json=asked)).keys() == {REGION}


def test_a_list_is_of_one_status_or_name(http, job):
    ids = [http.post("/job/", json=job | {"experiment_name": name}).json()["request_id"] for name in ("a", "b", "c")]
    http.post(f"/job/{ids[1]}/cancel")

    def listed(**filters):
        page = http.get("/job/list/", params={"org_id": ORG} | filters).json()
        return [ids.index(j["request_id"]) for j in page["jobs"]], page["next_cursor"]

    assert listed() == ([2, 1, 0], None)
    assert listed(status="CANCELED") == listed(experiment_name="b") == ([1], None)
    assert listed(status="CANCELED", experiment_name="a") == ([], None)
    first, cursor = listed(status="QUEUED", limit=1)
    http.post("/job/", json=job | {"experiment_name": "late"})
    assert (first, listed(status="QUEUED", limit=1, cursor=cursor)) == ([2], ([0], None))


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"model_details.base_model": "nobody/nothing"}, "model_details.base_model", "TUNEYARD_MODEL_MIRROR"),
        ({"model_details.base_model": "../.."}, "model_details.base_model", "hub id"),
        ({"dataset_details.secret_id": "unknown"}, "dataset_details.secret_id", "POST /secret/"),
        ({"infra_config.gpu_type": "gtx"}, "infra_config.gpu_type", "h100"),
        ({"infra_config.node_count": 5}, "infra_config.node_count", "room for 8"),
        ({"dataset_config.preprocessing.prompt.max_length": 100_000}, "dataset_config.preprocessing.prompt.max_length", "8192"),
        ({"dataset_config.preprocessing.prompt.template": "{% if %}"}, "dataset_config.preprocessing.prompt.template", "line 1"),
        ({TEMPLATE: "{{ 9 ** 9 ** 9 }}"}, TEMPLATE, "operator **"),
        ({"model_details.base_model": "a" * 300}, "model_details.base_model", "hub id"),
        ({"dataset_details.dataset_path": "bucket/key"}, "dataset_details.dataset_path", "s3://"),
        ({"dataset_details.secret_id": None}, "dataset_details.secret_id", "private dataset"),
        ({"dataset_config.split.ratios": [0.5, 0.4]}, "dataset_config.split.ratios", "0.9"),
        ({TEMPLATE: "{{" + "(" * 50_000}, TEMPLATE, "template"),
        ({TEMPLATE: "{{ " + "9" * 5000 + " }}"}, TEMPLATE, "template"),
        ({"experiment_name": "a" * 129}, "experiment_name", "128"),
        (
            {"dataset_details.secret_id": None, "dataset_details.ownership": "public", "dataset_details.region": "mars-1"},
            REGION,
            "us-west-2",
        ),
        ({"model_details.region": "mars-1"}, "model_details.region", "us-west-2"),
        ({"model_details.region": "us-west-2\n"}, "model_details.region", "us-west-2"),
        (FSDP | {"model_details.quantization.quant_bits": 8}, "train_config.distributed.type", "can't shard 8-bit weights"),
        ({OPTIM: "paged_adamw_8bit"}, OPTIM, "needs a GPU"),
        (HUB_ROWS | {"dataset_details.secret_id": ARN}, "dataset_details.secret_id", "an ARN stands for keys of S3"),
        ({"dataset_details.source_type": "local"}, "dataset_details.source_type", "use s3"),
    ],
)
def test_what_can_not_run_here_is_refused_with_the_way_out(http, job, changes, field, said):
    found = fields(http.post("/job/", json=with_fields(job, changes)))
    assert list(found) == [field]
    assert said in found[field]["message"]


def test_what_can_not_run_here_is_told_along_with_what_is_no_job(http, settings, job):
    settings.profiles = settings.profiles | {"h100": Profile(resources={"CPU": 1}, gpus_per_node=1)}
    bad = {
        "experiment_name": "a b",
        "train_config.adapter_config.init_from": "/etc",
        "dataset_config.preprocessing.prompt.max_length": 100_000,
        TEMPLATE: "{% if %}",
        "model_details.secret_id": "unknown",
        "dataset_details.secret_id": "unknown",
        "infra_config.node_count": 1000,
        "infra_config.gpu_count": 2,
    }
    assert fields(http.post("/job/", json=with_fields(job, bad))).keys() == bad.keys()
    rule = {"infra_config.min_node_count": 3, "infra_config.gpu_type": "gtx", OPTIM: "fast"}
    found = fields(http.post("/job/", json=with_fields(job, rule)))
    assert found.keys() == rule.keys()
    assert "unknown gpu_type" in found["infra_config.gpu_type"]["message"]


def test_a_part_that_is_no_json_does_not_hide_what_is_wrong_in_the_others(http, job):
    bad = with_fields(job, {"infra_config.gpu_type": "gtx", "train_config.type": "stf", "model_details.region": "mars-1"})
    parts = form(bad) | {"dataset_config": (None, "{"), "dataset_details": (None, '{"x": NaN}'), "other": (None, "x")}
    found = fields(http.post("/job/", files=parts, headers={"Idempotency-Key": "k"}))
    assert found.keys() == {
        *("dataset_config", "dataset_details", "other"),
        *("infra_config.gpu_type", "train_config.type", "model_details.region"),
    }
    assert (found["dataset_config"]["line"], "NaN" in found["dataset_details"]["message"]) == (1, True)


def test_a_request_with_a_part_too_many_does_not_repeat_the_one_without(http, job):
    again = {"Idempotency-Key": "k"}
    assert http.post("/job/", files=form(job), headers=again).status_code == 200
    assert fields(http.post("/job/", files=form(job) | {"other": (None, "x")}, headers=again)).keys() >= {"other"}


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ('{"gpu_type": "h100",\n "gpu_count": }', "line 2, column 15"),
        ('{"gpu_type": "h100", "gpu_type": "a100"}', "duplicate key 'gpu_type'"),
        ('{"gpu_count": NaN}', "NaN"),
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ("[" * 200_000, "nested too deeply"),
        ('{"gpu_type": "\\ud800"}', "UTF-8"),
        ('{"gpu_type": "h100\\u0000"}', "null character"),
    ],
)
def test_a_json_part_that_does_not_parse_is_named_with_line_and_column(http, job, part, said):
    found = fields(http.post("/job/", files=form(job) | {"infra_config": (None, part)}))
    assert said in found["infra_config"]["message"]


def test_a_body_of_nothing_but_mistakes_costs_little(http, job):
    def wrong(names):
        return dict.fromkeys(names, 0)

    twice = json.dumps(wrong(f"{i:x}" for i in range(80_000)))[:-1] + ', "13000": 0, "13000": 0}'
    close = wrong(f"learning_ra{i:x}" for i in range(20_000))
    asked = [
        ("/job/", json.dumps(with_fields(job, {"train_config.hyperparameters": close}))),
        ("/job/", json.dumps(wrong(f"train_confi{i:x}" for i in range(20_000)))),
        ("/job/cancel/", json.dumps(close)),
        ("/secret/", json.dumps({"org": ORG, "name": "n", "type": "hf", "data": close})),
        ("/secret/", json.dumps(close)),
        ("/webhook/", json.dumps(close)),
    ]
    began_s = time.process_time()
    for path, body in [*asked, ("/job/cancel/", twice)]:
        refused = http.post(path, content=body, headers={"content-type": "application/json"})
        assert refused.status_code == 422, refused.text
        assert len(refused.json()["errors"]) <= MAX_ERRORS + 4  # and the names that are missing
    assert "duplicate key '13000'" in refused.json()["detail"]
    assert time.process_time() - began_s < 40  # a few; where each name is held against all others, a minute for the last body


def test_form_fields_are_checked(http, job):
    found = fields(http.post("/job/", files=form(job) | {"infra_confg": (None, "{}")}))
    assert "did you mean infra_config?" in found["infra_confg"]["message"]
    without = {k: v for k, v in form(job).items() if k != "infra_config"}
    assert fields(http.post("/job/", files=without))["infra_config"]["message"] == "this field is required"


@pytest.mark.parametrize("path", ["/job/cancel/", "/job/resume/"])
@pytest.mark.parametrize("encoding", ["json", "data"])
def test_calls_about_one_job_name_all_that_is_wrong(http, path, encoding):
    found = fields(http.post(path, **{encoding: {"request_id": "x", "orgid": ORG}}))
    assert "did you mean org_id?" in found.pop("orgid")["message"]
    assert {name: e["message"] for name, e in found.items()} == {
        "request_id": "must be a UUID",
        "org_id": "this field is required",
    }


def test_a_secrets_unknown_field_is_named_with_the_nearest(http):
    found = fields(http.post("/secret/", json={"org": ORG, "name": "n", "typ": "s3", "data": {}}))
    assert (set(found), "did you mean type?" in found["typ"]["message"]) == ({"typ", "type"}, True)


def test_query_errors_say_what_was_given_and_what_is_allowed(http):
    found = fields(http.get("/job/list/", params={"limit": 501, "status": "GONE", "experiment_name": "a b"}))
    assert found["org_id"]["message"] == "this field is required"
    assert (found["limit"]["input"], found["limit"]["allowed"]) == ("501", {"le": 500})
    assert found["status"]["input"] == "GONE"
    assert found["status"]["allowed"] == [*Status]
    assert found["status"]["message"] == "must be QUEUED, RUNNING, COMPLETED, FAILED or CANCELED"
    assert "pattern" in found["experiment_name"]["allowed"]


def test_a_name_that_a_query_cant_have_is_told_with_all_else_that_is_wrong_in_it(http):
    found = fields(http.get("/job/list/", params={"limt": 5, "state": "QUEUED", "limit": 501, "token": CANARY}))
    assert {name: entry["message"] for name, entry in found.items()} == {
        "limt": "unknown field, did you mean limit?",
        "state": "unknown field, did you mean status?",
        "token": "unknown field; there are org_id, status, experiment_name, limit, cursor",
        "org_id": "this field is required",
        "limit": "must be less than or equal to 500",
    }
    assert CANARY not in json.dumps(found)


QUERIES = {  # by path: names that it takes
    "/job/get/": {"org_id", "request_id"},
    "/job/list": {"org_id", "status", "experiment_name", "limit"},
    "/job/events/": {"org_id", "request_id", "after"},
    "/job/logs": {"org_id", "request_id", "after", "rank", "tail"},
    "/job/metrics/": {"org_id", "request_id", "after_step"},
    "/job/artifacts/": {"org_id", "request_id"},
    "/job/{}": {"org_id"},
    "/job/{}/events": {"org_id", "after"},
    "/job/{}/logs/": {"org_id", "after", "rank", "tail"},
    "/job/{}/metrics": {"org_id", "after_step"},
    "/job/{}/artifacts": {"org_id"},
    "/secret/list/": {"org_id"},
    "/webhook/list/": {"org_id"},
}


def test_every_call_takes_what_it_knows_in_its_query_and_nothing_else(http, job):
    request_id = http.post("/job/", json=job).json()["request_id"]
    values = {"org_id": ORG, "request_id": request_id, "status": "QUEUED", "experiment_name": "e", "limit": 1}
    values |= {"after": 0, "after_step": 0, "rank": 0, "tail": 1}
    assert set(values) == set().union(*QUERIES.values())
    for path, names in QUERIES.items():
        query = {name: values[name] for name in names}
        assert http.get(path.format(request_id), params=query).status_code == 200, path
        for accepts in ("application/json", "text/event-stream"):
            refused = http.get(path.format(request_id), params=query | {"x": ""}, headers={"accept": accepts})
            assert fields(refused).keys() == {"x"}, path


def test_a_call_with_a_body_takes_no_query(http):
    for path in ("/job/", "/job/plan/", "/job/cancel/", "/job/resume", "/secret/", "/webhook/"):
        answer = http.post(path, params={"org_id": ORG}, json={"org_id": ORG})
        assert fields(answer)["org_id"]["message"] == "unknown field; there are none here"


def test_who_asks_comes_before_what_is_asked_and_probes_may_ask_as_they_like(http):
    assert http.get("/job/list/", params={"x": 1}, headers={"Authorization": ""}).status_code == 401
    assert http.get("/healthz", params={"x": 1}).status_code == http.get("/readyz", params={"x": 1}).status_code == 200
    assert http.get("/docs", params={"x": 1}).status_code == http.get("/openapi.json", params={"x": 1}).status_code == 200


def test_no_query_is_too_long_to_be_judged(http):
    answer = http.get("/job/list/", params={f"x{i}": 1 for i in range(5000)})
    assert len(answer.json()["errors"]) == MAX_ERRORS + 1  # and the name that is missing


def test_the_org_may_be_named_beside_a_job_in_the_path(http, settings, job):
    request_id = http.post("/job/", json=job).json()["request_id"]
    headers = {"Authorization": "Bearer " + token(settings, org=None, orgs=[OTHER_ORG, ORG])}
    for path in ("", "/events", "/logs", "/metrics", "/artifacts"):
        asked = [http.get(f"/job/{request_id}{path}", params={"org_id": org}, headers=headers) for org in (ORG, OTHER_ORG)]
        assert [answer.status_code for answer in asked] == [200, 404]
    for word in ("cancel", "resume"):
        asked = [http.post(f"/job/{request_id}/{word}", params={"org_id": org}, headers=headers) for org in (OTHER_ORG, ORG)]
        assert [answer.status_code for answer in asked] == [404, 200]


NASTY = [
    ({"content": b"", "headers": {"content-type": "application/json"}}, 400),
    ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
    ({"content": b"[1]", "headers": {"content-type": "application/json"}}, 400),
    ({"content": b"\xff\xfe", "headers": {"content-type": "application/json"}}, 400),
    ({"content": '{"org": "\u00e4"}'.encode("latin-1"), "headers": {"content-type": "application/json"}}, 400),
    ({"content": "{}".encode("utf-16"), "headers": {"content-type": "application/json"}}, 400),
    ({"content": b"9" * 5000, "headers": {"content-type": "application/json"}}, 422),
    ({"content": b'{"org": 1e999}', "headers": {"content-type": "application/json"}}, 422),
    ({"content": b'{"org": NaN}', "headers": {"content-type": "application/json"}}, 422),
    ({"content": b'{"org": "a", "org": "b"}', "headers": {"content-type": "application/json"}}, 422),
    ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 422),
    ({"content": b'{"org": "\\u0000"}', "headers": {"content-type": "application/json"}}, 422),
    ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400),
    ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400),
    ({"content": b"\x00\xff=%zz&&&", "headers": {"content-type": "application/x-www-form-urlencoded"}}, 422),
    ({"content": b"org=%ff", "headers": {"content-type": "application/x-www-form-urlencoded"}}, 422),
    ({"content": b"org=%00", "headers": {"content-type": "application/x-www-form-urlencoded"}}, 422),
    ({"files": {"org": (None, b"\xff")}}, 422),
    ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415),
    ({"content": b"x"}, 415),
    ({"json": {}}, 422),
    ({"json": {"org": ["a"], "experiment_name": {"b": None}}}, 422),
    ({"content": b"x" * (2 << 20), "headers": {"content-type": "application/json"}}, 413),
]


@pytest.mark.parametrize(("request_", "status"), NASTY, ids=range(len(NASTY)))
def test_no_body_is_a_server_error(http, store, request_, status):
    answer = http.post("/job/", **request_)
    assert answer.status_code == status, answer.text
    assert answer.json()["status"] == status
    assert store.list_jobs(ORG) == ([], None)


def test_json_that_says_it_is_a_form_is_told_its_type_and_not_shown(http):
    """As curl -d sends it without a header."""
    for path in ("/job/", "/job/plan/", "/job/cancel/", "/secret/"):
        content = json.dumps({"org": ORG, "data": {"token": CANARY}})
        answer = http.post(path, content=content, headers={"content-type": "application/x-www-form-urlencoded"})
        assert answer.status_code == 415
        assert answer.json()["detail"] == "the body is JSON and its Content-Type says that it is a form: send application/json"
        assert "errors" not in answer.json()


def test_fields_of_other_names_are_fields_of_a_job():
    def has(model, path):
        name, _, rest = path.partition(".")
        field = model.model_fields.get(name)
        return field is not None and (not rest or any(has(inner, rest) for inner in models_in(field.annotation)))

    def names(model):
        return {n for name, f in model.model_fields.items() for n in ({name}.union(*map(names, models_in(f.annotation))))}

    assert [path for path in OTHER_NAMES.values() if not has(JobSpec, path)] == []
    assert OTHER_NAMES.keys() & names(JobSpec) == set()


def test_json_in_another_encoding_is_refused_in_a_sentence(http):
    for path in ("/job/", "/job/plan/", "/job/cancel/", "/job/resume/", "/secret/"):
        answer = http.post(path, content="{}".encode("utf-16"), headers={"content-type": "application/json; charset=utf-16"})
        assert (answer.status_code, answer.json()["detail"]) == (400, "the body isn't JSON: it must be text in UTF-8")


def test_health_and_docs_need_no_token(http):
    del http.headers["Authorization"]
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"status": "ready"}
    for path in ("/docs", "/docs/", "/openapi.json/"):
        assert http.get(path).status_code == 200
    for path in ("/healthz", "/healthz/", "/readyz", "/readyz/"):  # as load balancers ask
        assert http.head(path).status_code == 200
    for path in ("/redoc", "/docs/oauth2-redirect"):
        assert http.get(path).status_code == 404
    schema = http.get("/openapi.json").json()
    open_to_all = {path for path, methods in schema["paths"].items() for o in methods.values() if o.get("security") == []}
    assert open_to_all == {"/healthz", "/readyz"}
    assert "multipart/form-data" in schema["paths"]["/job/"]["post"]["requestBody"]["content"]
    assert "learning_rate" in schema["components"]["schemas"]["Hyperparameters"]["properties"]


def test_the_process_answers_though_all_that_it_asks_hangs(settings, store):
    free, asked = threading.Event(), threading.Semaphore(0)

    class Hanging(Idle):
        def not_ready(self):
            asked.release()
            free.wait(60)

    with TestClient(build_app(settings, store, Hanging())) as client, ThreadPoolExecutor(60) as others:
        ready = [others.submit(client.get, "/readyz") for _ in range(50)]
        try:
            assert all(asked.acquire(timeout=60) for _ in range(40))  # all threads that answer
            assert others.submit(client.get, "/healthz").result(20).status_code == 200
        finally:
            free.set()
        assert {answer.result().status_code for answer in ready} == {200}


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
def test_all_that_the_page_of_the_document_loads_is_the_services_own(http, path):
    del http.headers["Authorization"]
    page = Page(http.get(path).text)
    assert len(page.loads) == 3
    for url in page.loads:
        assert url == "data:," or http.get(url).status_code == 200
    assert "SwaggerUIBundle" in http.get("/docs/swagger-ui-bundle.js").text
    assert "url: '/openapi.json'" in http.get(path).text


def test_a_store_that_is_away_is_503(settings, tmp_path):
    broken = JobStore.open(f"sqlite:///{tmp_path}/no/such/folder/jobs.db")
    with TestClient(build_app(settings, broken, Idle()), raise_server_exceptions=False) as client:
        assert client.get("/readyz").status_code == 503
        answer = client.get(
            "/job/list/", params={"org_id": ORG}, headers={"Authorization": f"Bearer {mint_token(settings, ORG, 'x', 60)}"}
        )
    assert answer.status_code == 503
    assert "Retry-After" in answer.headers


def test_a_secret_in_the_wrong_place_is_not_echoed(http, job):
    answer = http.post("/job/", json=with_fields(job, {"dataset_details.secret_access_key": CANARY}))
    assert "unknown field" in fields(answer)["dataset_details.secret_access_key"]["message"]
    assert CANARY not in answer.text


def test_the_database_password_shows_in_no_repr(settings, monkeypatch):
    monkeypatch.setenv("TUNEYARD_DATABASE_URL", f"postgresql+psycopg://u:{CANARY}@db/x")
    assert CANARY not in repr(Settings.load())


@pytest.mark.parametrize("scope", [{"jobs": "read"}, 7, True, [1]])
def test_a_scope_that_is_no_scope_gives_no_rights(http, settings, scope):
    headers = {"Authorization": "Bearer " + token(settings, scope=scope)}
    assert http.get("/job/list/", params={"org_id": ORG}, headers=headers).status_code == 401


def test_scopes_limit_what_a_token_may_do(http, settings):
    def status(path, scope):
        headers = {"Authorization": "Bearer " + token(settings, scope=scope)}
        return http.get(path, params={"org_id": ORG}, headers=headers).status_code

    assert status("/job/list/", "jobs:read") == status("/job/list/", ["jobs:read"]) == status("/job/list/", "admin") == 200
    assert status("/job/list/", "") == status("/job/list/", "secrets:write") == status("/secret/list/", "jobs:read") == 403


def test_what_each_call_asks_of_a_token(http, settings, job):
    nobody = str(uuid.uuid4())
    named = {"org_id": ORG, "request_id": nobody}
    calls = {
        ("POST", "/job/"): "jobs:write",
        ("POST", "/job/plan/"): "jobs:read",
        ("POST", "/job/cancel/"): "jobs:write",
        ("POST", "/job/resume/"): "jobs:write",
        ("POST", f"/job/{nobody}/resume"): "jobs:write",
        ("GET", f"/job/{nobody}/events"): "jobs:read",
        ("POST", "/secret/"): "secrets:write",
        ("DELETE", f"/secret/{nobody}"): "secrets:write",
    }
    for (method, path), scope in calls.items():
        for given in ("jobs:read", "jobs:write", "secrets:write"):
            headers = {"Authorization": "Bearer " + token(settings, scope=given)}
            how = {"json": named} if method == "POST" else {"params": {"org_id": ORG}}
            answer = http.request(method, path, **how, headers=headers)
            assert (answer.status_code == 403) is (given != scope), (path, given)


def test_a_token_may_speak_for_several_orgs(http, settings, job):
    request_id = http.post("/job/", json=job).json()["request_id"]
    third = "99999999-2222-4333-8444-555555555555"
    headers = {"Authorization": "Bearer " + token(settings, org=None, orgs=[OTHER_ORG, ORG])}
    statuses = [http.get("/job/list/", params={"org_id": o}, headers=headers).status_code for o in (ORG, OTHER_ORG, third)]
    assert statuses == [200, 200, 403]
    assert http.get(f"/job/{request_id}", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/job/", "/secret/", "/job/cancel/"])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b", "application/x-www-form-urlencoded"])
def test_long_bodies_are_refused_everywhere(http, path, kind):
    assert http.post(path, content=b"x" * (2 << 20), headers={"content-type": kind}).status_code == 413
    chunks = (b"x" * (1 << 18) for _ in range(8))
    assert http.post(path, content=chunks, headers={"content-type": kind}).status_code == 413


@pytest.mark.parametrize(
    "query",
    [
        {"cursor": "x"},
        {"cursor": base64.b64encode(str(10**30).encode()).decode()},
        {"cursor": "-1"},
        {"experiment_name": "a\0b"},
        {"limit": 10**30},
        {"status": "GONE"},
        {"org_id": "\0"},
    ],
)
def test_no_query_is_a_server_error(http, query):
    assert http.get("/job/list/", params={"org_id": ORG} | query).status_code == 422


def test_events_after_the_end_of_all_numbers(http, job):
    request_id = http.post("/job/", json=job).json()["request_id"]
    query = {"org_id": ORG, "request_id": request_id}
    assert http.get("/job/events/", params=query | {"after": 10**30}).status_code == 422
    assert http.get("/job/events/", params=query | {"after": 2**63 - 1}).json() == {"events": []}


def told(store, request_id):
    """Play a job actor's part: an attempt that tells something."""
    store.start_attempt(request_id, 0, 1)
    points = [{"step": 0, "eval_loss": 2.0}, {"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.0}]
    store.report(request_id, 1, Notes(points=points, lines=[(0, 1.0, "zero"), (0, 2.0, "one"), (1, 3.0, "two")]))


def finished(store, request_id):
    """An attempt that tells something and ends."""
    told(store, request_id)
    store.finish(request_id, 1, Status.FAILED, message="no", error_code="x", error_message="no")


def test_metrics_and_logs_of_a_job(http, store, job):
    request_id = http.post("/job/", json=job).json()["request_id"]
    told(store, request_id)
    query = {"org_id": ORG, "request_id": request_id}

    def steps(path, **more):
        return [p["step"] for p in http.get(path, params=more).json()["points"]]

    assert steps("/job/metrics/", **query) == steps(f"/job/{request_id}/metrics") == [0, 1, 2]
    assert steps("/job/metrics", **query, after_step=1) == [2]
    store.report(request_id, 1, Notes(points=[{"step": 2, "loss": 0.9}]))
    assert http.get("/job/metrics/", params=query | {"after_step": 1}).json()["points"] == [{"step": 2, "loss": 0.9}]
    assert steps("/job/metrics", **query, after_step=2**31 - 1) == []
    assert http.get("/job/metrics/", params=query | {"after_step": 2**31}).status_code == 422

    def lines(**more):
        return [entry["line"] for entry in http.get("/job/logs/", params=query | more).json()["logs"]]

    assert lines() == ["zero", "one", "two"]
    assert (lines(rank=1), lines(tail=2), lines(rank=0, tail=1)) == (["two"], ["one", "two"], ["one"])


def sse(answer):
    """The events of a finished stream: (id, event, data)."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [dict(line.split(": ", 1) for line in b.splitlines()) for b in answer.text.split("\n\n") if b.strip()]
    return [(b.get("id"), b["event"], json.loads(b["data"])) for b in blocks if "event" in b]


@pytest.mark.parametrize(("path", "name", "field"), [("events", "events", "kind"), ("logs", "logs", "line")])
def test_a_stream_that_breaks_goes_on_where_it_was(http, store, job, path, name, field):
    request_id = http.post("/job/", json=job).json()["request_id"]
    finished(store, request_id)
    query = {"org_id": ORG, "request_id": request_id}
    plain = http.get(f"/job/{path}/", params=query).json()[name]
    follow = {"Accept": "text/event-stream"}
    *sent, end = sse(http.get(f"/job/{path}/", params=query, headers=follow))
    assert [(i, data[field]) for i, _, data in sent] == [(str(e["id"]), e[field]) for e in plain]
    assert end == (None, "end", {"status": "FAILED"})
    *rest, _ = sse(http.get(f"/job/{request_id}/{path}", headers=follow | {"Last-Event-ID": sent[0][0]}))
    assert rest == sent[1:]
    assert http.get(f"/job/{path}/", params=query, headers=follow | {"Last-Event-ID": sent[-1][0]}).status_code == 204
    assert sse(http.get(f"/job/{path}/", params=query, headers=follow | {"Last-Event-ID": "x"}))[:-1] == sent


def test_a_stream_follows_a_job_to_its_end(http, store, job):
    request_id = http.post("/job/", json=job).json()["request_id"]
    threading.Timer(0.3, finished, (store, request_id)).start()
    *sent, end = sse(http.get(f"/job/{request_id}/logs", headers={"Accept": "text/event-stream"}))
    assert [data["line"] for _, _, data in sent] == ["zero", "one", "two"]
    assert end[1] == "end"


def test_a_followed_tail_is_where_the_following_begins_and_leaves_out_nothing_after(http, store, job, monkeypatch):
    request_id = http.post("/job/", json=job).json()["request_id"]
    looked = []

    def looks(*arguments, **more):
        found = Journal.log(store.journal, *arguments, **more)
        if not looked:
            finished(store, request_id)  # all lines come after the first look
        looked.append(found)
        return found

    monkeypatch.setattr(store.journal, "log", looks)
    follow = {"Accept": "text/event-stream"}
    *sent, _ = sse(http.get(f"/job/{request_id}/logs", params={"tail": 1}, headers=follow))
    assert looked[0] == []
    assert [data["line"] for _, _, data in sent] == ["zero", "one", "two"]
    *sent, _ = sse(http.get(f"/job/{request_id}/logs", params={"tail": 1}, headers=follow))
    assert [data["line"] for _, _, data in sent] == ["two"]


def test_an_org_follows_so_many_jobs_at_once_and_no_more(settings, store, job, monkeypatch):
    settings.max_streams_per_org = 1
    monkeypatch.setattr(journal, "FOLLOW_POLL_S", 0.05)
    with TestClient(build_app(settings, store, Idle())) as client, ThreadPoolExecutor() as others:
        mine, theirs = (
            store.insert(JobSpec.model_validate(job | {"org": org}), "queued")[0].request_id for org in (ORG, OTHER_ORG)
        )

        def follow(org, request_id):
            headers = {"Authorization": f"Bearer {mint_token(settings, org, 'x', 60)}", "Accept": "text/event-stream"}
            return client.get(f"/job/{request_id}/events", headers=headers)

        first = others.submit(follow, ORG, mine)
        places = client.app.state.service.streams
        while not places._held[ORG]:
            time.sleep(0.01)
        refused = follow(ORG, mine)
        assert (refused.status_code, int(refused.headers["Retry-After"]) > 0) == (429, True)
        assert refused.headers["content-type"] == "application/problem+json"
        store.request_cancel(theirs)
        assert follow(OTHER_ORG, theirs).status_code == 200
        store.request_cancel(mine)
        assert first.result().status_code == 200
        assert follow(ORG, mine).status_code == 200


def test_resume_queues_what_failed_and_nothing_else(http, store, job):
    request_id = http.post("/job/", json=job).json()["request_id"]
    body = {"org_id": ORG, "request_id": request_id}
    assert http.post("/job/resume/", json=body).status_code == 409
    finished(store, request_id)
    again = http.post("/job/resume/", json=body).json()
    assert (again["status"], again["phase"], again["attempt"], again["error_code"]) == ("QUEUED", "queued", 1, None)
    assert (again["completed_at"], again["queue_position"]) == (None, 1)
    http.post(f"/job/{request_id}/cancel")
    other = http.post("/job/", json=job).json()["request_id"]
    taken = http.post(f"/job/{request_id}/resume")
    assert (taken.status_code, other in taken.json()["detail"]) == (409, True)


def test_artifacts_of_a_job_that_has_none_yet(http, job):
    request_id = http.post("/job/", json=job).json()["request_id"]
    assert http.get("/job/artifacts/", params={"org_id": ORG, "request_id": request_id}).json() == {"files": []}


def test_a_repeated_request_is_answered_though_it_could_not_be_accepted_any_more(http, job, secret_id):
    first = http.post("/job/", json=job, headers={"Idempotency-Key": "k"})
    assert http.delete(f"/secret/{secret_id}", params={"org_id": ORG}).status_code == 200
    assert http.post("/job/", json=job, headers={"Idempotency-Key": "k"}).json() == first.json()
    assert http.post("/job/", json=job | {"experiment_name": "new"}).status_code == 422


def test_readers_do_not_wait_for_a_writer(http, store):
    with store.write():
        assert http.get("/job/list/", params={"org_id": ORG}).status_code == 200


def test_a_busy_pool_is_503(settings, store, monkeypatch):
    def busy(*_):
        raise PoolTimeout

    monkeypatch.setattr(store, "read", busy)
    with TestClient(build_app(settings, store, Idle()), raise_server_exceptions=False) as client:
        assert client.get("/readyz").status_code == 503


@pytest.mark.parametrize(("rate", "replicas"), [("3/hour", "1"), ("7/hour", "2")])
def test_more_requests_than_the_rate_allows_are_429(settings, store, monkeypatch, rate, replicas):
    monkeypatch.setenv("TUNEYARD_RATE_LIMIT", rate)
    monkeypatch.setenv("TUNEYARD_INGRESS_REPLICAS", replicas)
    with TestClient(build_app(Settings.load(), store, Idle())) as client:

        def ask(org):
            headers = {"Authorization": f"Bearer {mint_token(settings, org, 'x', 60)}"}
            return client.get("/job/list/", params={"org_id": org}, headers=headers)

        assert [ask(ORG).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert 0 < int(ask(ORG).headers["Retry-After"]) <= 3600
        assert ask(OTHER_ORG).status_code == 200
        assert client.get("/healthz").status_code == 200


def test_requests_count_for_the_org_that_they_ask_for(settings, store):
    settings.rate_limit = "2/hour"
    with TestClient(build_app(settings, store, Idle())) as client:

        def ask(org, *orgs):
            headers = {"Authorization": "Bearer " + token(settings, org=None, orgs=list(orgs))}
            return client.get("/job/list/", params={"org_id": org}, headers=headers).status_code

        third = "99999999-2222-4333-8444-555555555555"
        assert [ask(OTHER_ORG, ORG, OTHER_ORG) for _ in range(3)] == [200, 200, 429]
        assert [ask(ORG, ORG), ask(ORG, ORG, OTHER_ORG), ask(ORG, ORG)] == [200, 200, 429]
        assert [ask(third, ORG, OTHER_ORG) for _ in range(3)] == [403, 403, 429]  # guessing counts, too
        assert [ask("no-org", third) for _ in range(3)] == [422, 422, 429]


def test_a_full_queue_is_429_until_there_is_room(settings, store, job, monkeypatch):
    monkeypatch.setenv("TUNEYARD_MAX_QUEUED_JOBS_PER_ORG", "1")
    with TestClient(build_app(Settings.load(), store, Idle())) as client:
        client.headers["Authorization"] = f"Bearer {mint_token(settings, ORG, 'x', 60)}"
        first = client.post("/job/", json=job, headers={"Idempotency-Key": "k"})
        full = client.post("/job/", json=job | {"experiment_name": "second"})
        assert (first.status_code, full.status_code) == (200, 429)
        assert int(full.headers["Retry-After"]) > 0
        assert client.post("/job/", json=job, headers={"Idempotency-Key": "k"}).json() == first.json()
        client.post(f"/job/{first.json()['request_id']}/cancel")
        assert client.post("/job/", json=job | {"experiment_name": "second"}).status_code == 200
        assert client.post(f"/job/{first.json()['request_id']}/resume").status_code == 429


def test_a_refusal_that_quotes_a_lone_surrogate_can_be_read(settings, store, job):
    class Quoting(Idle):
        def plan(self, spec, deadline):
            render = ImmutableSandboxedEnvironment().from_string(spec.dataset_config.preprocessing.prompt.template).render
            raise UserError(f"the chat template says {render()}", field=TEMPLATE)

    with TestClient(build_app(settings, store, Quoting()), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {mint_token(settings, ORG, 'x', 60)}"
        public = {"dataset_details.ownership": "public", "dataset_details.secret_id": None}
        said = fields(client.post("/job/plan/", json=with_fields(job, public | {TEMPLATE: r'{{ "a\ud800b" }}'})))
        assert said[TEMPLATE]["message"] == "the chat template says a?b"


def test_a_plan_is_answered_in_time_whatever_it_waits_for(settings, store, job, monkeypatch):
    monkeypatch.setattr(jobs, "LIMIT_S", 0.5)
    go_on = threading.Event()

    class Stuck(Idle):
        def plan(self, spec, deadline):
            go_on.wait(600)

    with TestClient(build_app(settings, store, Stuck())) as client:
        client.headers["Authorization"] = f"Bearer {mint_token(settings, ORG, 'x', 60)}"
        public = {"dataset_details.ownership": "public", "dataset_details.secret_id": None}
        refused = client.post("/job/plan/", json=with_fields(job, public))
        assert (refused.status_code, int(refused.headers["Retry-After"]) > 0) == (503, True)
        assert "the plan isn't made after" in refused.json()["detail"]
        go_on.set()


def test_plans_at_once_are_bounded_for_an_org_and_for_all(settings, store, job, monkeypatch):
    monkeypatch.setattr(jobs, "LIMIT_S", 300.0)
    started, go_on = threading.Semaphore(0), threading.Event()

    class Slow(Idle):
        def plan(self, spec, deadline):
            started.release()
            go_on.wait(60)
            return {}

    settings.max_plans, settings.max_plans_per_org = 3, 2
    with TestClient(build_app(settings, store, Slow())) as client, ThreadPoolExecutor() as others:

        def ask(org):
            headers = {"Authorization": f"Bearer {mint_token(settings, org, 'x', 60)}"}
            public = with_fields(job, {"org": org, "dataset_details.ownership": "public", "dataset_details.secret_id": None})
            return client.post("/job/plan/", json=public, headers=headers)

        waiting = [others.submit(ask, ORG), others.submit(ask, ORG)]
        assert all(started.acquire(timeout=60) for _ in waiting)
        refused = ask(ORG)
        assert (refused.status_code, int(refused.headers["Retry-After"]) > 0) == (429, True)
        waiting.append(others.submit(ask, OTHER_ORG))
        assert started.acquire(timeout=60)
        refused = ask(OTHER_ORG)
        assert (refused.status_code, int(refused.headers["Retry-After"]) > 0) == (503, True)
        go_on.set()
        assert [answer.result().status_code for answer in waiting] == [200] * 3
        assert ask(ORG).status_code == 200


@pytest.mark.parametrize(("setting", "said"), [("MAX_GPUS_PER_ORG", "quota of 3"), ("MAX_WORKERS", "room for 3")])
def test_a_job_larger_than_a_quota_is_refused_unless_it_can_do_with_less(settings, store, job, monkeypatch, setting, said):
    monkeypatch.setenv(f"TUNEYARD_{setting}", "3")
    with TestClient(build_app(Settings.load(), store, Idle())) as client:
        client.headers["Authorization"] = f"Bearer {mint_token(settings, ORG, 'x', 60)}"
        public = with_fields(job, {"dataset_details.ownership": "public", "dataset_details.secret_id": None})
        for fewest in ({}, {"infra_config.min_node_count": 2}):
            refused = fields(client.post("/job/", json=with_fields(public, fewest)))
            assert said in refused["infra_config.node_count"]["message"]
        assert client.post("/job/", json=with_fields(public, {"infra_config.min_node_count": 1})).status_code == 200


def test_another_org_learns_nothing_on_any_route(http, settings, job, secret_id):
    ours = http.post("/job/", json=job).json()["request_id"]
    hook = http.post("/webhook/", json={"org": ORG, "url": "https://hooks.example.com/x"}).json()["webhook_id"]
    stranger = {"Authorization": f"Bearer {mint_token(settings, OTHER_ORG, 'x', 60, scope='admin')}"}
    reached = set()

    def ask(method, path, org, request_id, secret, webhook):
        names = {"request_id": request_id, "secret_id": secret, "webhook_id": webhook}
        body = {
            "/job": job | {"org": org},
            "/job/plan": job | {"org": org},
            "/secret": {"org": org, "name": "n", "type": "s3"},
            "/webhook": {"org": org, "url": "https://hooks.example.com/x"},
        }
        sent = body.get(path.rstrip("/"), {"org_id": org, "request_id": request_id})
        query = {"org_id": org} if "{" in path or "/list" in path else {"org_id": org, "request_id": request_id}
        how = {"json": sent} if method == "POST" and "{" not in path else {"params": query}
        answer = http.request(method, path.format(**names), **how, headers=stranger)
        reached.add(answer.status_code)
        text = answer.text
        for name in (request_id, secret, webhook):
            text = text.replace(name, "<id>")
        return answer.status_code, text

    for method, path in closed_routes(http.app):
        if "{request_id}" not in path:
            assert ask(method, path, ORG, ours, secret_id, hook)[0] == 403, path
        if path.rstrip("/") not in ("/job", "/job/plan", "/secret", "/webhook", "/job/list", "/secret/list", "/webhook/list"):
            there, not_there = (ask(method, path, OTHER_ORG, *ids) for ids in ((ours, secret_id, hook), [str(uuid.uuid4())] * 3))
            assert there == not_there, path  # not even a hint that it exists
            assert there[0] == 404, path
    assert reached == {403, 404}
    assert http.get(f"/job/{ours}").json()["status"] == "QUEUED"
    assert [s["secret_id"] for s in http.get("/secret/list/", params={"org_id": ORG}).json()["secrets"]] == [secret_id]
    assert [w["webhook_id"] for w in http.get("/webhook/list/", params={"org_id": ORG}).json()["webhooks"]] == [hook]


def test_what_the_cluster_can_never_hold_is_refused_with_what_it_has(http, store, job):
    store.set_capacity({"h100": 3, "a100": 8, "cpu": 0})
    refused = fields(http.post("/job/", json=job))["infra_config.node_count"]
    assert refused["message"] == "4 workers of h100 are more than this cluster can have, 3; it has a100 (8), h100 (3)"
    elastic = with_fields(job, {"infra_config.min_node_count": 1})
    assert http.post("/job/", json=elastic).status_code == 200
    none = with_fields(job, {"infra_config.gpu_type": "cpu", "experiment_name": "b"})
    assert "it has a100 (8)" in fields(http.post("/job/", json=none))["infra_config.gpu_type"]["message"]
