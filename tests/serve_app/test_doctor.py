"""`tuneyard admin doctor`: what is well and what isn't, whatever is down or hangs."""

import json
import socket
import time

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from serve_app.cli.failures import in_words
from serve_app.doctor import Level, examine
from serve_app.embedded.s3 import BUCKET
from serve_app.secrets import SecretVault
from serve_app.settings import Profile
from tests.conftest import CANARY, ORG
from tests.serve_app.test_client_and_cli import tuneyard

NOWHERE = "127.0.0.1:9"  # nothing listens there


def pytest_generate_tests(metafunc):
    """Everything here holds on both databases."""
    if "store" in metafunc.fixturenames:
        metafunc.parametrize("store", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def look(settings, store, s3):
    """Examine a service whose parts, but for Ray, are all there."""
    keys = {"storage_access_key_id": s3.access_key_id, "storage_secret_access_key": SecretStr(s3.secret_access_key)}
    where = {"storage_uri": f"s3://{BUCKET}/runs", "storage_endpoint_url": s3.endpoint_url, "storage_region": "us-east-1"}
    url = store.engine.url.render_as_string(hide_password=False)
    ours = settings.model_copy(update={"database_url": url, **keys, **where})

    def run(limit_s=60.0, **changes):
        found = examine(ours.model_copy(update=changes), NOWHERE, lambda error: in_words(error)[0], limit_s)
        assert all(finding.mend for finding in found if finding.level is not Level.OK)
        assert CANARY not in repr(found)
        return {finding.check: finding for finding in found if finding.check != "disk"}

    return run


@pytest.fixture
def silent():
    """The address of one who takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_what_is_well_is_said_and_ray_that_is_away_is_named(look, store):
    store.acquire_lease("dispatcher", "me", 60)
    found = look()
    levels = {check: finding.level for check, finding in found.items()}
    well = {"database", "dispatcher", "secrets", "secret key", "token key", "storage", "models", "clock"}
    assert levels == dict.fromkeys(well, Level.OK) | {"ray": Level.FAIL}, found
    assert "Ray can't be reached" in found["ray"].said
    assert "tuneyard/tiny-random-llama" in found["models"].said
    with store.read() as tx:
        assert tx.exec_driver_sql("SELECT count(*) FROM leases").scalar() == 1  # what was written to try is gone


def test_each_thing_that_is_wrong_is_named_with_what_mends_it(look, store, settings, tmp_path):
    SecretVault.from_settings(store, settings).create(ORG, "keys", "hf", {"token": CANARY})
    found = look(secret_key=SecretStr(Fernet.generate_key().decode()))
    assert (found["secrets"].level, found["secrets"].said) == (Level.FAIL, "1 of 1 can't be opened with this key")
    assert found["dispatcher"].level is Level.WARN
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "owner" / "cut-off").mkdir(parents=True)
    wrong = {"secret_key": SecretStr("weak"), "jwt_secret": SecretStr("weak"), "storage_secret_access_key": SecretStr(CANARY)}
    found = look(**wrong, model_mirror=str(tmp_path / "empty"))
    broken = {check for check, finding in found.items() if finding.level is Level.FAIL}
    assert broken == {"secret key", "token key", "storage", "models", "ray"}
    assert "TUNEYARD_SECRET_KEY isn't a Fernet key" in found["secret key"].said
    assert "can't be written" in found["storage"].said
    assert "no job can have a base model" in found["models"].said
    store.downgrade("0004")
    assert "run tuneyard db upgrade" in look()["database"].said
    store.downgrade("base")
    assert look()["database"].said == "it has no tables"
    store.migrate()


def test_what_hangs_keeps_nobody_from_the_rest(look, silent):
    began = time.monotonic()
    patient = f"postgresql+psycopg://me:{CANARY}@{silent}/x?connect_timeout=300"
    found = look(limit_s=15.0, database_url=patient, jwt_jwks_url=f"http://{silent}/keys")
    assert time.monotonic() - began < 200  # nobody was waited for as long as they hang
    assert (found["database"].level, found["database"].said) == (Level.FAIL, "no answer within 15 s")
    assert "gives no keys" in found["token key"].said
    assert found["storage"].level is found["models"].level is Level.OK


def test_the_command_ends_with_status_1_and_in_words_though_everything_is_away(tmp_path, silent):
    nowhere = {"TUNEYARD_DATABASE_URL": f"postgresql+psycopg://me:{CANARY}@{NOWHERE}/x", "TUNEYARD_STORAGE_URI": "s3://b/runs"}
    nowhere |= {"TUNEYARD_STORAGE_ENDPOINT_URL": f"http://{NOWHERE}", "TUNEYARD_HUB_OFFLINE": "true"}
    keys = {"TUNEYARD_STORAGE_ACCESS_KEY_ID": "AK", "TUNEYARD_STORAGE_SECRET_ACCESS_KEY": CANARY}
    done = tuneyard(tmp_path, "admin", "doctor", "--address", NOWHERE, "--json", timeout_s=300, **nowhere, **keys)
    assert (done.returncode, done.stderr) == (1, "")
    told = json.loads(done.stdout)
    levels = {f["check"]: f["level"] for f in told["findings"] if f["check"] != "disk"}
    away = ("database", "secret key", "token key", "storage", "models", "ray")
    assert levels == {"settings": "ok"} | dict.fromkeys(away, "FAIL")
    assert CANARY not in done.stdout
    shown = tuneyard(tmp_path, "admin", "doctor", TUNEYARD_MAX_RUNNING_JOBS="0")
    assert (shown.returncode, "FAIL  settings    TUNEYARD_MAX_RUNNING_JOBS" in shown.stdout) == (1, True), shown.stdout


def test_profiles_are_held_against_what_the_nodes_have(settings):
    from serve_app.doctor import _profiles

    h100 = Profile(accelerator_type="H100", resources={"GPU": 1})
    ours = settings.model_copy(update={"profiles": {"h100": h100}, "autoscales": False})
    node = {"GPU": 8.0, "accelerator_type:H100": 1.0}
    assert [(f.level, f.said) for f in _profiles(ours, [node, node])] == [(Level.OK, "workers that fit: 16 h100")]
    other = {"GPU": 8.0, "accelerator_type:A100": 1.0}
    assert [f.level for f in _profiles(ours, [other])] == [Level.WARN, Level.FAIL]
    assert [f.level for f in _profiles(ours.model_copy(update={"autoscales": True}), [])] == [Level.WARN]
