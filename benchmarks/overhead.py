"""What a job costs besides its training: `python -m benchmarks.overhead`.

Jobs on an embedded service, their workers on CPUs, each submitted once nothing of the one before is left to do. First the time
from submitting to the end of the first step, phase by phase, and what the service's processes computed meanwhile, of all cores:
of the service's first job, of a later one, and of one whose rows another job has prepared. Next to it Ray's own floor: from
TorchTrainer.fit() until as many workers that do nothing are entered, the first and the second time. Then, from the times of the
steps: what a metric point of every step costs, against another job with few. Phases are seen by asking, POLL_S apart.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.api import ORG, SPEC, put_rows, service
from benchmarks.setting import machine
from serve_app.client import Client

POLL_S = 0.2
IDLE_S = 3.0  # a service that takes less than half a core for so long is at rest: the processes of Ray and Serve never do nothing
REST_S = 300.0  # the most that is waited for that
ROWS = 500
SELDOM = 10  # steps, from one of few points to the next
# What comes before each phase is what a job waited for until then.
WAITS = {
    "started": "the dispatcher",
    "preparing_data": "the job's actor",
    "waiting_for_resources": "the rows",
    "loading_model": "the workers",
    "training": "the model",
    "first step": "the first step",
}
Seen = dict[str, float]  # Unix time by what was seen then


def waits(seen: Seen) -> dict[str, float]:
    """Seconds by what a job waited for, from `submitted` on. What wasn't seen took no time of its own."""
    at, found = seen["submitted"], {}
    for name, what in WAITS.items():
        now = max(at, seen.get(name, at))
        found[what], at = now - at, now
    return found


def step_s(points: Sequence[dict[str, Any]]) -> float:
    """Mean seconds of a step between the second point and the last."""
    first, last = points[1], points[-1]
    return float((last["time"] - first["time"]) / (last["step"] - first["step"]))


def cpu_s(home: str) -> float:
    """CPU seconds of all processes that the service of that home has now."""
    taken = 0.0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TUNEYARD_HOME") == home:
                taken += sum(process.cpu_times()[:2])
    return taken


def rest(home: str) -> None:
    """Wait until the service does nothing."""
    given_up_at, before = time.monotonic() + REST_S, cpu_s(home)
    while time.monotonic() < given_up_at:
        time.sleep(IDLE_S)
        now = cpu_s(home)
        if now - before < IDLE_S / 2:
            return
        before = now


def run(
    client: Client, home: str, name: str, details: dict[str, Any], model: str, workers: int, **hyperparameters: Any
) -> dict[str, Any]:
    """One job to its end: what was seen when, its points, and the CPU seconds of the service until the first of them."""
    rest(home)
    spec = SPEC | {
        "experiment_name": re.sub("[^a-z]+", "-", name),
        "model_details": {"base_model": model},
        "dataset_config": {"split": {"type": "none"}},
        "dataset_details": details,
        "train_config": {"hyperparameters": hyperparameters | {"per_device_train_batch_size": 1}},
        "infra_config": {"gpu_type": "cpu", "gpu_count": workers},
    }
    before, until_first_step = cpu_s(home), None
    seen: Seen = {"submitted": time.time()}
    request_id = client.submit(spec)["request_id"]
    while (job := client.get(request_id, ORG))["status"] in ("QUEUED", "RUNNING"):
        seen.setdefault(job["phase"], time.time())
        if until_first_step is None and job["step"] > 0:
            until_first_step = cpu_s(home) - before
        # Not while steps are timed.
        time.sleep(POLL_S if until_first_step is None else 1)
    if job["status"] != "COMPLETED":
        raise SystemExit(f"{name}: {job['status']}, {job['message']}")
    started = next(e for e in client.events(request_id, ORG)["events"] if e["kind"] == "started")
    points = client.metrics(request_id, ORG)["points"]
    seen |= {"started": dt.datetime.fromisoformat(started["time"]).timestamp(), "first step": points[0]["time"]}
    print(f"{name}: first step after {seen['first step'] - seen['submitted']:.1f} s", file=sys.stderr, flush=True)
    return {"name": name, "seen": seen, "points": points, "cpu_s": until_first_step}


def enter(config: dict[str, str]) -> None:
    """A worker that does nothing."""
    import ray.train

    Path(f"{config['entered']}-{ray.train.get_context().get_world_rank()}").write_text(str(time.time()))


def be_floor(workers: int) -> None:
    """In a Ray of its own, as the embedded service sets it: seconds until all workers of Ray Train are entered, twice."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        ray.init("local", num_cpus=2, object_store_memory=256 << 20, log_to_driver=False, logging_level="error")
        found["Ray itself"] = time.time() - began
        for name in ("first", "second"):
            entered, began = Path(folder, f"entered-{name}"), time.time()  # the run has a folder of its name
            TorchTrainer(
                enter,
                train_loop_config={"entered": str(entered)},
                scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.25}),
                run_config=RunConfig(name=name, storage_path=folder),
            ).fit()
            found[name] = max(float(Path(f"{entered}-{rank}").read_text()) for rank in range(workers)) - began
        ray.shutdown()
    print(json.dumps(found))


def floor(workers: int) -> dict[str, float]:
    """What Ray alone takes, in a process of its own."""
    as_embedded = {"RAY_worker_niceness": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "benchmarks.overhead", "--floor", "--workers", str(workers)]
    said = subprocess.run(command, env=os.environ | as_embedded, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found


def table(found: dict[str, Any]) -> str:
    """The two results as Markdown."""
    jobs, ray = found["jobs"][:3], found["floor"]
    took = [waits(job["seen"]) for job in jobs]
    lines = ["| seconds until | " + " | ".join(job["name"] for job in jobs) + " |", "|---" * (1 + len(jobs)) + "|"]
    for what in WAITS.values():
        lines.append(f"| {what} | " + " | ".join(f"{each[what]:.2f}" for each in took) + " |")
    totals = [sum(each.values()) for each in took]
    lines.append("| in all | " + " | ".join(f"{total:.2f}" for total in totals) + " |")
    if all(job["cpu_s"] is not None for job in jobs):
        lines.append("| CPU seconds meanwhile | " + " | ".join(f"{job['cpu_s']:.1f}" for job in jobs) + " |")
    floors = [ray["first"], ray["second"], ray["second"]]
    lines.append("| Ray's floor for the workers | " + " | ".join(f"{each:.2f}" for each in floors) + " |")
    over = [each["the workers"] / least for each, least in zip(took, floors, strict=True)]
    lines.append("| workers / floor | " + " | ".join(f"{each:.2f}" for each in over) + " |")
    lines.append("| in all / floor | " + " | ".join(f"{t / f:.2f}" for t, f in zip(totals, floors, strict=True)) + " |")
    every, seldom = (step_s(job["points"]) for job in found["jobs"][-2:])
    lines += [
        "",
        f"A step with a point each takes {1000 * every:.1f} ms, with a point every {SELDOM} {1000 * seldom:.1f} ms: "
        f"{every / seldom:.3f} of it.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tuneyard/tiny-random-llama")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(".bench/overhead.json"))
    parser.add_argument("--floor", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.floor:
        be_floor(options.workers)
        return
    steps = options.steps
    found: dict[str, Any] = {
        **machine(),
        "model": options.model,
        "steps": steps,
        "workers": options.workers,
        "floor": floor(options.workers),
    }
    with service(None) as (state, _, token):
        client = Client(state["url"], token)
        first, later = (put_rows(state, client, f"rows-{n}", n) for n in (ROWS, ROWS + 1))

        def job(name: str, details: dict[str, Any], logging_steps: int = 1) -> dict[str, Any]:
            settings = {"max_steps": steps, "logging_steps": logging_steps, "save_steps": steps + 1}
            return run(client, state["home"], name, details, options.model, options.workers, **settings)

        found["jobs"] = [
            job("first job", first),
            job("later job", later),
            job("later job, rows prepared before", later),
            job("few points", later, logging_steps=SELDOM),
        ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
