"""`python -m train_loop job.json`: the same job without the service, on Ray or (`--local`) in this process.

Keys come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS,
HF_TOKEN, MLFLOW_TRACKING_URI, WANDB_API_KEY, ...), or by reference (`--keys`): there is no vault here. Ray's dashboard shows the
environment variables that `ray job submit` is given, so there it is by reference, or by the role of the cluster's machines.

SIGTERM, as `ray job stop` sends it, has the run save at the next step boundary and stop; a second one ends it at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from train_loop.errors import RunFault, Stopped, UserError, first_line
from train_loop.memory_kills import Place
from train_loop.record import MONITOR, About, Record, completed, cut_short
from train_loop.spec import JobSpec

TRAINS = frozenset({"training", "evaluating", "saving", "exporting"})  # phases in which there is something to save
READ_S = 15.0  # a reader that is there has what is left to tell by then


def main(argv: list[str] | None = None) -> int:
    """Run the job; 0 when it completed, 1 when it failed, 2 when job.json isn't a job."""
    home = Path(os.environ.get("TUNEYARD_HOME", Path.home() / ".tuneyard"))
    parser = argparse.ArgumentParser(prog="python -m train_loop", description="Run one fine-tuning job.")
    parser.add_argument("job", type=Path, help="the job as JSON (not YAML): the body of POST /job/")
    parser.add_argument("--local", action="store_true", help="in this process, without Ray, as one worker")
    parser.add_argument("--storage", default=str(home / "runs"), help="where runs go: a folder or s3://bucket/prefix")
    parser.add_argument(
        "--mirror",
        default=os.environ.get("TUNEYARD_MODEL_MIRROR", str(home / "models")),
        help="where base models are looked up first: a folder or s3://bucket/prefix",
    )
    parser.add_argument("--request-id", default=None, help="the id of a run to go on with")
    parser.add_argument(
        "--keys",
        default=None,
        help="where its keys are: a JSON object of environment variables, as a file on the machine that this runs on or an ARN "
        "of AWS Secrets Manager that the machine's role may read",
    )
    args = parser.parse_args(argv)

    try:
        spec = JobSpec.model_validate_json(args.job.read_bytes())
    except OSError as error:
        return _fail(f"{args.job} can't be read: {error.strerror}", 2)
    except ValidationError as error:
        said = {"extra_forbidden": "unknown field"}
        lines = (f"  {'.'.join(map(str, e['loc'])) or 'job'}: {said.get(e['type'], e['msg'])}" for e in error.errors())
        return _fail(f"{args.job} isn't a valid job:\n" + "\n".join(lines), 2)

    request_id = args.request_id or str(uuid.uuid4())
    uri = f"{args.storage.rstrip('/')}/{spec.org}/{request_id}"
    try:
        if args.keys is not None:
            os.environ |= _keys_by_reference(args.keys)
        run = _run_local if args.local else _run_on_ray
        manifest = run(spec, request_id, uri, args.mirror)
    except UserError as error:
        return _fail(f"FAILED {error.message}", 1)
    except RunFault as error:
        return _fail(f"FAILED {error.message} ({error.cause}); go on with --request-id {request_id}", 1)
    except (Stopped, KeyboardInterrupt):
        return _fail(_stopped(request_id), 1)
    metrics = manifest["metrics"]
    print(  # noqa: T201 - the command's result
        json.dumps(
            {
                "request_id": request_id,
                "status": "COMPLETED",
                **{uri: manifest[uri] for uri in ("adapter_uri", "merged_uri") if manifest[uri] is not None},
                "eval_loss_before": metrics["eval_loss_before"],
                "eval_loss_after": metrics["eval_loss_after"],
            }
        )
    )
    return 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    return code


def _stopped(request_id: str) -> str:
    return f"STOPPED; go on with --request-id {request_id}"


@contextlib.contextmanager
def _stopped_by_sigterm(ask_to_stop: Callable[[], bool], request_id: str) -> Iterator[None]:
    """SIGTERM asks the run to stop meanwhile, and ends this process where there is nothing to save; so does a second one."""

    def ask() -> None:
        if not ask_to_stop():
            os._exit(_fail(_stopped(request_id), 1))

    def handle(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=ask, name="stop", daemon=True).start()  # Ray can't be asked while the main thread asks it

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Console:
    """A monitor that prints. Also the body of the Ray actor that plays the job actor's part without the service."""

    def __init__(self, keys: Any = None, trackers: Mapping[str, Any] | None = None, about: About | None = None) -> None:
        self._keys, self._trackers = keys, dict(trackers or {})
        self._record = Record(about)
        self._record.redactor.hide(*(value for found in (keys, *self._trackers.values()) if found for value in found.values()))
        self._phase, self._stop = "", False
        self._failure: UserError | RunFault | None = None
        self._places = dict[int, Place]()
        self._step = -1

    def keys(self) -> Any:
        return self._keys

    def tracker(self, name: str) -> Any:
        return self._trackers[name]

    def on_phase(self, name: str) -> None:
        self._phase = name
        self._record.phase(name)
        self._say(f"phase {name}")

    def on_event(self, kind: str, message: str) -> None:
        self._record.event(kind, message)
        self._say(f"{kind}: {message}")

    def on_progress(self, progress: dict[str, Any]) -> None:
        self._record.progress(progress)
        last = progress["metrics"]["last"]
        if last is not None and last["step"] != self._step:
            self._step = last["step"]
            self._say(
                f"step {last['step']}/{progress['total_steps']} loss {last['loss']:.4f} {last['tokens_per_second']:.0f} tokens/s"
            )

    def on_log(self, rank: int, lines: list[tuple[float, str]]) -> None:
        """Keep a worker's lines. Ray shows them on the driver's terminal by itself."""
        self._record.lines(rank, lines)

    def on_end(self, ending: Mapping[str, Any], live: Mapping[str, Any]) -> None:
        """Keep how the run has ended."""
        self._record.end(ending, live)

    def since(self, cursor: str) -> bytes:
        """What the run has told since then, for a service that shows it."""
        return self._record.since(cursor)

    def is_read(self) -> bool:
        """Whether nothing is left to tell, or nobody asks."""
        return self._record.is_read()

    def ask_to_stop(self) -> bool:
        """Have the run stop at its next step boundary; False when there is nothing to save yet."""
        self._stop = True
        return self._phase in TRAINS

    def stop_requested(self) -> bool:
        return self._stop

    def is_current(self) -> bool:
        return True

    def on_place(self, rank: int, place: Place) -> None:
        self._places[rank] = place

    def places(self) -> list[Place]:
        places, self._places = self._places, {}
        return list(places.values())

    def on_failure(self, error: UserError | RunFault) -> None:
        self._failure = self._failure or error

    def failure(self) -> UserError | RunFault | None:
        failure, self._failure = self._failure, None  # the next attempt starts without it
        return failure

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - a console


def _keys_from_environment(spec: JobSpec) -> Any:
    from train_loop.data.sources import Credentials, GoogleKey, HubToken
    from train_loop.run_files import Keys

    env = os.environ
    keys: Any = None
    if "AWS_ACCESS_KEY_ID" in env and "AWS_SECRET_ACCESS_KEY" in env:
        keys = Credentials(
            access_key_id=env["AWS_ACCESS_KEY_ID"],
            secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
            session_token=env.get("AWS_SESSION_TOKEN"),
            endpoint_url=env.get("AWS_ENDPOINT_URL"),
            region=env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION"),
        )
    path = env.get("GOOGLE_APPLICATION_CREDENTIALS")
    opens: dict[str, Any] = {
        "gcs": GoogleKey(Path(path).read_text()) if path else None,
        "hf": HubToken(env["HF_TOKEN"]) if env.get("HF_TOKEN") else None,
    }
    dataset, model = (opens.get(details.source_type, keys) for details in (spec.dataset_details, spec.model_details))
    return Keys(dataset=dataset, storage=keys, model=None if isinstance(model, HubToken) else model)


def _keys_by_reference(reference: str) -> dict[str, str]:
    """The environment variables that are there. They are this process's alone: no other of Ray's inherits them."""
    text = _secret_text(reference) if reference.startswith("arn:") else _file_text(reference)
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) and value for value in found.values()):
        raise UserError(f'--keys {reference} must hold a JSON object such as {{"AWS_ACCESS_KEY_ID": "..."}}', field="keys")
    return found


def _file_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"--keys {path} can't be read: {getattr(error, 'strerror', None) or 'not text'}", field="keys") from None


def _secret_text(arn: str) -> str:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    region = dict(enumerate(arn.split(":"))).get(3)
    try:
        text: str = boto3.client("secretsmanager", region).get_secret_value(SecretId=arn).get("SecretString", "")
        return text
    except (BotoCoreError, ClientError, ValueError) as error:
        raise UserError(f"--keys {arn} can't be read: {first_line(error)}", field="keys") from None


def _tracker_from_environment(name: str) -> Any:
    """What report_to names here: the word mlflow or wandb, for what the variables of its own client say."""
    from train_loop.trackers.tracker import ENVIRONMENT, TrackerKeys

    if name not in ENVIRONMENT:
        raise UserError(f"report_to {name} must be {' or '.join(ENVIRONMENT)} here", field="train_config.report_to")
    found = {field: os.environ[variable] for field, (variable, _) in ENVIRONMENT[name].items() if os.environ.get(variable)}
    if missing := [variable for field, (variable, needed) in ENVIRONMENT[name].items() if needed and field not in found]:
        raise UserError(f"report_to {name} needs {' and '.join(missing)}", field="train_config.report_to")
    return TrackerKeys(name, found)


def _trackers_from_environment(spec: JobSpec) -> dict[str, Any]:
    return {name: _tracker_from_environment(name) for name in spec.train_config.report_to}


def _run_local(spec: JobSpec, request_id: str, uri: str, mirror: str) -> dict[str, Any]:
    from train_loop.launch import launch_local
    from train_loop.run_files import RunFiles

    console = Console(_keys_from_environment(spec), _trackers_from_environment(spec))
    with _stopped_by_sigterm(console.ask_to_stop, request_id):
        return launch_local(spec, request_id, RunFiles(uri, mirror, console.keys, console.tracker), console)


def _run_on_ray(spec: JobSpec, request_id: str, uri: str, mirror: str) -> dict[str, Any]:
    import ray

    from train_loop.launch import ActorMonitor, Placement, launch
    from train_loop.run_files import RunFiles

    if not ray.is_initialized():
        # Joins the cluster of RAY_ADDRESS (a submitted job), else starts one here, with the dashboard Ray Train needs.
        ray.init(logging_level="warning", dashboard_host="127.0.0.1", namespace="tuneyard-cli")
    name = f"{MONITOR}{request_id}"
    namespace = ray.get_runtime_context().namespace
    console = ray.remote(num_cpus=0)(Console).options(name=name)
    about = About(request_id, _ray_job(), spec.model_dump(mode="json"))
    monitor = console.remote(_keys_from_environment(spec), _trackers_from_environment(spec), about)
    found = ActorMonitor(name, namespace)
    gpus = spec.infra_config.gpu_type != "cpu" and ray.cluster_resources().get("GPU", 0) >= spec.infra_config.num_workers
    share = ray.cluster_resources().get("CPU", 1) / (2 * spec.infra_config.num_workers)
    placement = Placement(resources={"GPU": 1.0} if gpus else {"CPU": min(1.0, share)}, use_gpu=gpus, data_cpus=min(0.5, share))
    files = RunFiles(uri, mirror, found.keys, found.tracker)

    def attempts() -> dict[str, Any]:
        for retries_left in range(spec.infra_config.max_retries, 0, -1):
            try:
                return launch(spec, request_id, files, placement, found)
            except RunFault as fault:
                sys.stderr.write(f"{fault.message} ({fault.cause}); {retries_left} more attempts\n")
        return launch(spec, request_id, files, placement, found)

    try:
        with _stopped_by_sigterm(lambda: ray.get(monitor.ask_to_stop.remote()), request_id):
            manifest = attempts()
    except BaseException as error:
        _tell_the_end(monitor, cut_short(error), {})
        raise
    else:
        said, last = completed(manifest)
        _tell_the_end(monitor, {"status": "COMPLETED"} | said, last)
        return manifest
    finally:
        ray.kill(monitor)


def _ray_job() -> str | None:
    """The submission id of the Ray job that this process was started as, if it was."""
    # Ray's own variable, from which ray.init takes what a job was submitted with; nothing public says it.
    found: str | None = (
        json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {}).get("job_submission_id")
    )
    return found


def _tell_the_end(monitor: Any, ending: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    """Leave the monitor its last word, for as long as somebody may still come for it. Without a monitor nobody does."""
    import ray
    from ray.exceptions import RayError

    with contextlib.suppress(RayError):
        monitor.on_end.remote(ending, live)
        deadline = time.monotonic() + READ_S
        while time.monotonic() < deadline and not ray.get(monitor.is_read.remote(), timeout=READ_S):
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
