"""What a submission says of a base model in a bucket or on the hub, and of the job that it goes on from."""

import hashlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from serve_app.app import build_app
from serve_app.lifecycle import Status
from serve_app.planner import plan_job
from serve_app.run_keys import keys_of
from serve_app.secrets import SecretVault
from tests.conftest import CANARY, ORG, OTHER_ORG, TINY, Idle, fields, rows, with_fields
from tests.train_loop.servers import Google, Server
from train_loop.errors import ModelError
from train_loop.spec import JobSpec

MODEL, SECRET, START = "model_details.base_model", "model_details.secret_id", "train_config.adapter_config.init_from"
LENGTH = "dataset_config.preprocessing.prompt.max_length"
URI = "s3://tuneyard/models/tiny"


def made(http, type_, data):
    return http.post("/secret/", json={"org": ORG, "name": "n", "type": type_, "data": data}).json()["secret_id"]


@pytest.fixture(scope="module")
def keys(s3, mirror):
    for path in (mirror / TINY).iterdir():
        s3.client().upload_file(str(path), "tuneyard", f"models/tiny/{path.name}")
    lines = "".join(json.dumps(r) + "\n" for r in rows(20))
    s3.client().put_object(Bucket="tuneyard", Key="rows.jsonl", Body=lines.encode())
    return {
        "access_key_id": s3.access_key_id,
        "secret_access_key": s3.secret_access_key,
        "endpoint_url": s3.endpoint_url,
    }


def test_a_model_of_a_bucket_is_looked_at_with_its_own_secret(http, job, keys, settings, store, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEYARD_MODEL_CACHE", str(tmp_path / "cache"))
    opened = with_fields(job, {"model_details": {"base_model": URI, "source_type": "s3", "secret_id": made(http, "s3", keys)}})
    opened = with_fields(opened, {"model_details.ownership": "private"})
    assert http.post("/job/", json=opened).status_code == 200

    def refusal(changes):
        return fields(http.post("/job/", json=with_fields(opened, {"experiment_name": "other"} | changes)))

    assert "8192" in refusal({"dataset_config.preprocessing.prompt.max_length": 9000}).popitem()[1]["message"]
    assert "there is no model" in refusal({MODEL: f"{URI}y"})[MODEL]["message"]
    wrong = made(http, "s3", keys | {"secret_access_key": "wrong" + CANARY})
    assert "refused the keys" in refusal({SECRET: wrong})[SECRET]["message"]
    assert refusal({SECRET: made(http, "hf", {"token": "hf_abc"})})[SECRET]["allowed"] == ["aws", "s3"]
    assert "no such secret" in refusal({SECRET: "unknown"})[SECRET]["message"]

    data = {
        "dataset_details.dataset_path": "s3://tuneyard/rows.jsonl",
        "dataset_details.secret_id": opened["model_details"]["secret_id"],
    }
    spec = JobSpec.model_validate(with_fields(opened, data))
    plan = plan_job(spec, settings, SecretVault.from_settings(store, settings))
    assert plan["trainable_params"] > 0


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (b"[]", MODEL),
        (b"7", MODEL),
        (b"{", MODEL),
        (b"\xff\xfe", MODEL),
        (b"[" * 100_000, MODEL),
        (b'{"x": ' + b"9" * 5000 + b"}", MODEL),
        (b'{"x": "' + b" " * (1 << 20) + b'"}', MODEL),
        (b'{"max_position_embeddings": "many", "text_config": 7}', None),
        (b'{"max_position_embeddings": true}', None),
        (b'{"max_position_embeddings": 64}', LENGTH),
        (b'{"text_config": {"max_position_embeddings": 64}}', LENGTH),
        (b'{"n_positions": 64}', LENGTH),  # as GPT-2 has it
    ],
    ids=range(12),
)
def test_whatever_a_bucket_has_as_configuration_is_no_server_error(http, job, s3, keys, config, refused):
    s3.client().put_object(Bucket="tuneyard", Key="models/odd/config.json", Body=config)
    model = {"base_model": "s3://tuneyard/models/odd", "source_type": "s3", "secret_id": made(http, "s3", keys)}
    answer = http.post("/job/", json=with_fields(job, {"model_details": model}))
    assert (list(fields(answer)) == [refused]) if refused else answer.status_code == 200, answer.text


@pytest.fixture
def hub(settings, monkeypatch):
    """A stand-in for the hub, which isn't there where tests run: answers by path, and what it was asked."""
    asked, answers = [], {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            status, code, body = answers.get(self.path, (404, "RepoNotFound", b""))
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    settings.hub_offline = False
    yield SimpleNamespace(asked=asked, answers=answers, server=server)
    server.shutdown()
    server.server_close()


def on_the_hub(status, code=None, body=b""):
    return {"/acme/model/main/config.json": (status, code, body)}


@pytest.mark.parametrize(
    ("answers", "refused", "said"),
    [
        (on_the_hub(200, body=b'{"max_position_embeddings": 64}'), LENGTH, "context of acme/model, 64"),
        (on_the_hub(200, body=b"[]"), MODEL, "isn't a model's configuration"),
        (on_the_hub(200, body=b" " * (2 << 20)), MODEL, "isn't a model's configuration"),
        (on_the_hub(404, "RepoNotFound"), MODEL, "no such model that this token may read"),
        (on_the_hub(404, "EntryNotFound"), MODEL, "holds no config.json"),
        (on_the_hub(404, "RevisionNotFound"), "model_details.revision", "no such revision"),
        (on_the_hub(403, "GatedRepo"), SECRET, "accept its terms"),
        (on_the_hub(451), MODEL, "the hub answered 451"),
    ],
)
def test_what_the_hub_says_of_a_model_is_said_at_submit(hub, http, job, answers, refused, said):
    hub.answers.update(answers)
    token = made(http, "hf", {"token": f"hf_{CANARY}"})
    private = {MODEL: "acme/model", "model_details.ownership": "private", SECRET: token}
    found = fields(http.post("/job/", json=with_fields(job, private)))
    assert list(found) == [refused]
    assert said in found[refused]["message"]
    assert hub.asked == [("/acme/model/main/config.json", f"Bearer hf_{CANARY}")]


def test_a_model_of_the_hub_that_suits_is_accepted(hub, http, job):
    hub.answers["/acme/model/v2/config.json"] = (200, None, b'{"max_position_embeddings": 4096}')
    named = {MODEL: "acme/model", "model_details.revision": "v2"}
    assert http.post("/job/", json=with_fields(job, named)).status_code == 200


def test_a_private_model_of_the_hub_needs_a_token(http, job, settings, store, secret_id):
    token = made(http, "hf", {"token": f"hf_{CANARY}"})
    private = with_fields(job, {"model_details.ownership": "private", SECRET: token})
    spec = JobSpec.model_validate(private)
    vault = SecretVault.from_settings(store, settings)
    keys = keys_of(spec, vault, settings)
    assert keys.hub_token == f"hf_{CANARY}"
    assert CANARY not in repr(keys)
    refused = fields(http.post("/job/", json=with_fields(private, {SECRET: secret_id})))
    assert refused[SECRET]["allowed"] == ["hf"]
    with pytest.raises(ModelError, match="doesn't open what is at hf") as caught:
        keys_of(JobSpec.model_validate(with_fields(private, {SECRET: secret_id})), vault, settings)
    assert caught.value.field == SECRET


def test_a_model_in_google_storage_is_looked_at(http, job, serve, mirror, monkeypatch):
    files = {f"models/tiny/{path.name}": path.read_bytes() for path in (mirror / TINY).iterdir()}
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", serve(Google.of(files=files, authorization=None)))

    def submit(uri, **changes):
        details = {"base_model": uri, "source_type": "gcs", "ownership": "public"}
        return http.post("/job/", json=with_fields(job, {"model_details": details | changes}))

    assert submit("gs://bucket/models/tiny").status_code == 200
    assert "there is no model" in fields(submit("gs://bucket/models/none"))[MODEL]["message"]
    s3_keys = job["dataset_details"]["secret_id"]
    assert fields(submit("gs://bucket/models/tiny", secret_id=s3_keys))[SECRET]["allowed"] == ["gcs"]


def test_a_submission_is_to_come_again_when_the_models_storage_or_the_hub_is_away(http, job, settings, store, serve, monkeypatch):
    def detail(http, model):
        answer = http.post("/job/", json=with_fields(job, {"model_details": model}))
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["Retry-After"]) > 0
        return answer.json()["detail"]

    nobody = made(http, "s3", {"access_key_id": "a", "secret_access_key": CANARY, "endpoint_url": "http://127.0.0.1:9"})
    away = {"base_model": URI, "source_type": "s3", "ownership": "private", "secret_id": nobody}
    assert URI in detail(http, away)
    wrong_too = with_fields(job, {"model_details": away, "infra_config.gpu_type": "gtx"})
    assert list(fields(http.post("/job/", json=wrong_too))) == ["infra_config.gpu_type"]  # which no waiting mends

    class Hub(Server):
        def do_GET(self):
            self.answer({}, 503)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    online = build_app(settings.model_copy(update={"hub_offline": False}), store, Idle())
    with TestClient(online, headers=http.headers) as other:
        for url, said in ((serve(Hub), "answered 503"), ("http://127.0.0.1:9", "can't be reached")):
            template = url + "/{repo_id}/{revision}/{filename}"
            monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
            told = detail(other, {"base_model": "org/model"})
            assert told.startswith("org/model is not in the model mirror")
            assert said in told


@pytest.mark.parametrize("storage", ["s3", "gcs"])
@pytest.mark.parametrize("path", ["/job/", "/job/plan/"])
def test_a_models_storage_that_hangs_holds_nobody_up(http, job, storage, path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as never_answers:
        endpoint = f"http://127.0.0.1:{never_answers.getsockname()[1]}"
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", endpoint)
        if storage == "s3":
            secret = made(http, "s3", {"access_key_id": "a", "secret_access_key": CANARY, "endpoint_url": endpoint})
            away = {"base_model": URI, "source_type": "s3", "ownership": "private", "secret_id": secret}
        else:
            away = {"base_model": "gs://bucket/tiny", "source_type": "gcs", "ownership": "public"}
        began = time.monotonic()
        answer = http.post(path, json=with_fields(job, {"model_details": away}))
    assert (answer.status_code, "Retry-After" in answer.headers) == (503, True), answer.text
    assert "The storage is away" in answer.json()["detail"]
    assert time.monotonic() - began < 30  # with the patience of a training run it would be minutes


def test_training_goes_on_only_from_a_finished_job_of_the_same_org_and_base(http, job, settings, store):
    def insert(name, org=ORG, done=True, **changes):
        spec = JobSpec.model_validate(with_fields(job, {"experiment_name": name, "org": org} | changes))
        request_id = store.insert(spec, "queued")[0].request_id
        if done:
            store.start_attempt(request_id, 0, 1)
            store.finish(request_id, 1, Status.COMPLETED, message="done", output_model_path="s3://x/adapter")
        return request_id

    def submit(start, name="next"):
        return http.post("/job/", json=with_fields(job, {"experiment_name": name, START: start}))

    theirs = insert("theirs", OTHER_ORG)
    unknown = "00000000-0000-4000-8000-000000000000"
    assert fields(submit(theirs))[START]["message"] == fields(submit(unknown))[START]["message"] == "no such job in this org"
    assert "QUEUED" in fields(submit(insert("waiting", done=False)))[START]["message"]
    assert "is for meta/other" in fields(submit(insert("other-base", **{MODEL: "meta/other"})))[START]["message"]
    whole = {"train_config.train_type": "full", "model_details.quantization": None}
    assert "trained every weight" in fields(submit(insert("whole", **whole)))[START]["message"]
    for path in ("/etc", "../../other/adapter", "file:///etc"):
        assert "request_id" in fields(submit(path))[START]["message"]
    assert submit(insert("first")).status_code == 200
    for uri in ("s3://bucket/adapter", "gs://bucket/adapter/"):
        assert submit(uri, f"from-{uri[:2]}").status_code == 200


def test_all_that_a_run_leaves_is_among_the_artifacts_with_its_hash(settings, store, job, tmp_path):
    from serve_app.storage import artifacts

    folder = tmp_path / "runs" / ORG / "r"
    for name in ("adapter", "merged"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.safetensors").write_text(name)
    listed = {f"{n}_files": [{"name": "x.safetensors", "sha256": n, "size_bytes": 1}] for n in ("adapter", "merged")}
    (folder / "metrics.jsonl").write_text("{}")
    text = json.dumps(listed | {"records": [{"name": "metrics.jsonl", "sha256": "m"}]})
    assert {a["sha256"] for a in artifacts(settings, ORG, "r")} == {None}  # it isn't over
    (folder / "manifest.json").write_text(text)
    found = {a["name"]: a["sha256"] for a in artifacts(settings, ORG, "r")}
    records = {"metrics.jsonl": "m", "manifest.json": hashlib.sha256(text.encode()).hexdigest()}
    assert found == {"adapter/x.safetensors": "adapter", "merged/x.safetensors": "merged"} | records
    for damaged in (text[:-1], "[1]", '{"adapter_files": [{"name": 1}]}', ""):
        (folder / "manifest.json").write_text(damaged)
        hashes = {a["name"]: a["sha256"] for a in artifacts(settings, ORG, "r")}
        assert hashes == dict.fromkeys(found) | {"manifest.json": hashlib.sha256(damaged.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "idefics3", "vision_config": {"model_type": "idefics3_vision"}}, None),
        ({"model_type": "llama"}, "is none of the models that learn from images here, which are Idefics3"),
        ({"model_type": "llama"}, "for one that reads text alone, model_type is llm"),
        ({"model_type": "kosmos-2", "vision_config": {}}, "none of the models that learn from images"),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "none of the models that learn from images"),
        ({"model_type": ["llava"], "vision_config": 7}, "none of the models that learn from images"),
    ],
)
def test_a_vlm_job_is_told_at_once_that_its_base_is_none(http, job, settings, tmp_path, config, said):
    (tmp_path / "mirror/acme/model").mkdir(parents=True)
    (tmp_path / "mirror/acme/model/config.json").write_text(json.dumps(config))
    settings.model_mirror = str(tmp_path / "mirror")
    details = {MODEL: "acme/model", "model_details.model_type": "vlm", "dataset_details.dataset_type": "zip"}
    answer = http.post("/job/", json=with_fields(job, details))
    if said is None:
        assert answer.status_code == 200, answer.text
        return
    refused = fields(answer)
    assert list(refused) == [MODEL]
    assert said in refused[MODEL]["message"]
    assert {"idefics3", "qwen2_5_vl"} <= set(refused[MODEL]["allowed"])
    assert http.post("/job/", json=with_fields(job, {MODEL: "acme/model"})).status_code == 200
