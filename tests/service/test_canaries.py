"""Secrets are nowhere but where they belong: one of every kind is used by jobs that succeed, fail by it, or are killed, and then
looked for in all that the service says, writes and starts."""

import base64
import json
import os
import secrets
import tempfile
import threading
import urllib.parse
from pathlib import Path
from xml.sax.saxutils import escape

import httpx
import pytest

from serve_app.client import FINAL, ApiError
from serve_app.secret_types import TYPES
from tests.conftest import ORG, rows, serving
from tests.running import Running, members
from tests.train_loop.servers import Hub, Mlflow, Server, Wandb, google_account
from train_loop.scratch import PREFIX

pytestmark = pytest.mark.service
HP = "train_config.hyperparameters"
ARN = "arn:aws:secretsmanager:us-east-1:123456789012:secret:tuneyard/keys"
STATE = ("actors", "tasks", "workers", "jobs", "objects", "nodes", "runtime_envs", "placement_groups", "cluster_events")
PAGES = ("api/jobs/", "api/serve/applications/", *(f"api/v0/{what}?detail=1&limit=10000" for what in STATE))
OWN = {"settings.json", "up.json", "s3.json", "jwt.key", "secret.key"}  # the service's own, readable by their owner only
AT_AWS = ("account", "role")
READS = ("get", "events", "logs", "metrics", "artifacts")
WATCH_S = 0.5


def canary(kind):
    """A value of which some characters are written otherwise by each of base64, URLs and JSON."""
    return f'{kind}-{secrets.token_hex(16)}/+="\\&'


def forms(value):
    """How a value may be written down. Of its base64 inside that of something longer, what doesn't depend on its neighbours."""
    text, found = value.encode(), {"raw": value.encode(), "URL": urllib.parse.quote_plus(value).encode()}
    found["JSON"] = json.dumps(value)[1:-1].encode()
    found["JSON in JSON"] = json.dumps(json.dumps(value)[1:-1])[1:-1].encode()
    for shift in range(3):
        whole = (len(text) + shift) // 3 * 3 - shift
        found[f"base64 + {shift}"] = base64.b64encode(bytes(shift) + text[:whole])[4 if shift else 0 :]
    return found


class Canaries:
    """What is looked for, by name."""

    def __init__(self, values):
        self.signs = [(f"{name} ({form})", sign) for name, value in values.items() for form, sign in forms(value).items()]

    def within(self, content):
        return [name for name, sign in self.signs if sign in content]

    def in_files(self, *folders, but=frozenset()):
        """Those in the files of these folders, by path; and how many files that were."""
        found, count = {}, 0
        # Which doesn't mind that a folder is gone meanwhile.
        walked = (Path(place, name) for folder in folders for place, _, names in os.walk(folder) for name in names)
        for path in (p for p in walked if p.name not in but):
            try:
                content = path.read_bytes() if path.is_file() else b""
            except OSError:  # gone meanwhile
                continue
            count += 1
            if names := self.within(content):
                found[str(path)] = names
        return found, count

    def in_processes(self, instance):
        """Those on the command lines and in the environments of a service's processes."""
        found = {}
        for process in members(instance):
            for what in ("cmdline", "environ"):
                try:
                    content = Path(f"/proc/{process.pid}/{what}").read_bytes()
                except OSError:
                    continue
                if names := self.within(content):
                    found[f"{what} of {process.info['name']}"] = names
        return found


# --- servers that accept, or refuse and quote what they were sent ---


class Remembers:
    """Keeps all that it was sent, the Authorization apart from the rest."""

    def parse_request(self):
        read = super().parse_request()
        if read:
            headers = {k: v for k, v in self.headers.items() if k != "Authorization"}
            self.rest.append(f"{self.path} {headers}")
            self.heads.append(self.headers.get("Authorization"))
        return read

    def body(self):
        data = super().body()
        self.rest.append(data.decode(errors="replace"))
        return data


class PrivateHub(Remembers, Hub):
    """The hub with a model of which anyone gets the configuration, and nothing more."""

    def do_GET(self):
        if self.path.startswith("/acme/private/resolve/") and self.path.endswith("/config.json"):
            return self.answer({"model_type": "llama"})
        return super().do_GET()


class RememberingMlflow(Remembers, Mlflow):
    pass


class Refusing(Server):
    """S3 that refuses all keys."""

    def do_GET(self):
        self.body()
        said = escape(f"{self.path} {dict(self.headers)}")
        self.answer(f"<?xml version='1.0'?><Error><Code>InvalidAccessKeyId</Code><Message>{said}</Message></Error>".encode(), 403)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.do_GET()


class Aws(Server):
    """STS with the keys of a role, and Secrets Manager with keys."""

    def do_POST(self):
        asked = self.body().decode()
        if "GetSecretValue" in self.headers.get("X-Amz-Target", ""):
            return self.answer({"ARN": ARN, "Name": "keys", "SecretString": json.dumps(self.stored)})
        assert f"ExternalId={urllib.parse.quote_plus(self.external_id)}" in asked
        keys = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in self.role_keys.items())
        space = 'xmlns="https://sts.amazonaws.com/doc/2011-06-15/"'
        result = f"<AssumeRoleResult><Credentials>{keys}</Credentials></AssumeRoleResult>"
        self.answer(f"<AssumeRoleResponse {space}>{result}</AssumeRoleResponse>".encode(), Content_Type="text/xml")


class NoWayOut(Server):
    """A proxy to nowhere, so that Google isn't asked."""

    def do_CONNECT(self):
        self.answer({}, 502)


# --- what is planted, and the jobs that use it ---


class Planted:
    """The values of every kind of secret, the service, and the servers that they are for."""

    def __init__(self, folder, mirror, serve):
        self.refused, self.account, self.temporary, self.stored = map(_keys, ("refused", "account", "temporary", "stored"))
        self.tokens = {name: canary(name) for name in ("hub", "weights", "mlflow")}
        self.basic = {"username": f"user{secrets.token_hex(8)}", "password": canary("password")}
        self.wandb_keys = [secrets.token_hex(20), secrets.token_hex(20)]
        self.external_id = f"external/{secrets.token_hex(16)}"
        self.google = google_account("https://oauth2.googleapis.com")
        self.s3_url = serve(Refusing)
        jsonl = "".join(json.dumps(row) + "\n" for row in rows(60)).encode()
        self.hub = PrivateHub.of(files={"rows.jsonl": jsonl}, authorization=f"Bearer {self.tokens['hub']}", rest=[], heads=[])
        self.mlflow = RememberingMlflow.new(authorization=f"Bearer {self.tokens['mlflow']}", rest=[], heads=[])
        known = base64.b64encode(f"api:{self.wandb_keys[0]}".encode()).decode()
        self.wandb = Wandb.new(key=self.wandb_keys[0], authorization=f"Basic {known}")
        self.urls = {"mlflow": serve(self.mlflow), "away": serve(Mlflow.new(down=503)), "wandb": serve(self.wandb)}
        names = ("AccessKeyId", "SecretAccessKey", "SessionToken")
        role_keys = dict(zip(names, self.temporary.values(), strict=True)) | {"Expiration": "2099-01-01T00:00:00Z"}
        stored = self.stored | {"endpoint_url": self.s3_url}
        identity, self.user = folder / "identity", folder / "user"
        identity.write_text("[default]\naws_access_key_id = own\naws_secret_access_key = own\n")
        self.user.mkdir()
        self.service = Running(
            folder / "home",
            mirror,
            HOME=str(self.user),
            HF_ENDPOINT=serve(self.hub),
            HF_HUB_OFFLINE="0",
            HTTPS_PROXY=serve(NoWayOut),
            NO_PROXY="127.0.0.1,localhost",
            AWS_SHARED_CREDENTIALS_FILE=str(identity),
            TUNEYARD_HUB_OFFLINE="false",
            TUNEYARD_READY_WORKERS="0",  # so that each process is started for its job, with all that it is given
            TUNEYARD_AWS_ENDPOINT_URL=serve(Aws.of(stored=stored, external_id=self.external_id, role_keys=role_keys)),
            TUNEYARD_ALLOWED_SECRET_ARNS=json.dumps(["*"]),
        )
        sets = {"refused": self.refused, "account": self.account, "temporary": self.temporary, "stored": self.stored}
        pem = self.google["private_key"]
        self.values = (
            {f"{of} {name}": value for of, values in sets.items() for name, value in values.items()}
            | {f"{name} token": value for name, value in self.tokens.items()}
            | {f"mlflow {name}": value for name, value in self.basic.items()}
            | {f"wandb key {i}": key for i, key in enumerate(self.wandb_keys)}
            | {f"private key, line {i}": line for i, line in enumerate(pem.splitlines()[1:-1])}
            | {"private key": pem, "external id": self.external_id}
        )
        self.canaries = Canaries(self.values)
        self.kinds, self.answers, self.in_files, self.in_processes = set(), [], {}, {}

    def secret(self, type_, **data):
        self.kinds.add(type_)
        return self.service.client.create_secret(ORG, f"{type_}-{len(self.kinds)}", type_, data)["secret_id"]

    def jobs(self):
        """Fields of the jobs, by what becomes of them."""
        of_s3 = {"dataset_details.dataset_path": "s3://bucket/rows.jsonl"}
        of_hub = {"dataset_details.dataset_path": "org/rows", "dataset_details.source_type": "hf"}
        readable = of_hub | {"dataset_details.secret_id": self.secret("hf", token=self.tokens["hub"])}
        weights = self.secret("hf", token=self.tokens["weights"])
        model = {"base_model": "acme/private", "source_type": "hf", "ownership": "private", "secret_id": weights}
        role = self.secret("aws", role_arn="arn:aws:iam::123456789012:role/reader", external_id=self.external_id)
        wandb = [self.secret("wandb", api_key=k, base_url=self.urls["wandb"], project="project") for k in self.wandb_keys]
        trackers = [
            self.secret("mlflow", tracking_uri=self.urls["mlflow"], token=self.tokens["mlflow"]),
            self.secret("mlflow", tracking_uri=self.urls["away"], **self.basic),
            *wandb,
        ]
        gcs = self.secret("gcs", service_account_json=json.dumps(self.google))
        of_gcs = {"dataset_path": "gs://bucket/a", "source_type": "gcs", "ownership": "private", "secret_id": gcs}
        quick = {f"{HP}.max_steps": 12, f"{HP}.save_steps": 2, f"{HP}.dataloader_num_workers": 0}
        return {
            "killed": readable | {"train_config.report_to": trackers} | quick,
            "refused": of_s3 | {"dataset_details.secret_id": self.secret("s3", **self.refused, endpoint_url=self.s3_url)},
            "stored-at-aws": of_s3 | {"dataset_details.secret_id": ARN},
            "account": of_s3 | {"dataset_details.secret_id": self.secret("aws", **self.account)},
            "role": of_s3 | {"dataset_details.secret_id": role},
            "google": {"dataset_details": of_gcs},
            "not-on-the-hub": of_hub | {"dataset_details.secret_id": weights},
            "no-weights": readable | {"model_details": model},
        }

    def run(self):
        """The jobs, to their ends, with a look at the files of a running one meanwhile."""
        service, changes = self.service, self.jobs()
        specs = {name: service.job(name, fields) for name, fields in changes.items()}
        ids = {name: service.client.submit(spec)["request_id"] for name, spec in specs.items()}
        bucket = {"base_model": "s3://bucket/model", "source_type": "s3", "ownership": "private"}
        bucket["secret_id"] = changes["refused"]["dataset_details.secret_id"]
        self.refusal(service.client.submit, service.job("bucket", {"model_details": bucket}))
        self.answers.append(service.client.plan(specs["killed"]))
        for name in ("refused", "google", "no-weights"):
            self.refusal(service.client.plan, specs[name])
        for name in AT_AWS:  # which refuses them or, where there is no internet, doesn't answer, and is waited for
            job = service.wait(
                ids[name], lambda job: job["status"] in FINAL or "storage_away" in service.describe(job["request_id"], job)
            )
            if job["status"] not in FINAL:
                service.client.cancel(ids[name], ORG)
        service.wait(ids["killed"], lambda job: job["status"] in FINAL or job["step"] >= 4)
        self.in_files = self.canaries.in_files(*Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))[0]
        (worker,) = [p for p in members(service.state()["instance"]) if "RayTrainWorker" in p.info["cmdline"][0]]
        worker.kill()
        self.jobs_by_name = {name: service.wait(request_id) for name, request_id in ids.items()}

    def refusal(self, ask, spec):
        with pytest.raises(ApiError) as caught:
            ask(spec)
        self.answers.append([str(caught.value), caught.value.errors])

    def watch(self, done):
        while not done.wait(WATCH_S):
            self.in_processes.update(self.canaries.in_processes(self.service.state()["instance"]))


def _keys(kind):
    ids = {"access_key_id": f"{kind}id{secrets.token_hex(8)}", "secret_access_key": canary(f"{kind}-secret")}
    return ids | {"session_token": canary(f"{kind}-session")}


@pytest.fixture(scope="module")
def planted(tmp_path_factory, mirror):
    with serving() as serve:
        made, done = Planted(tmp_path_factory.mktemp("planted"), mirror, serve), threading.Event()
        made.service.start()
        watcher = threading.Thread(target=made.watch, args=[done])
        watcher.start()
        try:
            made.run()
            yield made
        finally:
            done.set()
            watcher.join()
            made.service.down()


@pytest.fixture(scope="module")
def all_canaries(planted):
    """With the service's own."""
    home = planted.service.home
    own = {name: (home / name).read_text() for name in ("jwt.key", "secret.key")} | {"bearer token": planted.service.token}
    own["S3 key"] = planted.service.keys["secret_access_key"]
    return Canaries(planted.values | own)


# --- where they must not be ---


def test_every_kind_was_used_and_the_jobs_ended_as_they_had_to(planted):
    assert planted.kinds == set(TYPES)
    ended = {name: (job["status"], job["error_code"]) for name, job in planted.jobs_by_name.items()}
    refused = ("FAILED", "storage_access_denied")
    assert {ended.pop(name) for name in AT_AWS} <= {refused, ("CANCELED", None)}
    assert ended == {
        "killed": ("COMPLETED", None),
        **dict.fromkeys(("refused", "stored-at-aws", "google"), refused),
        "not-on-the-hub": ("FAILED", "object_not_found"),
        "no-weights": ("FAILED", "model_error"),
    }
    assert planted.jobs_by_name["killed"]["attempt"] == 2
    told = planted.service.describe(planted.jobs_by_name["killed"]["request_id"], {})
    assert "MLflow at 127.0.0.1 answers with 503" in told
    assert "Weights & Biases refuses what it is sent (401)" in told


def test_a_server_is_given_its_secret_in_the_authorization_and_nowhere_else(planted):
    for server, token in ((planted.mlflow, planted.tokens["mlflow"]), (planted.hub, planted.tokens["hub"])):
        assert f"Bearer {token}" in server.heads
        assert planted.canaries.within("\n".join(filter(None, server.heads)).encode())  # this is how they are found
        assert not planted.canaries.within("\n".join(server.rest).encode())


def test_no_answer_shows_a_secret(planted):
    service = planted.service
    with httpx.Client(base_url=service.up["url"], headers={"Authorization": f"Bearer {service.token}"}, trust_env=False) as http:
        asked = [("/job/list/", {}), ("/secret/list/", {})]
        for job in planted.jobs_by_name.values():
            asked += [(f"/job/{what}/", {"request_id": job["request_id"]}) for what in READS]
        for path, query in asked:
            answer = http.get(path, params={"org_id": ORG} | query)
            assert not planted.canaries.within(answer.content), (path, answer.text)
    assert not planted.canaries.within(json.dumps(planted.answers).encode())


def test_no_process_is_given_a_secret(planted):
    assert planted.in_processes == {}


def test_no_file_holds_a_secret(planted, all_canaries):
    home, ray_dir = planted.service.home, Path(planted.service.state()["ray_dir"])
    assert planted.in_files == {}
    assert planted.canaries.in_files(home, planted.user)[0] == {}
    found, count = all_canaries.in_files(home, ray_dir, planted.user, but=OWN)
    assert found == {}
    assert count > 100
    assert all((p.stat().st_mode & 0o077) == 0 for p in home.rglob("*") if p.name in OWN)


def test_no_object_in_storage_holds_a_secret(planted, all_canaries):
    s3, found, count = planted.service.s3(), {}, 0
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket="tuneyard"):
        for entry in page["Contents"]:
            count += 1
            if names := all_canaries.within(s3.get_object(Bucket="tuneyard", Key=entry["Key"])["Body"].read()):
                found[entry["Key"]] = names
    assert found == {}
    assert count > 20


@pytest.mark.parametrize("page", PAGES)
def test_the_dashboard_shows_no_secret(planted, all_canaries, page):
    answer = httpx.get(f"{planted.service.up['dashboard_url']}/{page}")
    assert answer.status_code == 200
    assert all_canaries.within(answer.content) == []
