"""The HTTP interface over a real store; nothing runs the jobs here."""

import re
import shutil
from functools import cache

import pytest
import sqlalchemy as sa
from cryptography.fernet import Fernet
from starlette.testclient import TestClient

from serve_app.app import build_app
from serve_app.auth import mint_token
from serve_app.settings import Settings
from serve_app.store.jobs import JobStore
from tests.conftest import CANARY, DOCUMENTED, ORG, TINY, Idle, postgres_server, with_fields


@pytest.fixture
def settings(tmp_path, mirror, monkeypatch):
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path))
    monkeypatch.setenv("TUNEYARD_MODEL_MIRROR", str(mirror))
    monkeypatch.setenv("TUNEYARD_EMBEDDED", "true")
    monkeypatch.setenv("TUNEYARD_HUB_OFFLINE", "true")
    monkeypatch.setenv("TUNEYARD_MAX_WORKERS", "8")
    Settings.load().prepare_embedded_keys()
    return Settings.load()


@pytest.fixture(scope="session")
def postgres():
    """The URL of a real PostgreSQL, empty between tests."""
    with postgres_server() as server:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture(scope="session")
def empty_sqlite(tmp_path_factory):
    """The file of an empty store: to copy it takes a hundredth of the time of all the steps of its schema."""
    path = tmp_path_factory.mktemp("sqlite") / "empty.db"
    store = JobStore.open(f"sqlite:///{path}")
    store.migrate()
    store.engine.dispose()
    return path


@pytest.fixture
def store(request, settings, empty_sqlite):
    """An empty store: SQLite, or what the test is parametrised with."""
    on_postgres = getattr(request, "param", "sqlite") == "postgresql"
    if on_postgres:
        store = JobStore.open(request.getfixturevalue("postgres"))
        store.migrate()
    else:
        shutil.copy(empty_sqlite, settings.home / "tuneyard.db")
        store = JobStore.open(settings.database_url)
    yield store
    if on_postgres:
        with store.write() as db:
            db.execute(sa.text("DROP SCHEMA public CASCADE"))
            db.execute(sa.text("CREATE SCHEMA public"))
    store.engine.dispose()


@cache
def documented_statuses():
    """By (method, path), the statuses that the document has for an operation."""
    app = build_app(Settings(jwt_secret="x" * 32, secret_key=Fernet.generate_key().decode()), None, None)
    paths = app.openapi()["paths"]
    return {(m.upper(), path): set(map(int, o["responses"])) for path, methods in paths.items() for m, o in methods.items()}


def assert_documented(answer):
    """That the document has the answer's status; of what it doesn't show, such as a path without its slash, nothing is known."""
    path = answer.request.url.path
    if answer.status_code == 405:  # not of what is documented, but of what isn't there
        return
    for (method, template), statuses in documented_statuses().items():
        if method == answer.request.method and re.fullmatch(re.sub(r"{\w+}", "[^/]+", template.rstrip("/")) + "/?", path):
            assert answer.status_code in statuses, f"{method} {path} answered {answer.status_code}"
            return


@pytest.fixture
def http(settings, store):
    with TestClient(build_app(settings, store, Idle()), raise_server_exceptions=False) as client:
        client.event_hooks = {"response": [assert_documented]}
        client.headers["Authorization"] = f"Bearer {mint_token(settings, ORG, 'tester', 600)}"
        yield client


@pytest.fixture
def secret_id(http):
    data = {"access_key_id": "AK" + CANARY, "secret_access_key": CANARY, "endpoint_url": "http://127.0.0.1:9"}
    answer = http.post("/secret/", json={"org": ORG, "name": "keys", "type": "s3", "data": data})
    assert answer.status_code == 200
    assert CANARY not in answer.text + http.get("/secret/list/", params={"org_id": ORG}).text
    return answer.json()["secret_id"]


@pytest.fixture
def job(secret_id):
    return with_fields(DOCUMENTED, {"model_details.base_model": TINY, "dataset_details.secret_id": secret_id})
