"""A job's plan, made by a process of its own: torch stays out of the ingress, what never ends is ended, and no job's keys meet
another's.

Importing torch and transformers takes seconds, a fork milliseconds. So one process (`python -m serve_app.planner`, its standard
input a socket) imports them and does nothing else but fork, once for each plan. It knows no keys and no job.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

import structlog

from serve_app import logs
from serve_app.errors import ApiError
from serve_app.run_keys import keys_of
from serve_app.secrets import SecretVault
from serve_app.settings import Profile, Settings
from serve_app.store.jobs import STORE_AWAY, JobStore
from train_loop.data.sources import dataset_filesystem
from train_loop.errors import Cause, RunFault, UserError
from train_loop.run_files import model_places
from train_loop.spec import JobSpec
from train_loop.storage import PATIENCE_S

LIMIT_S = 9.0  # from the request's arrival: the answer is there within ten seconds
MEMORY_BYTES = 4 << 30  # of a plan's process
LINGERS_S = 0.2  # a plan's process after its time is over, when the answer has been given
OUTAGE_S = "3"  # that a plan waits for a storage or hub that is away, instead of minutes
LATER = {"Retry-After": "30"}
STARTING = "waiting for torch and transformers, which the service loads once when it starts"
# What the first plan would else load, of the kind of model that most are.
PRELOADED = ("train_loop.plan", "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto")
log = structlog.get_logger()


class Planner:
    """Makes plans. Thread-safe. The process that it starts loads in the background, and ends with this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start()

    def plan(self, spec: JobSpec, deadline: float) -> dict[str, Any]:
        """The job's plan, if it can be made until `deadline`, of time.monotonic().

        Raises UserError where the job would fail at once, RunFault where a storage is away, ApiError 503 where the plan takes too
        long or too much.
        """
        ours, theirs = Pipe()
        with ours:
            with theirs:
                self._hand_over(theirs)
            try:
                return self._answer(ours, spec, deadline)
            except (EOFError, OSError) as error:
                log.warning("a plan's process died", error=type(error).__name__)
                message = "the process that made the plan was ended, as when memory runs out; try again a little later"
                raise ApiError(503, message, headers=LATER) from None

    def close(self) -> None:
        """End the process, and the plans that are being made."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._control.close()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            # The modules that this process finds, wherever Ray told it to look for them.
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=theirs.fileno(),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
            )

    def _hand_over(self, end: Connection) -> None:
        """Have a process that makes a plan for the other end. The message waits where the process isn't ready."""
        with self._lock:
            try:
                socket.send_fds(self._control, [b"."], [end.fileno()])
            except OSError:
                log.warning("the process that plans are forked from is gone", returncode=self._process.poll())
                self._control.close()
                self._start()
                socket.send_fds(self._control, [b"."], [end.fileno()])

    def _answer(self, process: Connection, spec: JobSpec, deadline: float) -> dict[str, Any]:
        doing = STARTING
        while process.poll(max(0.0, deadline - time.monotonic())):
            said = json.loads(process.recv_bytes())
            match said:
                case {"ready": _}:  # there is somebody to read it, so this doesn't block
                    process.send_bytes(json.dumps({"spec": spec.model_dump_json(), "deadline": deadline}).encode())
                case {"doing": doing}:
                    pass
                case {"plan": plan}:
                    return dict(plan)
                case {"error": error}:
                    raise UserError(**error)
                case {"fault": [cause, message]}:
                    raise RunFault(Cause(cause), message)
                case {"bug": _}:
                    raise RuntimeError("a plan failed; its process has logged how")
        raise too_late(doing)


def too_late(doing: str) -> ApiError:
    """What is answered to a plan that isn't made in time; `doing` says what took it."""
    return ApiError(
        503, f"the plan isn't made after {LIMIT_S:g} s, which went on {doing}; try again a little later", headers=LATER
    )


def main() -> None:
    """Fork for each connection that standard input brings, until it ends; then whatever was forked ends, too."""
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # no plan holds the socket
    logs.configure()
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # what is loaded stays shared with the forked ones
    # Ray's workers block and ignore signals, which is inherited.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        _, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not fds:
            os.killpg(0, signal.SIGKILL)
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _make_one(Connection(fds[0]))
            finally:
                os._exit(0)
        os.close(fds[0])


def _make_one(asker: Connection) -> None:
    """The life of a plan's process. It finds the secrets by itself, so that no key is handed around."""

    def say(**what: Any) -> None:
        asker.send_bytes(json.dumps(what).encode())

    try:
        say(ready=True)
        asked = json.loads(asker.recv_bytes())
        # The kernel ends it, whatever it is at.
        signal.setitimer(signal.ITIMER_REAL, max(0.0, asked["deadline"] - time.monotonic()) + LINGERS_S)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        os.environ[PATIENCE_S] = OUTAGE_S
        settings = Settings.load()
        vault = SecretVault.from_settings(JobStore.open(settings.database_url), settings)
        say(plan=plan_job(JobSpec.model_validate_json(asked["spec"]), settings, vault, lambda doing: say(doing=doing)))
    except UserError as error:
        say(error={"message": error.message, "field": error.field, "code": error.code})
    except RunFault as fault:
        say(fault=[fault.cause, fault.message])
    except STORE_AWAY:
        say(fault=[Cause.STORAGE_AWAY, "The job store can't be reached."])
    except (EOFError, BrokenPipeError, MemoryError):
        log.warning("a plan is given up", exc_info=True)  # nobody waits any more, or it wanted too much: its end says it
    except Exception:
        log.exception("a plan failed")
        say(bug=True)


def plan_job(
    spec: JobSpec, settings: Settings, vault: SecretVault, doing: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The job's plan with this service's models, hardware and prices; `doing` hears what it is at.

    Raises UserError where the job would fail at once, RunFault where a storage is away.
    """
    from train_loop.plan import make_plan

    doing("opening the job's secrets")
    keys = keys_of(spec, vault, settings)
    source = dataset_filesystem(spec.dataset_details, keys.dataset)
    hardware = _hardware(settings.profiles[spec.infra_config.gpu_type], spec.infra_config.num_workers)
    return make_plan(spec, model_places(spec, settings.model_mirror, keys, settings.model_cache_bytes), hardware, source, doing)


def _hardware(profile: Profile, num_workers: int) -> Any:
    from train_loop.plan import GPU_MFU, Hardware, this_machine

    if profile.use_gpu:
        memory = None if profile.memory_gib is None else int(profile.memory_gib * 2**30)
        return Hardware("cuda", memory, (profile.tflops or 100) * 1e12 * GPU_MFU, profile.price_per_hour)
    # CPU workers of one machine share it.
    machine = this_machine()
    memory = machine.memory_bytes and machine.memory_bytes // num_workers
    return Hardware("cpu", memory, machine.flops / num_workers, profile.price_per_hour)


if __name__ == "__main__":
    main()
