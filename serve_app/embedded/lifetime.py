"""Start everything a laptop needs in one supervisor process, keep it going, and end all of it again.

The supervisor owns SeaweedFS and the head (Ray and the service, head.py) and starts either again when it dies; its pid ends both.
Every process below it inherits TUNEYARD_INSTANCE, so that `down` finds what a killed supervisor left behind.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from serve_app.settings import Settings, write_private

if TYPE_CHECKING:
    from serve_app.embedded.s3 import S3Server

STATE_FILE = "up.json"
READY_TIMEOUT_S = 240
STOP_TIMEOUT_S = 60
HEAD_READY_TIMEOUT_S = 180
HEAD_TRIES = 3  # starts in a row that fail before the supervisor gives up
WATCH_S = 0.5
FULL_BYTES = 1 << 20  # less is no room
SAME_S = 2.0  # /proc tells the time of boot in whole seconds
INSTANCE = "TUNEYARD_INSTANCE"
PUBLIC = ("url", "dashboard_url", "s3_endpoint_url", "s3_access_key_id", "s3_secret_access_key", "s3_bucket")


def read_state(home: Path) -> dict[str, Any] | None:
    """What the running service of this home wrote about itself, or None when none runs."""
    try:
        state: dict[str, Any] = json.loads((home / STATE_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state if _supervisor(state) is not None else None


def _supervisor(state: dict[str, Any]) -> psutil.Process | None:
    """The process that wrote `state`, if it still runs: after a reboot its pid may be a stranger's, or our own.

    A zombie, which only waits for its parent to notice, doesn't run.
    """
    try:
        process = psutil.Process(state["pid"])
        same = abs(_since_boot_s(process) - state["since_boot_s"]) < SAME_S
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):  # KeyError: of an earlier version
        return None


def _since_boot_s(process: psutil.Process) -> float:
    """When it began; putting the clock right doesn't change it."""
    return float(process.create_time() - psutil.boot_time())


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


def down(json_output: bool = False) -> int:
    """Stop the service of TUNEYARD_HOME and everything it started. Returns the exit code."""
    ran = _clean_up(Settings.load().home)
    if json_output:
        sys.stdout.write(json.dumps({"was_running": ran}) + "\n")
    else:
        sys.stderr.write("Tuneyard is down.\n" if ran else "Tuneyard isn't running here.\n")
    return 0


def _clean_up(home: Path) -> bool:
    """End what the last `up` of this home started, also when its supervisor was killed; False when there was nothing."""
    try:
        state = json.loads((home / STATE_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # cut off as the machine went: nothing runs since
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
            f"S3: {state['s3_endpoint_url']}, bucket {state['s3_bucket']}; its keys: tuneyard env\n"
        )
    sys.stdout.flush()


def _up_detached(home: Path, json_output: bool) -> int:
    log_path = _logs(home) / "up.log"
    with log_path.open("ab") as log:
        begins = log.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "serve_app.cli", "up"],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"TUNEYARD_HOME": str(home)},
        )
    return _await_ready(home, json_output, child, begins)


def _await_ready(home: Path, json_output: bool, child: subprocess.Popen[bytes] | None, begins: int = 0) -> int:
    """`child` is the supervisor, if this process started it; its log begins at that byte, after those of earlier ones."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        state = read_state(home)
        if state is not None and state["ready"]:
            _announce(state, json_output)
            return 0
        if child is not None and child.poll() is not None:
            said = "didn't start"
            break
        time.sleep(0.2)
    else:
        said = f"isn't ready after {READY_TIMEOUT_S} s, as on a machine that is too busy, and is stopped"
    log_path = _logs(home) / "up.log"
    lines = log_path.read_bytes()[begins:].decode(errors="replace").splitlines(keepends=True)
    sys.stderr.write(f"Tuneyard {said}; the end of {log_path}:\n")
    sys.stderr.writelines(lines[-15:])
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
    started = {"pid": os.getpid(), "since_boot_s": _since_boot_s(psutil.Process())}
    state: dict[str, Any] = started | {"instance": instance, "ray_dir": ray_dir, "ready": False}
    _write_state(home, state)

    head: _Head | None = None
    s3 = start_s3(home / "s3", _logs(home) / "s3.log")
    try:
        _materialise_models(_configure(home, s3))
        state |= {
            "s3_endpoint_url": s3.endpoint_url,
            "s3_access_key_id": s3.access_key_id,
            "s3_secret_access_key": s3.secret_access_key,
            "s3_bucket": BUCKET,
        }
        failures, was_full = 0, False
        head = _Head(ray_dir)
        while not stop.wait(WATCH_S):
            is_full = shutil.disk_usage(home).free < FULL_BYTES
            if was_full and not is_full:
                sys.stderr.write("the disk was full and has room again: the embedded S3 server must start anew\n")
                s3.stop()  # its index takes no writes any more once one has failed
            was_full = is_full
            if s3.process.poll() is not None:
                s3 = _start_s3_again(home, s3, stop)
            if head.ended():
                failures = 0 if state["ready"] else failures + 1
                if failures == HEAD_TRIES:
                    sys.stderr.write(f"Ray and the service didn't start, {HEAD_TRIES} times in a row\n")
                    return 1
                sys.stderr.write("Ray or the service ended by itself; starting both again\n")
                state["ready"] = False
                _write_state(home, state)
                _kill(_members(instance, but={s3.process.pid}))  # their ports are needed
                head = _Head(ray_dir)
            elif not state["ready"] and (addresses := head.addresses()):
                first = "url" not in state
                state |= addresses | {"ready": True}
                _write_state(home, state)
                if first:
                    _announce(state, json_output)
        return 0
    finally:
        if head is not None:
            head.stop()
        _kill(_members(instance, but={s3.process.pid}))
        s3.stop()
        (home / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(ray_dir, ignore_errors=True)


class _Head:
    """One life of the process that runs Ray and the service (head.py)."""

    def __init__(self, ray_dir: str) -> None:
        self._ready_file = Path(ray_dir) / "ready.json"
        self._ready_file.unlink(missing_ok=True)
        self._ready_by = time.monotonic() + HEAD_READY_TIMEOUT_S
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serve_app.embedded.head", ray_dir, str(self._ready_file), str(_cpus())],
            stdout=sys.stderr,  # ours is for the announcement alone
            stdin=subprocess.DEVNULL,
        )

    def addresses(self) -> dict[str, str] | None:
        """Where Ray and the service are, once they answer."""
        try:
            found: dict[str, str] = json.loads(self._ready_file.read_text())
        except FileNotFoundError:
            return None
        return found

    def ended(self) -> bool:
        """Whether it has ended; one that doesn't get ready in time is ended here."""
        if time.monotonic() > self._ready_by and self.addresses() is None:
            self._process.kill()
            self._process.wait()
        return self._process.poll() is not None

    def stop(self) -> None:
        """End it, and by that most of what it has started.

        Asked to end, Ray would ask its processes one after the other and wait a second for each that doesn't. No job is better
        off for it.
        """
        self._process.kill()
        self._process.wait()


def _start_s3_again(home: Path, old: S3Server, stop: threading.Event) -> S3Server:
    """The S3 server over the same data at the same address; tried until it is there or `stop` is set."""
    from serve_app.embedded.s3 import start_s3

    while not stop.wait(WATCH_S):
        sys.stderr.write("the embedded S3 server ended by itself; starting it again\n")
        try:
            server = start_s3(home / "s3", _logs(home) / "s3.log")
        except RuntimeError as error:
            sys.stderr.write(f"{error}; trying again\n")
            continue
        if server.endpoint_url == old.endpoint_url:
            return server
        sys.stderr.write(f"a port of {old.endpoint_url} has been taken by another program; trying again\n")
        server.stop()
    return old


def _configure(home: Path, s3: S3Server) -> Settings:
    """Write the settings that every process of this instance reads, and make its keys."""
    from serve_app.embedded.s3 import BUCKET

    write_private(
        home / "settings.json",
        json.dumps(
            {
                "embedded": True,
                "storage_uri": f"s3://{BUCKET}/runs",
                "storage_endpoint_url": s3.endpoint_url,
                "storage_access_key_id": s3.access_key_id,
                "storage_secret_access_key": s3.secret_access_key,
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
    from train_loop.model.mirror import EMBEDDED, mirrored

    mirror = Path(settings.model_mirror)
    if not all(mirrored(mirror, m) for m in EMBEDDED):
        subprocess.run([sys.executable, "-m", "serve_app.cli", "models"], check=True, stdout=subprocess.DEVNULL)


def _members(instance: str, but: Collection[int] = ()) -> list[psutil.Process]:
    """Every process that inherited this instance's mark, without this one and `but`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(INSTANCE) == instance and process.pid not in (os.getpid(), *but):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def _end(state: dict[str, Any]) -> None:
    """Ask the supervisor to stop, then end whatever of the instance is left."""
    supervisor = _supervisor(state)
    if supervisor is not None:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            supervisor.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while _supervisor(state) is not None and time.monotonic() < deadline:
            time.sleep(0.1)
    _kill(_members(state["instance"]))


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
