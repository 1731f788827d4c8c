"""What a process of the service has to load before it answers, and what it finds of earlier ones."""

import json
import os
import subprocess
import sys

import psutil
import pytest
import ray

from serve_app.deployment import deploy
from serve_app.embedded.lifetime import _since_boot_s, down, read_state
from serve_app.settings import Settings
from tests.conftest import CANARY

NOT_TRAINING = ("serve_app.app", "serve_app.job_actor", "serve_app.dispatcher", "serve_app.cli")
HEAVY = ("torch", "transformers", "peft", "bitsandbytes")  # a second and a hundred MiB or two, in every job's actor


def test_processes_that_do_not_train_start_without_what_trains():
    code = f"import sys, {', '.join(NOT_TRAINING)}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_pid_that_is_somebody_else_s_by_now_is_not_a_running_service(tmp_path):
    """After a reboot, or in a container that was restarted, where the first pid is always the same."""
    me = {"pid": os.getpid(), "since_boot_s": _since_boot_s(psutil.Process()), "ready": True}
    states = [me, me | {"since_boot_s": me["since_boot_s"] - 3600.0}, {"pid": os.getpid()}, me | {"pid": 2**22 + 1}]
    found = []
    for state in states:
        (tmp_path / "up.json").write_text(json.dumps(state))
        found.append(read_state(tmp_path))
    assert found == [me, None, None, None]


@pytest.mark.parametrize("left", ["", '{"pid": 1'])
def test_a_state_that_was_cut_off_is_of_no_running_service(tmp_path, monkeypatch, left):
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path))
    (tmp_path / "up.json").write_text(left)
    assert read_state(tmp_path) is None
    assert down() == 0


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("JWT_SECRET", CANARY, "TUNEYARD_JWT_SECRET must be at least 32 bytes"),
        ("JWT_PUBLIC_KEY", CANARY, "TUNEYARD_JWT_PUBLIC_KEY isn't a PEM public key"),
        ("SECRET_KEY", CANARY, "TUNEYARD_SECRET_KEY isn't a Fernet key"),
        ("SECRET_KEY", None, "TUNEYARD_SECRET_KEY isn't set"),
        ("JWT_SECRET", None, "no key to check tokens with"),
    ],
)
def test_a_service_without_sound_keys_starts_nothing(settings, store, monkeypatch, tmp_path, variable, value, said):
    if value is None:
        (tmp_path / {"JWT_SECRET": "jwt.key", "SECRET_KEY": "secret.key"}[variable]).unlink()
    else:
        monkeypatch.setenv(f"TUNEYARD_{variable}", value)
    with pytest.raises(RuntimeError, match=said) as caught:
        deploy(Settings.load(), "127.0.0.1", 8000)
    assert CANARY not in str(caught.value)
    assert not ray.is_initialized()
