"""The application as a Serve config has it, and below the path of a proxy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cryptography.fernet import Fernet
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema
from starlette.testclient import TestClient

from serve_app.app import build_app
from serve_app.auth import mint_token
from serve_app.cli.serve import _deploy
from serve_app.cluster import ON_HEAD
from serve_app.deployment import APPLICATION, build
from serve_app.settings import Settings, write_private
from tests.conftest import CANARY, ORG, Idle

CONFIG = yaml.safe_load((Path(__file__).parent.parent.parent / "deploy" / "serve.yaml").read_text())


def test_serve_accepts_the_config_and_builds_the_application_of_it():
    schema = ServeDeploySchema.model_validate(CONFIG)
    (app,) = schema.applications
    assert (app.name, app.route_prefix, app.import_path) == (APPLICATION, "/", "serve_app.deployment:build")
    assert schema.proxy_location == "HeadOnly"
    deployment = call_user_app_builder_with_args_if_necessary(build, app.args)._bound_deployment
    assert (deployment.name, deployment.num_replicas) == ("ingress", app.args["ingress_replicas"])
    assert deployment.ray_actor_options["resources"] == ON_HEAD


@pytest.mark.parametrize("args", [{"ingress_replica": 2}, {"ingress_replicas": 0}])
def test_arguments_that_are_none_are_named(args):
    with pytest.raises(ValueError, match=next(iter(args))):
        build(args)


def test_the_application_is_built_where_no_settings_are(tmp_path):
    code = "from serve_app.deployment import build; build({})"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TUNEYARD_")}
    env = clean | {"TUNEYARD_HOME": str(tmp_path / "nowhere"), "TUNEYARD_MAX_RUNNING_JOBS": "wrong", "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"jwt_secret": "weak"}, "TUNEYARD_JWT_SECRET must be at least 32 bytes"),
        ({"secret_key": None}, "TUNEYARD_SECRET_KEY isn't set"),
        ({"database_url": f"mysql://me:{CANARY}@127.0.0.1/tuneyard"}, "give postgresql+psycopg://"),
        ({"max_running_jobs": 0}, "TUNEYARD_MAX_RUNNING_JOBS"),
    ],
)
def test_settings_of_the_head_that_do_not_allow_a_service_are_named(tmp_path, monkeypatch, changes, said):
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path))
    good = {"jwt_secret": "x" * 32, "secret_key": Fernet.generate_key().decode(), "database_url": f"sqlite:///{tmp_path}/any.db"}
    chosen = {name: value for name, value in (good | changes).items() if value is not None}
    write_private(tmp_path / "settings.json", json.dumps(chosen))
    told = _deploy("127.0.0.1", 1)["error"]
    assert said in told
    assert CANARY not in told


@pytest.mark.parametrize("seen", ["/tuneyard", ""], ids=["kept", "stripped"])
def test_below_a_proxys_path_every_call_is_answered_and_the_document_says_where(seen, settings, store, monkeypatch):
    monkeypatch.setenv("TUNEYARD_ROOT_PATH", "/tuneyard")
    own = Settings.load()
    with TestClient(build_app(own, store, Idle()), raise_server_exceptions=False) as http:
        http.headers["Authorization"] = f"Bearer {mint_token(own, ORG, 'tester', 600)}"
        for path in ("/healthz", "/job/list/", "/job/list", "/openapi.json"):
            assert http.get(seen + path, params={"org_id": ORG} if "job" in path else {}).status_code == 200, path
        assert http.get(f"{seen}/openapi.json").json()["servers"] == [{"url": "/tuneyard"}]
        page = http.get(f"{seen}/docs").text
        assert all(path in page for path in ("url: '/tuneyard/openapi.json'", '"/tuneyard/docs/swagger-ui-bundle.js"'))
        assert http.get(f"{seen}/tuneyard/healthz").status_code == (404 if seen else 200)
        assert http.get(f"{seen}/nothing").json()["status"] == 404
        assert http.get("/tuneyardx/healthz").status_code == 404


@pytest.mark.parametrize("path", ["tuneyard", "/tuneyard/", "/a b", "https://host/tuneyard"])
def test_a_root_path_that_is_none_is_refused(path, settings, monkeypatch):
    monkeypatch.setenv("TUNEYARD_ROOT_PATH", path)
    with pytest.raises(ValueError, match="root_path"):
        Settings.load()
