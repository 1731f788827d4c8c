"""Every kind of secret: what is taken, what a run gets, and that no value ever shows. AWS is a local moto server."""

import json
import pathlib
import traceback
import urllib.request

import boto3
import pytest
import sqlalchemy as sa
from cryptography.fernet import Fernet
from moto.server import ThreadedMotoServer
from moto.sts.models import sts_backends
from starlette.testclient import TestClient

from serve_app import aws
from serve_app.app import build_app
from serve_app.auth import mint_token
from serve_app.aws import AwsIdentity
from serve_app.errors import ApiError
from serve_app.secret_types import TYPES, AwsKeys, AwsRole, parse, parse_untyped
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.store.tables import secrets
from tests.conftest import CANARY, ORG, OTHER_ORG, Idle, fields, with_fields
from train_loop.data.sources import Credentials
from train_loop.errors import DatasetError

KEYS = {"access_key_id": "AK" + CANARY, "secret_access_key": CANARY}
ROLE_ARN = "arn:aws:iam::123456789012:role/datasets"
ROLE = {"role_arn": ROLE_ARN, "external_id": CANARY, "region": "eu-west-1"}
ARN = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:"
PEM = f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----\n"
ACCOUNT = {"type": "service_account", "client_email": "a@b.iam.gserviceaccount.com", "private_key": PEM}
GCS = {"service_account_json": json.dumps(ACCOUNT)}
HF = {"token": "hf_" + CANARY}
MLFLOW = {"tracking_uri": "http://127.0.0.1:5000/below"}
WANDB = {"api_key": CANARY, "project": "project"}
SECRET = "dataset_details.secret_id"


@pytest.fixture(scope="module")
def moto():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def cloud(moto, monkeypatch):
    """The service's identity at a local AWS, whatever this machine is at the real one."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASERVICE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "service" + CANARY)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    yield moto
    enforce_permissions(moto, "inf")
    urllib.request.urlopen(urllib.request.Request(f"{moto}/moto-api/reset", method="POST")).read()


def enforce_permissions(moto, after="0"):
    """Have moto judge by IAM's rules, as AWS does."""
    url, plain = f"{moto}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(url, data=after.encode(), headers=plain, method="POST")).read()


def put(cloud, name, text):
    """Put a secret into Secrets Manager; its ARN."""
    client = boto3.client("secretsmanager", region_name="eu-west-1", endpoint_url=cloud)
    return client.create_secret(Name=name, **({"SecretString": text} if isinstance(text, str) else {"SecretBinary": text}))["ARN"]


@pytest.fixture
def vault(settings, store, cloud):
    allowed = [f"{ARN}tuneyard/{{org}}/*"]
    return SecretVault(store, settings.secret_key.get_secret_value(), ["storage.example"], allowed, AwsIdentity(cloud))


def shown(error):
    """Everything that a log or an answer could make of an exception, with all it carries along."""
    seen, text = set(), ""
    todo = [error]
    while todo:
        at = todo.pop()
        if at is None or id(at) in seen:
            continue
        seen.add(id(at))
        text += f"{at!r} {at} {at.args} {vars(at)} {''.join(traceback.format_exception(at))}"
        todo += [at.__context__, at.__cause__]
    return text


def refused(vault, secret_id, org=ORG):
    """The error of `reveal`, which holds no canary."""
    with pytest.raises(DatasetError) as caught:
        vault.reveal(org, secret_id)
    assert CANARY not in shown(caught.value)
    assert "Traceback" not in caught.value.message
    assert caught.value.field == SECRET
    return caught.value


# --- what is taken ---


@pytest.mark.parametrize(
    ("type_", "data"),
    [
        ("aws", KEYS),
        ("aws", KEYS | {"session_token": CANARY, "region": "us-west-2"}),
        ("aws", KEYS | {"session_token": None, "region": ""}),
        ("aws", ROLE),
        ("aws", {"role_arn": ROLE_ARN}),
        ("s3", KEYS | {"endpoint_url": "http://127.0.0.1:9", "region": "garage"}),
        ("s3", ROLE),
        ("s3", {"role_arn": ROLE_ARN, "endpoint_url": "http://127.0.0.1:9"}),
        ("gcs", GCS),
        ("hf", HF),
        ("mlflow", MLFLOW),
        ("mlflow", MLFLOW | {"username": "me", "password": CANARY, "experiment": "an experiment"}),
        ("mlflow", MLFLOW | {"token": CANARY}),
        ("wandb", WANDB),
        ("wandb", WANDB | {"entity": "team", "base_url": "http://127.0.0.1:8080"}),
    ],
)
def test_every_kind_is_stored_listed_and_never_shown(http, tmp_path, type_, data):
    made = http.post("/secret/", json={"org": ORG, "name": "n", "type": type_, "data": data})
    assert made.status_code == 200, made.text
    assert made.json()["type"] == type_
    listed = http.get("/secret/list/", params={"org_id": ORG})
    assert [s["secret_id"] for s in listed.json()["secrets"]] == [made.json()["secret_id"]]
    assert CANARY not in made.text + listed.text
    assert not [p for p in tmp_path.iterdir() if p.is_file() and CANARY.encode() in p.read_bytes()]


def account(**changes):
    return {"service_account_json": json.dumps({k: v for k, v in (ACCOUNT | changes).items() if v is not None})}


@pytest.mark.parametrize(
    ("type_", "data", "field", "said"),
    [
        ("s3", {"access_key_id": "a"}, "data.secret_access_key", "required"),
        ("s3", KEYS | {"secret_access_key": ""}, "data.secret_access_key", "required"),
        ("s3", KEYS | {"secret_access_key": None}, "data.secret_access_key", "required"),
        ("s3", KEYS | {"secret_access_key": [CANARY]}, "data.secret_access_key", "string"),
        ("s3", KEYS | {"secret_access_key": {"a": CANARY}}, "data.secret_access_key", "string"),
        ("s3", KEYS | {"secret_access_key": CANARY + "\n"}, "data.secret_access_key", "line breaks"),
        ("s3", KEYS | {"secret_access_key": CANARY * 1000}, "data.secret_access_key", "8192"),
        ("s3", KEYS | {"endpoint_url": "http://169.254.169.254"}, "data.endpoint_url", "operator's list"),
        ("s3", KEYS | {"endpoint_url": "http://evil.example"}, "data.endpoint_url", "TUNEYARD_ALLOWED_S3_ENDPOINTS"),
        ("s3", KEYS | {"endpoint_url": "file:///etc"}, "data.endpoint_url", "operator's list"),
        ("s3", KEYS | {"endpoint_url": f"http://:{CANARY}@127.0.0.1"}, "data.endpoint_url", "operator's list"),
        ("s3", KEYS | {"region": "evil.example/"}, "data.region", "not an AWS region"),
        ("s3", KEYS | {"region": "a b", "endpoint_url": "http://127.0.0.1"}, "data.region", "letters"),
        ("s3", KEYS | {"acess_key_id": CANARY}, "data.acess_key_id", "did you mean access_key_id?"),
        ("s3", KEYS | {"acess_key_id": None}, "data.acess_key_id", "unknown field"),
        ("s3", ROLE | KEYS, "data.role_arn", "not both"),
        ("s3", ROLE | {"role_arn": CANARY}, "data.role_arn", "arn:aws:iam::"),
        ("s3", ROLE | {"endpoint_url": "http://evil.example"}, "data.endpoint_url", "TUNEYARD_ALLOWED_S3_ENDPOINTS"),
        ("s3", ROLE | {"endpoint_url": "http://127.0.0.1:9", "region": "garage"}, "data.region", "us-west-2"),
        ("aws", KEYS | {"endpoint_url": "http://127.0.0.1"}, "data.endpoint_url", "unknown field"),
        ("aws", KEYS | {"region": CANARY}, "data.region", "us-west-2"),
        ("aws", KEYS | ROLE, "data.role_arn", "not both"),
        ("aws", {"external_id": CANARY}, "data.role_arn", "required"),
        ("aws", {"role_arn": CANARY}, "data.role_arn", "arn:aws:iam::"),
        ("aws", {"role_arn": ROLE_ARN, "external_id": CANARY + "!"}, "data.external_id", "letters"),
        ("aws", {}, "data.access_key_id", "required"),
        ("gcs", {}, "data.service_account_json", "required"),
        ("gcs", {"service_account_json": ACCOUNT}, "data.service_account_json", "string"),
        ("gcs", {"service_account_json": CANARY}, "data.service_account_json", "JSON text"),
        ("gcs", {"service_account_json": "[" * 8000}, "data.service_account_json", "JSON text"),
        ("gcs", account(type=CANARY), "data.service_account_json", "service_account"),
        ("gcs", account(client_email=None), "data.service_account_json", "client_email"),
        ("gcs", account(private_key=CANARY), "data.service_account_json", "PEM"),
        ("gcs", account(token_uri="http://169.254.169.254/"), "data.service_account_json", "token_uri"),
        ("gcs", account(universe_domain="evil.example"), "data.service_account_json", "universe_domain"),
        ("hf", {"access_key": CANARY, "token": "t"}, "data.access_key", "unknown field"),
        ("hf", {"token": CANARY + " x"}, "data.token", "spaces"),
        ("mlflow", {"token": CANARY}, "data.tracking_uri", "required"),
        ("mlflow", {"tracking_uri": "http://evil.example"}, "data.tracking_uri", "TUNEYARD_ALLOWED_TRACKER_ENDPOINTS"),
        ("mlflow", {"tracking_uri": "http://169.254.169.254/latest"}, "data.tracking_uri", "operator's list"),
        ("mlflow", {"tracking_uri": f"http://me:{CANARY}@127.0.0.1"}, "data.tracking_uri", "operator's list"),
        ("mlflow", {"tracking_uri": "file:///tmp"}, "data.tracking_uri", "operator's list"),
        ("mlflow", MLFLOW | {"username": CANARY}, "data.password", "goes with"),
        ("mlflow", MLFLOW | {"password": CANARY}, "data.username", "goes with"),
        ("mlflow", MLFLOW | {"token": CANARY, "username": "a", "password": CANARY}, "data.token", "not both"),
        ("wandb", {"api_key": CANARY}, "data.project", "required"),
        ("wandb", WANDB | {"project": "a/b"}, "data.project", "pattern"),
        ("wandb", WANDB | {"base_url": "http://metadata.google.internal"}, "data.base_url", "operator's list"),
        ("azure", KEYS, "type", "unknown type of secret: it must be aws, gcs, hf, mlflow, s3 or wandb"),
        ("gcp", KEYS, "type", "did you mean gcs?"),
    ],
)
def test_bad_data_is_refused_by_field_and_without_its_values(http, type_, data, field, said):
    answer = http.post("/secret/", json={"org": ORG, "name": "n", "type": type_, "data": data})
    found = fields(answer)
    assert said in found[field]["message"], found
    assert CANARY not in answer.text
    assert http.get("/secret/list/", params={"org_id": ORG}).json() == {"secrets": []}


def test_all_wrong_fields_of_a_secret_come_at_once(http):
    answer = http.post(
        "/secret/", json={"org": ORG, "name": "n", "type": "aws", "data": {"region": CANARY, "acess_key_id": CANARY}}
    )
    of_data = {"data.access_key_id", "data.secret_access_key", "data.region", "data.acess_key_id"}
    assert set(fields(answer)) == of_data
    data = {"region": CANARY, "acess_key_id": CANARY}
    answer = http.post("/secret/", json={"org": "x", "name": "", "type": "aws", "data": data, "more": CANARY})
    assert set(fields(answer)) == {"org", "name", "more"} | of_data
    assert CANARY not in answer.text
    wrong = {"org": None, "name": [], "type": "gcp", "data": data}
    assert set(fields(http.post("/secret/", json=wrong))) == {"org", "name", "type"}
    assert set(fields(http.post("/secret/", json={}))) == {"org", "name", "type", "data"}


def test_openapi_and_the_docs_name_the_fields_that_are_checked(http):
    body = http.get("/openapi.json").json()["paths"]["/secret/"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["type"]["enum"] == sorted(TYPES)
    models = [model for models in TYPES.values() for model in models]
    described = {s["title"]: set(s["properties"]) for s in body["properties"]["data"]["anyOf"]}
    assert described == {m.__name__: set(m.model_fields) for m in models}
    page = (pathlib.Path(__file__).parents[2] / "docs/secrets.md").read_text()
    assert [name for m in models for name in m.model_fields if f"`{name}`" not in page] == []


def test_secrets_are_sealed_at_rest_and_can_be_deleted(http, settings, secret_id, tmp_path):
    assert not [p for p in tmp_path.iterdir() if p.is_file() and CANARY.encode() in p.read_bytes()]
    assert http.delete(f"/secret/{secret_id}", params={"org_id": ORG}).status_code == 200
    assert http.delete(f"/secret/{secret_id}", params={"org_id": ORG}).status_code == 404
    assert settings.jwt_secret.get_secret_value() not in repr(settings)


def test_secret_names_are_text(http):
    data = {"access_key_id": "a", "secret_access_key": "b"}
    body = json.dumps({"org": ORG, "name": "\ud800", "type": "s3", "data": data})
    assert http.post("/secret/", content=body, headers={"content-type": "application/json"}).status_code == 422


# --- what a submission says ---


@pytest.mark.parametrize(("type_", "data"), [("hf", HF), ("gcs", GCS)])
def test_a_secret_that_can_not_open_the_dataset_is_said_at_submit(http, job, type_, data):
    made = http.post("/secret/", json={"org": ORG, "name": "n", "type": type_, "data": data}).json()
    found = fields(http.post("/job/", json=with_fields(job, {SECRET: made["secret_id"]})))
    assert list(found) == [SECRET]
    assert f"of type {type_}" in found[SECRET]["message"]
    assert found[SECRET]["allowed"] == ["aws", "s3"]


def test_an_arn_is_judged_by_the_operators_list_alone(settings, store, job, cloud):
    settings = settings.model_copy(
        update={"allowed_secret_arns": [f"{ARN}tuneyard/{{org}}/*"], "aws_endpoint_url": "http://127.0.0.1:1"}
    )
    with TestClient(build_app(settings, store, Idle())) as http:
        http.headers["Authorization"] = f"Bearer {mint_token(settings, ORG, 'tester', 600)}"

        def submit(secret_id, name):
            return http.post("/job/", json=with_fields(job, {SECRET: secret_id, "experiment_name": name}))

        there = put(cloud, f"tuneyard/{OTHER_ORG}/keys", json.dumps(KEYS))
        answers = [
            submit(arn, "refused") for arn in (there, there[:-1] + "_", "arn:aws:s3:::bucket", f"{ARN}tuneyard/{ORG}/a:json")
        ]
        assert len({fields(a)[SECRET]["message"] for a in answers}) == 1
        unknown = fields(submit("unknown", "refused"))[SECRET]["message"]
        assert fields(answers[0])[SECRET]["message"].startswith(unknown)
        assert "TUNEYARD_ALLOWED_SECRET_ARNS" in fields(answers[0])[SECRET]["message"]
        assert submit(f"{ARN}tuneyard/{ORG}/whether-it-is-there-or-not", "accepted").status_code == 200


def test_no_arn_is_allowed_by_default(http, job):
    assert SECRET in fields(http.post("/job/", json=with_fields(job, {SECRET: f"{ARN}tuneyard/{ORG}/keys"})))


def test_a_secret_sealed_with_another_key_is_said_at_submit_with_all_else(http, store, secret_id, job):
    with store.write() as tx:
        tx.execute(sa.update(secrets).values(ciphertext=Fernet(Fernet.generate_key()).encrypt(b"{}")))
    found = fields(http.post("/job/", json=with_fields(job, {"infra_config.gpu_type": "gtx"})))
    assert set(found) == {SECRET, "infra_config.gpu_type"}
    assert "TUNEYARD_SECRET_KEY" in found[SECRET]["message"]


# --- what a run gets ---


def test_keys_come_back_as_they_were_given(vault):
    given = KEYS | {"session_token": "t", "region": "garage", "endpoint_url": "https://storage.example:9000"}
    got = vault.reveal(ORG, vault.create(ORG, "n", "s3", given).secret_id)
    assert got == given
    assert Credentials.from_secret(got) == Credentials(**given)


AT_ENDPOINT = {"endpoint_url": "https://storage.example"}


@pytest.mark.parametrize(("type_", "more"), [("aws", {}), ("s3", {}), ("s3", AT_ENDPOINT)])
def test_a_role_becomes_temporary_keys_of_the_orgs_own_session(vault, cloud, type_, more):
    got = vault.reveal(ORG, vault.create(ORG, "n", type_, ROLE | more).secret_id)
    assert set(got) == {"access_key_id", "secret_access_key", "session_token", "region", *more}
    assert more.items() <= got.items()
    keys = Credentials.from_secret(got)
    asked = boto3.client(
        "sts",
        endpoint_url=cloud,
        region_name=keys.region,
        aws_access_key_id=keys.access_key_id,
        aws_secret_access_key=keys.secret_access_key,
        aws_session_token=keys.session_token,
    ).get_caller_identity()
    assert asked["Arn"] == f"arn:aws:sts::123456789012:assumed-role/datasets/tuneyard-{ORG}"


def test_a_roles_external_id_reaches_sts_and_only_where_there_is_one(vault, cloud):
    for role in (ROLE, {"role_arn": ROLE_ARN, "region": "eu-west-1"}):
        vault.reveal(ORG, vault.create(ORG, "n", "aws", role).secret_id)
    assumed = sts_backends["123456789012"]["aws"].assumed_roles
    assert [role.external_id for role in assumed] == [CANARY, None]


def test_temporary_keys_are_kept_until_shortly_before_they_expire(vault, monkeypatch):
    mine = vault.create(ORG, "n", "aws", ROLE).secret_id
    theirs = vault.create(OTHER_ORG, "n", "aws", ROLE).secret_id
    first = vault.reveal(ORG, mine)
    assert vault.reveal(ORG, mine) == first
    assert vault.reveal(OTHER_ORG, theirs) != first
    monkeypatch.setattr(aws, "REFRESH_BEFORE_S", 3601)
    assert vault.reveal(ORG, mine) != first


def test_a_vault_asks_for_a_roles_keys_once(store, cloud, settings, monkeypatch):
    monkeypatch.setenv("TUNEYARD_AWS_ENDPOINT_URL", cloud)
    vault = SecretVault.from_settings(store, Settings.load())  # as a job actor has it, for all of its workers
    role = vault.create(ORG, "n", "aws", ROLE).secret_id
    keys = vault.reveal(ORG, role)
    assert keys["session_token"]
    assert vault.reveal(ORG, role) == keys


@pytest.mark.parametrize("data", [KEYS, KEYS | AT_ENDPOINT, ROLE, ROLE | AT_ENDPOINT], ids=["aws", "s3", "role", "s3-role"])
def test_an_arn_gives_the_keys_that_secrets_manager_holds(vault, cloud, data):
    arn = put(cloud, f"tuneyard/{ORG}/keys", json.dumps(data))
    got = vault.reveal(ORG, arn)
    assert "session_token" in got if "role_arn" in data else got == data
    assert got.get("endpoint_url") == data.get("endpoint_url")


# --- how it fails ---


def test_a_role_must_be_on_the_operators_list_when_stored_and_when_used(settings, store, cloud):
    def vault(*allowed):
        return SecretVault(store, settings.secret_key.get_secret_value(), [], ["*"], AwsIdentity(cloud), allowed)

    role = {"role_arn": f"arn:aws:iam::123456789012:role/of-{ORG}"}
    made = vault("arn:aws:iam::*:role/of-{org}").create(ORG, "n", "aws", role).secret_id
    with pytest.raises(ApiError) as caught:
        vault("arn:aws:iam::*:role/of-{org}").create(OTHER_ORG, "n", "aws", role)
    assert [e["field"] for e in caught.value.errors] == ["data.role_arn"]
    assert "TUNEYARD_ALLOWED_ROLE_ARNS" in caught.value.detail
    assert refused(vault(), made).code == "role_not_allowed"
    by_s3 = vault("arn:aws:iam::*:role/of-{org}").create(ORG, "n", "s3", role).secret_id
    assert refused(vault(), by_s3).code == "role_not_allowed"
    held = put(cloud, "any", json.dumps(role))  # nor by way of Secrets Manager
    assert refused(vault("arn:aws:iam::*:role/of-{org}"), held, OTHER_ORG).code == "role_not_allowed"
    assert settings.allowed_role_arns == ["*"]


def test_an_arn_is_judged_again_when_it_is_used(vault, cloud):
    arn = put(cloud, f"tuneyard/{OTHER_ORG}/keys", json.dumps(KEYS))
    assert refused(vault, arn).code == "secret_not_allowed"
    assert vault.reveal(OTHER_ORG, arn) == KEYS


@pytest.mark.parametrize(
    "text",
    [
        CANARY,
        json.dumps([CANARY]),
        "[" * 5000 + CANARY,
        json.dumps({CANARY: CANARY}),
        json.dumps(KEYS | {"password": CANARY}),
        json.dumps(KEYS | {"secret_access_key": 7}),
        json.dumps(HF),
        json.dumps(KEYS | {"region": CANARY}),
        CANARY.encode(),
    ],
)
def test_what_is_no_secret_in_secrets_manager_is_refused_without_its_contents(vault, cloud, text):
    assert refused(vault, put(cloud, f"tuneyard/{ORG}/keys", text)).code == "secret_malformed"


@pytest.mark.parametrize(
    "endpoint", ["http://169.254.169.254", "http://evil.example", f"http://a:{CANARY}@storage.example", "http://[x"]
)
def test_an_endpoint_in_secrets_manager_obeys_the_endpoint_rules(vault, cloud, endpoint):
    for name, data in (("keys", KEYS), ("role", ROLE)):
        arn = put(cloud, f"tuneyard/{ORG}/{name}", json.dumps(data | {"endpoint_url": endpoint}))
        assert refused(vault, arn).code == "endpoint_refused"


def test_a_secret_that_secrets_manager_has_not(vault):
    assert refused(vault, f"{ARN}tuneyard/{ORG}/gone").code == "secret_not_found"


@pytest.fixture
def powerless(cloud, monkeypatch):
    """The service is a user who may do nothing."""
    iam = boto3.client("iam", region_name="eu-west-1", endpoint_url=cloud)
    iam.create_user(UserName="service")
    key = iam.create_access_key(UserName="service")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])


def test_what_the_service_may_not_do_is_said_by_code(vault, cloud, powerless):
    role = vault.create(ORG, "n", "aws", ROLE).secret_id
    arn = put(cloud, f"tuneyard/{ORG}/keys", json.dumps(KEYS))
    enforce_permissions(cloud)
    assert refused(vault, role).code == "role_not_assumable"
    assert f"tuneyard-{ORG}" in refused(vault, role).message
    assert refused(vault, arn).code == "secret_access_denied"


def test_an_identity_that_aws_does_not_know(vault, cloud):
    enforce_permissions(cloud)
    assert refused(vault, vault.create(ORG, "n", "aws", ROLE).secret_id).code == "aws_identity_refused"


def test_a_service_without_an_identity(vault, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert refused(vault, vault.create(ORG, "n", "aws", ROLE).secret_id).code == "aws_identity_missing"
    assert refused(vault, f"{ARN}tuneyard/{ORG}/keys").code == "aws_identity_missing"


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "nonsense"])
def test_an_aws_that_does_not_answer(settings, store, cloud, endpoint):
    vault = SecretVault(store, settings.secret_key.get_secret_value(), [], [f"{ARN}*"], AwsIdentity(endpoint))
    assert refused(vault, vault.create(ORG, "n", "aws", ROLE).secret_id).code == "aws_unreachable"
    assert refused(vault, f"{ARN}keys").code == "aws_unreachable"


def test_a_secret_of_another_org_or_kind_or_none(vault):
    secret_id = vault.create(ORG, "n", "aws", KEYS).secret_id
    assert refused(vault, secret_id, OTHER_ORG).code == "secret_not_found"
    for type_, data in (("hf", HF), ("gcs", GCS)):
        assert refused(vault, vault.create(ORG, "n", type_, data).secret_id).code == "secret_wrong_type"


@pytest.mark.parametrize(("type_", "data", "source_type"), [("hf", HF, "hf"), ("gcs", GCS, "gcs")])
def test_a_token_or_service_account_opens_its_own_source_only(vault, type_, data, source_type):
    secret_id = vault.create(ORG, "n", type_, data).secret_id
    assert vault.reveal(ORG, secret_id, source_type) == data
    other = "gcs" if source_type == "hf" else "hf"
    with pytest.raises(DatasetError, match=f"doesn't open what is at {other}: name one of type {other}"):
        vault.reveal(ORG, secret_id, other)
    with pytest.raises(DatasetError, match="name one of type hf"):
        vault.reveal(ORG, vault.create(ORG, "n", "aws", KEYS).secret_id, "hf")


def test_another_key_opens_nothing_and_shows_nothing(vault, store):
    secret_id = vault.create(ORG, "n", "aws", KEYS).secret_id
    other = SecretVault(store, Fernet.generate_key().decode(), [])
    error = refused(other, secret_id)
    assert error.code == "secret_unreadable"
    assert "TUNEYARD_SECRET_KEY" in error.message


@pytest.mark.parametrize(
    "stored",
    [
        CANARY,
        f'{{"{CANARY}"',
        f'["{CANARY}"]',
        "null",
        json.dumps({CANARY: CANARY}),
        json.dumps(KEYS | {"region": CANARY}),
        "[" * 5000,
    ],
)
def test_malformed_stored_data_shows_nothing(vault, settings, store, stored):
    secret_id = vault.create(ORG, "n", "aws", KEYS).secret_id
    sealed = Fernet(settings.secret_key.get_secret_value()).encrypt(stored.encode())
    with store.write() as tx:
        tx.execute(sa.update(secrets).values(ciphertext=sealed))
    assert refused(vault, secret_id).code == "secret_unreadable"
    with pytest.raises(DatasetError) as caught:
        vault.find(ORG, secret_id)
    assert CANARY not in shown(caught.value)


def test_no_repr_holds_a_value(vault, settings, cloud):
    parsed = [parse("aws", KEYS | {"session_token": CANARY}), parse("aws", ROLE), parse("gcs", GCS), parse("hf", HF)]
    parsed += [parse("s3", KEYS), parse_untyped(KEYS), parse_untyped(ROLE)]
    assert [type(p) for p in parsed[-2:]] == [AwsKeys, AwsRole]
    secret = vault.create(ORG, "n", "aws", ROLE)
    keys = Credentials.from_secret(vault.reveal(ORG, secret.secret_id))
    everything = [
        *parsed,
        secret,
        vault,
        keys,
        settings,
        vault.find(ORG, secret.secret_id),
        vault.list(ORG),
        vault._aws._sessions.keys(),
    ]
    text = " ".join(f"{o!r} {o}" for o in everything)
    assert CANARY not in text
    for value in (keys.access_key_id, keys.secret_access_key, keys.session_token, settings.secret_key.get_secret_value()):
        assert value not in text


def test_refused_data_is_in_no_part_of_the_error():
    for type_, data in [
        ("aws", KEYS | {"x": CANARY}),
        ("hf", {"token": [CANARY]}),
        ("gcs", account(type=CANARY)),
        (CANARY, KEYS),
    ]:
        with pytest.raises(ApiError) as caught:
            parse(type_, data)
        assert CANARY not in shown(caught.value)


def test_nothing_secret_is_logged(vault, cloud, caplog, capfd):
    caplog.set_level("DEBUG")
    arn = put(cloud, f"tuneyard/{ORG}/keys", json.dumps(KEYS))
    caplog.clear()
    assert vault.reveal(ORG, arn) == KEYS
    got = vault.reveal(ORG, vault.create(ORG, "n", "aws", ROLE).secret_id)
    said = caplog.text + "".join(capfd.readouterr())
    assert CANARY not in said
    assert got["secret_access_key"] not in said


# --- endpoints ---


@pytest.mark.parametrize(
    "endpoint",
    [
        *("http://169.254.169.254", "http://169.254.169.254.", "http://[::ffff:169.254.169.254]", "http://2852039166"),
        *("http://0xa9fea9fe", "http://0251.0376.0251.0376", "http://[fd00:ec2::254]", "http://metadata.google.internal"),
        *("http://METADATA.google.internal.:80", "http://100.100.100.200", "http://0.0.0.0", "http://[fe80::1]", "http://a@b"),
    ],
)
def test_no_spelling_of_a_metadata_address_is_an_endpoint(settings, store, endpoint):
    vault = SecretVault(store, settings.secret_key.get_secret_value(), ["*"])
    keys = {"access_key_id": "a", "secret_access_key": "b"}
    vault.create(ORG, "fine", "s3", keys | {"endpoint_url": "https://storage.example:9000"})
    with pytest.raises(ApiError) as refused:
        vault.create(ORG, "bad", "s3", keys | {"endpoint_url": endpoint})
    assert refused.value.errors[0]["field"] == "data.endpoint_url"


def test_a_name_that_stands_for_a_link_local_address_is_refused_when_it_is_used(settings, store, monkeypatch):
    vault = SecretVault(store, settings.secret_key.get_secret_value(), ["*"])
    keys = {"access_key_id": "a", "secret_access_key": "b", "endpoint_url": "http://innocent.example"}
    secret = vault.create(ORG, "n", "s3", keys)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("169.254.169.254", 0))])
    with pytest.raises(DatasetError, match=r"innocent\.example"):
        vault.reveal(ORG, secret.secret_id)


def test_a_tracker_s_secret_keeps_its_name(http):
    made = {"org": ORG, "name": "our tracker", "type": "mlflow", "data": {"tracking_uri": "http://127.0.0.1:5000"}}
    assert http.post("/secret/", json=made).json()["name"] == "our tracker"
    assert [s["name"] for s in http.get("/secret/list/", params={"org_id": ORG}).json()["secrets"]] == ["our tracker"]
