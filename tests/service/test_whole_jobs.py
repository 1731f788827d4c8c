"""The service as a user has it: `tuneyard up --detach`, then jobs over HTTP, the command line and Ray's job API."""

import hashlib
import json
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from standardwebhooks import Webhook

from serve_app.client import FINAL, ApiError
from serve_app.settings import write_private
from tests.conftest import DOCUMENTED, ORG, TINY
from tests.observed import DASHBOARDS, Prometheus, dashboard_queries, rules
from tests.running import DATASETS, FINISH_S, Running
from tests.serve_app.receivers import receiving, until
from tests.train_loop.zips import FIELDS, picture, row, zipped
from train_loop.model.mirror import TINY_VLM

pytestmark = pytest.mark.service
REPO = Path(__file__).parent.parent.parent
REJECTS = "dataset_config.preprocessing.max_reject_ratio"
ON_GPUS = ("ray_node_gram", "ray_node_gpus", "job_gpu_memory")


def test_the_documented_job_on_four_workers(service):
    with receiving() as receiver:
        hook = service.client.create_webhook(ORG, receiver.url)
        documented_job_on_four_workers(service)
        until(lambda: receiver.got, "no webhook was told")
    service.client.delete_webhook(hook["webhook_id"], ORG)
    ((headers, body),) = receiver.got
    assert Webhook(hook["secret"]).verify(body, headers)["data"]["experiment_name"] == "documented"


def documented_job_on_four_workers(service):
    changes = {
        "infra_config": DOCUMENTED["infra_config"],
        "dataset_config.preprocessing.max_reject_ratio": 0.1,
        "train_config.hyperparameters.num_epochs": 3,
        "train_config.hyperparameters.learning_rate": 0.01,
    }
    job = service.job("documented", changes)
    accepted = service.client.submit(job)
    assert accepted["status"] == "QUEUED"
    watched = service.run("watch", accepted["request_id"])
    assert "COMPLETED done" in watched.stdout
    done = service.client.get(accepted["request_id"], ORG)
    assert done["metrics"]["eval_loss_after"] < done["metrics"]["eval_loss_before"]
    assert (done["step"], done["total_steps"], done["progress"]) == (6, 6, 1.0)
    bucket, _, prefix = done["output_model_path"].removeprefix("s3://").partition("/")
    run = prefix.removesuffix("/adapter")
    s3 = service.s3()
    found = {e["Key"].removeprefix(run + "/") for e in s3.list_objects_v2(Bucket=bucket, Prefix=run + "/")["Contents"]}
    assert {"job.json", "manifest.json", "metrics.jsonl", "rejected.jsonl", "adapter/adapter_model.safetensors"} <= found
    assert any(name.startswith("checkpoints/") for name in found)
    read = {name: s3.get_object(Bucket=bucket, Key=f"{run}/{name}")["Body"].read() for name in found}
    assert json.loads(read["rejected.jsonl"])["line"] == 11
    manifest = json.loads(read["manifest.json"])
    assert manifest["world_size"] == 4
    assert {f["name"] for f in manifest["adapter_files"]} == {
        n.removeprefix("adapter/") for n in found if n.startswith("adapter/")
    }
    secret = service.keys["secret_access_key"].encode()
    assert not [name for name, data in read.items() if secret in data]
    query = {"org": ORG, "request_id": done["request_id"]}
    files = {f["name"]: f for f in service.client.artifacts(**query)["files"]}
    assert {f"adapter/{f['name']}": f["sha256"] for f in manifest["adapter_files"]} == {
        n: f["sha256"] for n, f in files.items() if n.startswith("adapter/")
    }
    for file in files.values():
        assert hashlib.sha256(httpx.get(file["url"]).content).hexdigest() == file["sha256"], file
    points = service.client.metrics(**query)["points"]
    assert points == [json.loads(line) for line in read["metrics.jsonl"].splitlines()]
    logged = service.client.logs(**query)["logs"]
    assert {entry["rank"] for entry in logged} == {0, 1, 2, 3}
    assert any("step 6/6 loss" in entry["line"] for entry in logged)
    answers = json.loads(service.run("chat", accepted["request_id"], "--prompt", "Hi", "--max-new-tokens", "4", "--json").stdout)
    assert answers.keys() == {"prompt", "base", "tuned"}
    with pytest.raises(ApiError) as caught:
        service.client.cancel(accepted["request_id"], ORG)
    assert caught.value.status == 409


@pytest.fixture(scope="module")
def prometheus(service, tmp_path_factory):
    session = Path(service.state()["ray_dir"], "session_latest")
    made = Prometheus(tmp_path_factory.mktemp("prometheus"), session / "prom_metrics_service_discovery.json")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def watched(service):
    """A job that trains until it is canceled, submitted as from outside."""
    changes = {"train_config.hyperparameters.max_steps": 100_000, REJECTS: 0.1}
    headers = {"Authorization": f"Bearer {service.token}", "X-Request-Id": "from-outside-1"}
    answer = httpx.post(f"{service.up['url']}/job/", json=service.job("watched", changes), headers=headers, timeout=60)
    assert answer.headers.get_list("x-request-id") == ["from-outside-1"]
    request_id = answer.json()["request_id"]
    service.wait(request_id, lambda job: job["step"] >= 3)
    return request_id


def steps_of(request_id):
    return f'ray_tuneyard_job_step{{request_id="{request_id}"}}'


def test_a_job_is_watched_in_metrics_logs_and_traces(service, spans, boards, prometheus, watched):
    request_id, session = watched, Path(service.state()["ray_dir"], "session_latest")
    queries = [expr for dashboard in DASHBOARDS for _, expr in dashboard_queries(dashboard)]
    queries = [expr.replace("$request_id", request_id).replace("$__rate_interval", "1m") for expr in queries]
    prometheus.await_data([expr for expr in queries if not any(name in expr for name in ON_GPUS)])
    for expr in [*queries, *(rule["expr"] for rule in rules())]:
        prometheus.query(expr)  # raises where it isn't one
    assert prometheus.query('ALERTS{alertstate="firing"}') == []
    assert [float(found["value"][1]) >= 1 for found in prometheus.query(steps_of(request_id))] == [True]
    service.client.cancel(request_id, ORG)
    assert service.wait(request_id)["status"] == "CANCELED"

    provisioned = yaml.safe_load((session / "metrics/grafana/provisioning/dashboards/default.yml").read_text())
    assert [provider["options"]["path"] for provider in provisioned["providers"]] == [str(boards)]
    assert {dashboard.name for dashboard in DASHBOARDS} < {path.name for path in boards.glob("*.json")}  # Ray's beside them

    names = {"submit", "queued", "launch", "attempt", "preparing_data", "loading_model", "training", "saving"}
    of_job = spans.await_names(request_id, names)
    (request,) = [span for _, span in spans.received if of_job["submit"].span_id in {link.span_id for link in span.links}]
    assert request.name == "POST /job/"

    grep = subprocess.run(["grep", "-rhF", request_id, session / "logs"], capture_output=True, text=True, check=True)
    ours = [json.loads(line) for line in grep.stdout.splitlines() if line.startswith("{") and '"event"' in line]
    assert {line["request_id"] for line in ours} == {request_id}
    said = {line["event"] for line in ours}
    assert {"submitted", "request", "cancel requested", "starting", "phase", "phase training", "the attempt has ended"} <= said
    assert any(line["event"].startswith("step 1/") and line["rank"] == 0 for line in ours)
    assert "from-outside-1" in {line.get("http_request_id") for line in ours if line["event"] == "submitted"}


def test_an_id_of_a_request_that_cannot_stand_in_a_log_is_replaced(service):
    for path in ("/healthz", "/-/routes", "/nothing"):
        answer = httpx.get(f"{service.up['url']}{path}", headers={"X-Request-Id": 'a" b'})
        (told,) = answer.headers.get_list("x-request-id")
        assert len(told) == 32


def test_secrets_are_nowhere_but_where_they_belong(service):
    """After the jobs above: Ray's temporary folder (logs, runtime environments), our logs, the store, the dashboard."""
    canaries = [
        service.keys["secret_access_key"].encode(),
        (service.home / "jwt.key").read_bytes(),
        (service.home / "secret.key").read_bytes(),
    ]
    own = {"settings.json", "up.json", "s3.json", "jwt.key", "secret.key"}  # readable by their owner only
    state = json.loads((service.home / "up.json").read_text())
    searched = 0
    for folder in (Path(state["ray_dir"]), service.home / "logs", service.home):
        for path in folder.rglob("*") if folder != service.home else folder.glob("*"):
            if path.is_file() and path.name not in own:
                searched += 1
                content = path.read_bytes()
                assert not any(canary in content for canary in canaries), path
    assert searched > 50
    assert all((p.stat().st_mode & 0o077) == 0 for p in service.home.rglob("*") if p.name in own)
    dashboard = service.up["dashboard_url"]
    for page in (
        "api/jobs/",
        "api/v0/actors?detail=1",
        "api/v0/tasks?detail=1",
        "api/v0/workers?detail=1",
        "api/serve/applications/",
    ):
        answer = httpx.get(f"{dashboard}/{page}")
        assert answer.status_code == 200, page
        assert not any(canary in answer.content for canary in canaries), page


@pytest.fixture(scope="module")
def unreachable(service):
    """A job whose dataset's storage doesn't answer, which is waited for while the next tests run."""
    away = service.client.create_secret(ORG, "away", "s3", service.keys | {"endpoint_url": "http://127.0.0.1:1"})["secret_id"]
    job = service.job("storage_unreachable", {"dataset_details.secret_id": away})
    return service.client.submit(job)["request_id"]


def test_a_plan_creates_nothing_and_refuses_what_would_fail(service, unreachable):
    before = {job["request_id"] for job in service.client.iter_jobs(ORG)}
    job = service.job("planned", {"infra_config": DOCUMENTED["infra_config"]})
    plan = service.client.plan(job)
    assert (plan["workers"], len(plan["samples"])) == (4, 3)
    assert plan["memory"]["total_bytes"] > 0
    with pytest.raises(ApiError) as caught:
        service.client.plan(job | {"dataset_details": job["dataset_details"] | {"dataset_path": "s3://no/x"}})
    assert caught.value.status == 422
    assert {job["request_id"] for job in service.client.iter_jobs(ORG)} == before


def test_the_series_of_a_job_end_with_it(service, prometheus, watched):
    """Half a minute after that, in which the tests above were run."""
    if service.client.get(watched, ORG)["status"] not in FINAL:
        service.client.cancel(watched, ORG)
    prometheus.await_data([f"absent({steps_of(watched)})"])


def test_a_job_on_images_of_a_private_bucket_is_planned_and_trained_and_asked_about_one(service, tmp_path):
    shown = {f"{i}.png": picture(i, (40, 30)) for i in range(12)}
    asked = [row(f"{i}.png", f"s3://{DATASETS}/outside.png") for i in range(12)]
    service.s3().put_object(Bucket=DATASETS, Key="pictures.zip", Body=zipped([*asked, row("missing.png")], shown))
    service.s3().put_object(Bucket=DATASETS, Key="outside.png", Body=shown["3.png"])
    job = service.job(
        "pictures",
        FIELDS
        | {
            "dataset_details.dataset_path": f"s3://{DATASETS}/pictures.zip",
            "model_details.base_model": TINY_VLM,
            "infra_config.gpu_count": 2,
            "train_config.hyperparameters.max_steps": 2,
            REJECTS: 0.2,
        },
    )
    told = "".join(segment["text"] for segment in service.client.plan(job)["samples"][0]["segments"])
    assert told.count("[image 40x30, ") == 2
    done = service.wait(service.client.submit(job)["request_id"])
    assert (done["status"], done["step"]) == ("COMPLETED", 2), done["message"]
    (tmp_path / "one.png").write_bytes(shown["0.png"])
    words = ["--image", str(tmp_path / "one.png"), "--prompt", "What is it?", "--max-new-tokens", "4", "--json"]
    assert json.loads(service.run("chat", done["request_id"], *words).stdout).keys() >= {"base", "tuned"}


@pytest.fixture(scope="module")
def wrong(service, unreachable):
    """Jobs with something wrong about their dataset, by the code of that. They run while the next test does."""
    keys = service.client.create_secret(ORG, "wrong", "s3", service.keys | {"secret_access_key": "wrong"})["secret_id"]
    cases = {
        "object_not_found": {"dataset_details.dataset_path": f"s3://{DATASETS}/missing.jsonl"},
        "bucket_not_found": {"dataset_details.dataset_path": "s3://no-such-bucket/rows.jsonl"},
        "storage_access_denied": {"dataset_details.secret_id": keys},
        "dataset_empty": {"dataset_details.dataset_path": f"s3://{DATASETS}/empty.jsonl"},
        "no_usable_rows": {"dataset_details.dataset_path": f"s3://{DATASETS}/unusable.jsonl"},
        "too_many_rejects": {"dataset_config.preprocessing.max_reject_ratio": 0},
    }
    ids = {code: service.client.submit(service.job(code, changes))["request_id"] for code, changes in cases.items()}
    return ids | {"storage_unreachable": unreachable}


def test_a_second_service_runs_beside_the_first_and_a_killed_one_comes_back(service, wrong, mirror, tmp_path):
    other = Running(tmp_path / "other", mirror, TUNEYARD_READY_WORKERS="0")  # it has no jobs
    other.start()
    try:
        assert other.up["url"] != service.up["url"]
        psutil.Process(other.state()["pid"]).kill()
        other.start()
        assert other.client.list_jobs(ORG)["jobs"] == []
        by_ray = httpx.post(f"{other.up['dashboard_url']}/api/jobs/", json={"entrypoint": "true"}, timeout=FINISH_S)
        assert by_ray.status_code == 200, by_ray.text
    finally:
        other.down()
    listed = {s["secret_id"] for s in service.client.list_secrets(ORG)["secrets"]}
    assert service.secret_id in listed  # the first one still answers, from its own store


def test_what_is_wrong_with_a_dataset_is_said_in_a_sentence(service, wrong):
    jobs = {code: service.wait(request_id) for code, request_id in wrong.items()}
    assert {code: (job["status"], job["error_code"]) for code, job in jobs.items()} == {code: ("FAILED", code) for code in wrong}
    for job in jobs.values():
        assert job["attempt"] == 1  # another one would find the same
        assert job["message"] == job["error_message"]
        assert "Traceback" not in job["message"]
        assert service.keys["secret_access_key"] not in json.dumps(job)


def test_a_job_that_is_out_of_time_ends_wherever_it_is_and_can_be_resumed(service):
    changes = {"train_config.hyperparameters.max_steps": 3000, "infra_config.max_runtime_s": 5}
    changes["dataset_config.preprocessing.max_reject_ratio"] = 0.1
    request_id = service.client.submit(service.job("slow", changes))["request_id"]
    for attempt in (1, 2):  # it hasn't loaded its model by then, and doesn't look whether to stop
        job = service.wait(request_id)
        assert (job["status"], job["error_code"], job["attempt"]) == ("FAILED", "max_runtime_exceeded", attempt)
        assert "infra_config.max_runtime_s = 5 seconds" in job["error_message"]
        if attempt == 1:
            service.client.resume(request_id, ORG)


def test_ray_job_submit_runs_the_example_without_the_service(service):
    command = [
        *(str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", service.up["dashboard_url"]),
        *("--working-dir", str(REPO), "--", "python", "-m", "train_loop", "examples/job.json"),
    ]
    done = subprocess.run(command, env=service.env, capture_output=True, text=True, timeout=FINISH_S, check=False)
    assert done.returncode == 0, done.stderr[-1000:] + done.stdout[-3000:]
    assert '"status": "COMPLETED"' in done.stdout


def test_the_cookbooks_ways_to_a_service(service, tmp_path):
    """A recipe by `tuneyard submit` as the page has it, and examples/client.py, both on the tiny model."""
    rows_of_recipe = (REPO / "examples/cookbook/chat.jsonl").read_bytes()
    service.s3().put_object(Bucket=DATASETS, Key="chat.jsonl", Body=rows_of_recipe)
    dataset = f"s3://{DATASETS}/chat.jsonl"
    page = (REPO / "docs/cookbook.md").read_text()
    moved = ("--set", "dataset_details.source_type=s3", "--set", "dataset_details.ownership=private")
    assert " ".join(moved) in page
    where = ("--gpu-type", "h100", "--dataset", dataset, "--secret-id", service.secret_id, *moved)
    tiny = ("--base-model", TINY, "--max-steps", "2")
    submitted = service.run("submit", str(REPO / "examples/cookbook/lora.json"), *where, *tiny, "--json")

    example = (REPO / "examples/submit.yaml").read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in example
    (tmp_path / "submit.yaml").write_text(example.replace("HuggingFaceTB/SmolLM2-135M-Instruct", TINY))
    (tmp_path / "client.py").write_text((REPO / "examples/client.py").read_text())
    given = {"URL": service.up["url"], "TOKEN": service.token, "SECRET_ID": service.secret_id, "DATASET": dataset}
    done = subprocess.run(
        [sys.executable, tmp_path / "client.py"],
        env=service.env | given | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=FINISH_S,
        check=True,
    )
    assert "COMPLETED done" in done.stdout
    assert "/adapter" in done.stdout.splitlines()[-1]
    job = service.wait(json.loads(submitted.stdout)["request_id"])
    assert (job["status"], job["step"]) == ("COMPLETED", 2), job["error_message"]


def test_a_ray_job_is_listed_stopped_with_a_checkpoint_and_gone_on_with_and_its_keys_show_nowhere(service, tmp_path):
    canary = {"AWS_ACCESS_KEY_ID": service.keys["access_key_id"], "AWS_SECRET_ACCESS_KEY": service.keys["secret_access_key"]}
    keys, working_dir, hp = tmp_path / "keys.json", tmp_path / "working_dir", "train_config.hyperparameters"
    write_private(keys, json.dumps(canary | {"AWS_ENDPOINT_URL": service.keys["endpoint_url"]}))
    working_dir.mkdir()
    changes = {f"{hp}.max_steps": 5000, REJECTS: 0.1, "dataset_details.secret_id": None, "dataset_details.ownership": "public"}
    ray = [str(Path(sys.executable).parent / "ray"), "job"]
    dashboard = service.up["dashboard_url"]
    request_id = str(uuid.uuid4())
    run = ["--request-id", request_id, "--keys", str(keys), "--storage", f"s3://{DATASETS}/runs"]

    def submitted(id_):
        (working_dir / "job.json").write_text(json.dumps(service.job("by-ray", changes)))
        where = ["--address", dashboard, "--submission-id", id_, "--working-dir", str(working_dir)]
        entrypoint = ["--", sys.executable, "-m", "train_loop", "job.json", *run]
        command = [*ray, "submit", "--runtime-env", str(REPO / "examples" / "ray_job.yaml"), *where, *entrypoint]
        return subprocess.Popen(
            command,
            env=service.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )

    def status(id_):  # as `ray job status` has it, which takes seconds to start
        return httpx.get(f"{dashboard}/api/jobs/{id_}").raise_for_status().json()["status"]

    def asked(*arguments):
        command = [*ray, *arguments, "--address", dashboard]
        return subprocess.run(command, env=service.env, capture_output=True, text=True, timeout=FINISH_S, check=True).stdout

    following = submitted("first")
    for line in following.stdout:
        if "step 5/" in line:
            break
    following.send_signal(signal.SIGINT)  # ends what follows it, and not the job
    following.communicate(timeout=FINISH_S)
    assert status("first") == "RUNNING"
    run_on = service.wait(request_id, lambda job: job["step"] >= 5)
    assert (run_on["status"], run_on["phase"], run_on["ray_job"]) == ("RUNNING", "training", "first")
    assert f"{request_id}  RUNNING" in service.run("list").stdout
    for page in ("api/jobs/", "api/v0/actors?detail=1", "api/v0/workers?detail=1"):
        shown = httpx.get(f"{dashboard}/{page}").raise_for_status().text
        assert not any(value in shown for value in canary.values()), page
    asked("stop", "first")
    assert "was stopped" in asked("status", "first")
    assert f"STOPPED; go on with --request-id {request_id}" in asked("logs", "first")
    stopped = service.wait(request_id)
    assert stopped["status"] == "CANCELED", service.describe(request_id, stopped)

    following = submitted("second")
    service.wait(request_id, lambda job: job["attempt"] == 2 and job["step"] > stopped["step"])
    service.client.cancel(request_id, ORG)
    following.communicate(timeout=FINISH_S)
    canceled = service.wait(request_id)
    assert (canceled["status"], canceled["ray_job"]) == ("CANCELED", "second"), service.describe(request_id, canceled)
    assert status("second") == "STOPPED"
    with pytest.raises(ApiError, match=f"--request-id {request_id}") as caught:
        service.client.resume(request_id, ORG)
    assert caught.value.status == 409

    changes[f"{hp}.max_steps"] = canceled["step"] + 3
    out, _ = submitted("third").communicate(timeout=FINISH_S)
    assert f"resumed from the checkpoint of step {canceled['step']}" in out
    assert '"status": "COMPLETED"' in out
    assert status("third") == "SUCCEEDED"
    done = service.wait(request_id)
    assert (done["status"], done["attempt"], done["step"]) == ("COMPLETED", 3, canceled["step"] + 3)
    assert done["output_model_path"] in out
    query = {"org": ORG, "request_id": request_id}
    assert service.client.metrics(**query)["points"][-1]["step"] == done["step"]
    assert any("loss" in entry["line"] for entry in service.client.logs(**query)["logs"])
    told = [*service.client.logs(**query)["logs"], *service.client.events(**query)["events"], done]
    assert not any(value in json.dumps(told) for value in canary.values())


def test_the_command_line(service, tmp_path):
    assert json.loads(service.run("up", "--detach", "--json").stdout) == service.up
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(service.job("from-file")))
    missing = service.run("submit", str(path), "--dataset", f"s3://{DATASETS}/missing.jsonl", "--json")
    request_id = json.loads(missing.stdout)["request_id"]
    watched = service.run("watch", request_id, check=False)
    assert watched.returncode == 1
    assert "there is no object at" in watched.stdout
    assert json.loads(service.run("status", request_id, "--json").stdout)["status"] == "FAILED"
    assert request_id in service.run("list").stdout
    long = service.run("submit", str(path), "--max-steps", "100000", "--set", f"{REJECTS}=0.1", "--json")
    running = json.loads(long.stdout)["request_id"]
    service.wait(running, lambda job: job["step"] >= 1)
    assert "CANCELED" not in service.run("cancel", running).stdout
    assert service.wait(running)["status"] == "CANCELED"
    bad = service.run("submit", str(path), "--learning-rate", "7", "--json", check=False)
    assert bad.returncode == 1
    assert "learning_rate" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_a_drained_job_waits_and_goes_on_where_it_was(service):
    def running(*arguments):
        return json.loads(service.run("admin", *arguments, "--json").stdout)["running"]

    job = service.job("drained", {REJECTS: 0.1, "train_config.hyperparameters.max_steps": 200})
    request_id = service.client.submit(job)["request_id"]
    service.wait(request_id, lambda job: job["step"] >= 3, every_s=0.1)
    assert running("drain", "--wait-s", "240") == 0
    waits = service.client.get(request_id, ORG)
    points = service.client.metrics(request_id, ORG)["points"]
    assert (waits["status"], waits["phase"], waits["attempt"], waits["step"] < 200) == ("QUEUED", "queued", 1, True)
    assert "paused" in waits["message"]
    assert httpx.get(f"{service.up['url']}/readyz").json()["status"] == "paused"
    told = json.loads(service.run("admin", "doctor", "--json").stdout)
    assert [f for f in told["findings"] if f["level"] == "FAIL"] == []
    assert {"ray", "profiles", "dispatcher"} <= {f["check"] for f in told["findings"] if f["level"] == "ok"}
    service.run("admin", "unpause")
    on = service.wait(request_id, lambda job: job["step"] > waits["step"] or job["status"] in FINAL)
    assert on["attempt"] == 2, service.describe(request_id, on)
    after = service.client.metrics(request_id, ORG)["points"]
    assert after[: len(points)] == points  # no step was taken twice
    service.client.cancel(request_id, ORG)
    assert service.wait(request_id)["status"] == "CANCELED"
    kinds = [e["kind"] for e in service.client.events(request_id, ORG)["events"]]
    assert [k for k in kinds if k in ("yield_requested", "requeued", "started")] == [
        *("started", "yield_requested", "requeued", "started")
    ]
    logged = [json.loads(line) for line in service.run("admin", "audit", "--json").stdout.splitlines()]
    submitted, _ = [entry for entry in logged if entry["object"] == request_id]
    assert (submitted["action"], submitted["org_id"], submitted["address"]) == ("job.submit", ORG, "127.0.0.1")
    assert [a for entry in logged if (a := entry["action"]).startswith("admin.")] == ["admin.drain", "admin.unpause"]
