"""Start everything a laptop needs in one supervisor process, and end all of it again.

The supervisor owns SeaweedFS and a local Ray (with Serve); whoever holds its pid can stop the lot. Every process below it
inherits TUNEYARD_INSTANCE, so that `down` finds what a killed supervisor left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from serve_app.settings import Settings, write_private

STATE_FILE = "up.json"
READY_TIMEOUT_S = 240
STOP_TIMEOUT_S = 60
INSTANCE = "TUNEYARD_INSTANCE"
PUBLIC = ("url", "dashboard_url", "s3_endpoint_url", "s3_access_key_id", "s3_secret_access_key", "s3_bucket")


def read_state(home: Path) -> dict[str, Any] | None:
    """What the running service of this home wrote about itself, or None when none runs."""
    try:
        state: dict[str, Any] = json.loads((home / STATE_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state if _alive(state["pid"]) else None


def _alive(pid: int) -> bool:
    """Whether the process runs; a zombie, which only waits for its parent to notice, doesn't."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def up(detach: bool, json_output: bool) -> int:
    """Start the service of TUNEYARD_HOME; with `detach` return once it is ready. Returns the exit code."""
    home = Settings.load().home
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = read_state(home)
    if state is None:
        _clean_up(home)
        return _up_detached(home, json_output) if detach else _supervise(home, json_output)
    if not state["ready"]:
        return _await_ready(home, json_output, None)
    _announce(state, json_output, already=True)
    return 0


def down() -> int:
    """Stop the service of TUNEYARD_HOME and everything it started. Returns the exit code."""
    home = Settings.load().home
    sys.stderr.write("Tuneyard is down.\n" if _clean_up(home) else "Tuneyard isn't running here.\n")
    return 0


def _clean_up(home: Path) -> bool:
    """End what the last `up` of this home started, also when its supervisor was killed; False when there was nothing."""
    try:
        state = json.loads((home / STATE_FILE).read_text())
    except FileNotFoundError:
        return False
    _end(state)
    (home / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(state["ray_dir"], ignore_errors=True)
    return True


def _announce(state: dict[str, Any], json_output: bool, already: bool = False) -> None:
    if json_output:
        sys.stdout.write(json.dumps({k: state[k] for k in PUBLIC}) + "\n")
    else:
        sys.stdout.write(
            f"Tuneyard {'already runs' if already else 'is up'}: {state['url']} (API docs: {state['url']}/docs)\n"
            f"Ray dashboard: {state['dashboard_url']}\n"
            f"S3: {state['s3_endpoint_url']}, bucket {state['s3_bucket']}; its keys: tuneyard up --json\n"
        )
    sys.stdout.flush()


def _up_detached(home: Path, json_output: bool) -> int:
    log_path = _logs(home) / "up.log"
    with log_path.open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "serve_app.cli", "up"],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"TUNEYARD_HOME": str(home)},
        )
    return _await_ready(home, json_output, child)


def _await_ready(home: Path, json_output: bool, child: subprocess.Popen[bytes] | None) -> int:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        state = read_state(home)
        if state is not None and state["ready"]:
            _announce(state, json_output)
            return 0
        if child is not None and child.poll() is not None:
            break
        time.sleep(0.2)
    log_path = _logs(home) / "up.log"
    sys.stderr.write(f"Tuneyard didn't start; the end of {log_path}:\n")
    sys.stderr.writelines(log_path.read_text(errors="replace").splitlines(keepends=True)[-15:])
    down()
    return 1


def _logs(home: Path) -> Path:
    folder = home / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_state(home: Path, state: dict[str, Any]) -> None:
    write_private(home / STATE_FILE, json.dumps(state))


def _supervise(home: Path, json_output: bool) -> int:
    from serve_app.embedded.s3 import BUCKET, start_s3

    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    instance = uuid.uuid4().hex
    os.environ |= {INSTANCE: instance, "TUNEYARD_HOME": str(home)}
    # So that `python` in a `ray job submit` entrypoint is the one Tuneyard is installed in.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # Unix sockets below this folder must stay under 108 characters, so it can't be inside the home.
    ray_dir = tempfile.mkdtemp(prefix="tuneyard-ray-")
    state: dict[str, Any] = {"pid": os.getpid(), "instance": instance, "ray_dir": ray_dir, "ready": False}
    _write_state(home, state)

    s3 = start_s3(home / "s3", _logs(home) / "s3.log")
    try:
        settings = _configure(home, s3.endpoint_url, s3.access_key_id, s3.secret_access_key)
        _materialise_models(settings)
        url, dashboard_url = _start_ray(settings, ray_dir)
        state |= {
            "ready": True,
            "url": url,
            "dashboard_url": dashboard_url,
            "s3_endpoint_url": s3.endpoint_url,
            "s3_access_key_id": s3.access_key_id,
            "s3_secret_access_key": s3.secret_access_key,
            "s3_bucket": BUCKET,
        }
        _write_state(home, state)
        _announce(state, json_output)
        while not stop.wait(1.0):
            if s3.process.poll() is not None:
                sys.stderr.write("the embedded S3 server ended by itself; stopping\n")
                return 1
        return 0
    finally:
        _stop_ray()
        s3.stop()
        (home / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(ray_dir, ignore_errors=True)


def _configure(home: Path, endpoint: str, access_key: str, secret_key: str) -> Settings:
    """Write the settings that every process of this instance reads, and make its keys."""
    from serve_app.embedded.s3 import BUCKET

    write_private(
        home / "settings.json",
        json.dumps(
            {
                "embedded": True,
                "storage_uri": f"s3://{BUCKET}/runs",
                "storage_endpoint_url": endpoint,
                "storage_access_key_id": access_key,
                "storage_secret_access_key": secret_key,
                "storage_region": "us-east-1",
                "max_workers": 4 * _cpus(),
                "max_running_jobs": 2,
                "data_cpus": 0.25,
            }
        ),
    )
    settings = Settings.load()
    settings.prepare_embedded_keys()
    from serve_app.store.jobs import JobStore

    JobStore.open(settings.database_url).migrate()
    return settings


def _cpus() -> int:
    return max(2, len(os.sched_getaffinity(0)))


def _materialise_models(settings: Settings) -> None:
    """In a process of its own: it needs torch, and the supervisor should stay small."""
    from train_loop.model.mirror import SMOLLM2, TINY, mirrored

    mirror = Path(settings.model_mirror)
    if not all(mirrored(mirror, m) for m in (SMOLLM2, TINY)):
        subprocess.run([sys.executable, "-m", "serve_app.cli", "models"], check=True, stdout=subprocess.DEVNULL)


def _start_ray(settings: Settings, ray_dir: str) -> tuple[str, str]:
    import logging

    # Read when Ray is imported: only as a one-machine Ray, its default outside Linux, does it stay off the network.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray
    from ray import serve

    from serve_app.app import deploy
    from serve_app.embedded.ports import free_ports

    # Everything listens on 127.0.0.1, and `ray job submit` reads no token unless it is told to: RAY_AUTH_MODE=token for both
    # closes it to other users of this machine.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    http_port, dashboard_port = free_ports(2)
    context = ray.init(
        address="local",
        num_cpus=_cpus(),
        num_gpus=0,
        object_store_memory=256 << 20,
        dashboard_host="127.0.0.1",
        dashboard_port=dashboard_port,
        namespace=settings.ray_namespace,
        _temp_dir=ray_dir,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    # Without this file a job submitted to this Ray gets the address of whichever Ray its supervisor finds on the machine.
    Path(ray_dir, "ray_current_cluster").write_text(context.address_info["gcs_address"])
    serve.start(http_options={"host": "127.0.0.1", "port": http_port})
    deploy(settings)
    return f"http://127.0.0.1:{http_port}", f"http://{context.dashboard_url}"


def _stop_ray() -> None:
    import ray

    if ray.is_initialized():
        ray.shutdown()


def _members(instance: str) -> list[psutil.Process]:
    """Every process that inherited this instance's mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(INSTANCE) == instance and process.pid != os.getpid():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def _end(state: dict[str, Any]) -> None:
    """Ask the supervisor to stop, then end whatever of the instance is left."""
    try:
        supervisor = psutil.Process(state["pid"])
        # The pid may have been given to a stranger since.
        if any(word in " ".join(supervisor.cmdline()) for word in ("serve_app.cli", "tuneyard")):
            supervisor.terminate()
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while _alive(supervisor.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass
    left = _members(state["instance"])
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)
