"""`tuneyard admin …`, over both databases, as the operator types it; and what the service then says."""

import datetime as dt
import getpass
import json

import pytest
from typer.testing import CliRunner

from serve_app import cli
from serve_app.cli.failures import in_words
from serve_app.lifecycle import Status
from serve_app.store.jobs import JobStore
from tests.conftest import CANARY, DOCUMENTED, ORG, OTHER_ORG, fields, with_fields
from tests.serve_app.test_client_and_cli import tuneyard
from train_loop.spec import JobSpec


def pytest_generate_tests(metafunc):
    """Everything here holds on both databases."""
    if "store" in metafunc.fixturenames:
        metafunc.parametrize("store", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def admin(store, monkeypatch):
    """Types a command; what it prints, as JSON unless it isn't asked for."""
    monkeypatch.setenv("TUNEYARD_DATABASE_URL", store.engine.url.render_as_string(hide_password=False))

    def run(*arguments, as_json=True, status=0):
        done = CliRunner().invoke(cli.app, ["admin", *arguments, *(["--json"] if as_json else [])])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == status, done.output
        if not as_json:
            return done.output
        return [json.loads(line) for line in done.stdout.splitlines()] if arguments[0] == "audit" else json.loads(done.stdout)

    return run


def submit(store, name="job", org=ORG, **infra):
    given = {"experiment_name": name, "org": org, "infra_config": DOCUMENTED["infra_config"] | infra}
    return store.insert(JobSpec.model_validate(with_fields(DOCUMENTED, given)), "queued")[0].request_id


def test_orgs_are_listed_with_what_they_have_and_had(admin, store):
    done, runs, _ = (submit(store, name) for name in ("done", "runs", "waits"))
    store.start_attempt(done, 0, 2)
    store.report(done, 1, ran_s=1800.0)
    store.finish(done, 1, Status.FAILED, message="x")
    store.resume(done)
    store.start_attempt(done, 1, 1)
    store.report(done, 2, ran_s=1800.0)  # counted anew since the resume, on half of the nodes
    store.finish(done, 2, Status.COMPLETED, message="x")
    store.start_attempt(runs, 0, 2)
    admin("quota", OTHER_ORG, "--max-gpus", "3")
    none = {"max_running_jobs": None, "max_gpus": None, "max_queued_jobs": 1000}
    mine = {"queued": 1, "running": 1, "finished": 1, "workers": 4, "worker_hours": 3.0, "quota": none, "own_quota": {}}
    theirs = {"queued": 0, "running": 0, "finished": 0, "workers": 0, "worker_hours": 0.0}
    theirs |= {"quota": none | {"max_gpus": 3}, "own_quota": {"max_gpus": 3}}
    assert admin("orgs") == {"orgs": [{"org": ORG, **mine}, {"org": OTHER_ORG, **theirs}]}
    shown = admin("orgs", as_json=False).splitlines()
    assert max(map(len, shown[:-1])) <= 80
    assert [line.split() for line in shown[:2]] == [["worker-"], ["org", "queued", "running", "workers", "finished", "hours"]]
    assert [line.split() for line in shown[2:-1]] == [
        [ORG, "1/1000", "1/-", "4/-", "1", "3.0"],
        [OTHER_ORG, "0/1000", "0/-", "0/3*", "0", "0.0"],
    ]


def test_a_quota_counts_at_once_for_what_is_submitted(admin, http, job):
    def submitted(name, **infra):
        changes = {"experiment_name": name} | {f"infra_config.{k}": v for k, v in infra.items()}
        return http.post("/job/", json=with_fields(job, changes))

    assert submitted("a", gpu_count=2, node_count=2).status_code == 200
    admin("quota", ORG, "--max-gpus", "3", "--max-queued-jobs", "2")
    wrong = fields(submitted("b", gpu_count=2, node_count=2))
    assert "more than this org's quota of 3" in wrong["infra_config.node_count"]["message"]
    assert submitted("b", gpu_count=3, node_count=1).status_code == 200
    full = submitted("c", gpu_count=1, node_count=1)
    assert (full.status_code, "2 jobs of this org are waiting" in full.json()["detail"]) == (429, True)
    told = admin("quota", ORG, "--max-queued-jobs", "3")
    assert told["own_quota"] == {"max_gpus": 3, "max_queued_jobs": 3}  # the other one is left alone
    assert submitted("c", gpu_count=1, node_count=1).status_code == 200
    assert admin("quota", ORG, "--clear")["own_quota"] == {}
    assert submitted("d", gpu_count=2, node_count=2).status_code == 200
    assert [e["object"] for e in admin("audit") if e["action"] == "admin.quota"] == [
        "max_gpus 3, max_queued_jobs 2",
        "max_gpus 3, max_queued_jobs 3",
        "the settings'",
    ]
    assert "(the settings')" in admin("quota", ORG, as_json=False)


def test_a_pause_is_told_to_everybody_and_ends(admin, http, job):
    def status(request_id):
        return http.get(f"/job/{request_id}").json()

    before = http.post("/job/", json=job).json()
    assert admin("pause")["paused"] is True
    ready = http.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "paused")
    during = http.post("/job/", json=with_fields(job, {"experiment_name": "during"})).json()
    for request_id in (before["request_id"], during["request_id"]):
        assert status(request_id)["message"].endswith("The operator has paused the service: nothing starts until it goes on.")
    assert "The operator has paused the service" in during["message"]
    listed = http.get("/job/list/", params={"org_id": ORG}).json()["jobs"]
    assert all("paused" in told["message"] for told in listed)
    assert f"by admin:{getpass.getuser()}" in admin("pause", as_json=False)
    assert admin("unpause") == {"paused": False, "drains": False, "since": None, "by": None, "running": 0, "waiting_for_retry": 0}
    assert http.get("/readyz").json() == {"status": "ready"}
    assert status(before["request_id"])["message"] == before["message"]
    admin("unpause")
    done = [e["action"] for e in admin("audit") if e["action"].startswith("admin.")]
    assert done == ["admin.pause", "admin.pause", "admin.unpause"]  # nothing was done by the second one


def test_a_running_job_says_nothing_of_a_pause(admin, http, store):
    running = submit(store)
    store.start_attempt(running, 0, 2)
    admin("pause")
    assert http.get(f"/job/{running}").json()["message"] == "Running on 4 workers."


def test_a_drain_says_whether_something_runs_after_all(admin, store):
    running = submit(store)
    store.start_attempt(running, 0, 2)
    told = admin("drain", "--wait-s", "1", status=1)  # no dispatcher is there to do it
    assert (told["drains"], told["running"]) == (True, 1)
    store.ask_to_yield(running, 1, "asked")
    store.give_back(running, 1)
    assert admin("drain", "--wait-s", "60")["running"] == 0
    assert admin("pause")["drains"] is False


def test_jobs_of_any_org_go_back_into_the_queue(admin, store):
    failed, canceled, running, waits, done = (submit(store, n, OTHER_ORG) for n in ("a", "b", "c", "d", "e"))
    for request_id in (failed, running, done):
        store.start_attempt(request_id, 0, 1)
    store.finish(failed, 1, Status.FAILED, message="x")
    store.finish(done, 1, Status.COMPLETED, message="x")
    store.request_cancel(canceled)
    admin("quota", OTHER_ORG, "--max-queued-jobs", "1")  # is the org's, not the operator's
    assert [admin("requeue", r)["status"] for r in (failed, canceled)] == ["QUEUED", "QUEUED"]
    assert admin("requeue", running) == {"request_id": running, "org": OTHER_ORG, "status": "RUNNING", "attempt": 1}
    assert store.get(running).yield_requested_at is not None
    assert (store.give_back(running, 1).status, store.get(running).faults) == (Status.QUEUED, 0)
    for request_id, said in ((waits, "is QUEUED"), (done, "is COMPLETED"), (ORG, "no job")):
        assert said in admin("requeue", request_id, as_json=False, status=1)
    assert "isn't a request_id" in admin("requeue", "x", as_json=False, status=2)
    assert [(e["object"], e["org_id"]) for e in admin("audit") if e["action"] == "admin.requeue"] == [
        (request_id, OTHER_ORG) for request_id in (failed, canceled, running)
    ]


def test_a_job_to_be_canceled_is_not_requeued(admin, store):
    running = submit(store)
    store.start_attempt(running, 0, 1)
    store.request_cancel(running)
    assert "being canceled" in admin("requeue", running, as_json=False, status=1)


def test_gc_says_what_goes_and_what_went(admin, store, monkeypatch):
    monkeypatch.setenv("TUNEYARD_KEEP_JOURNAL_DAYS", "0")
    done = submit(store)
    store.request_cancel(done)
    assert admin("gc", "--dry-run") == {"dry_run": True, "removed": admin("gc", "--dry-run")["removed"]}
    assert len(store.journal.events(done)) == 2
    assert admin("gc")["removed"]["journals"] == 1
    assert [e.kind for e in store.journal.events(done)] == ["journal_removed"]
    assert "     0  jobs' log lines" in admin("gc", as_json=False)
    assert [e["object"] for e in admin("audit")] == ["journals 1", None]


def test_the_log_is_read_by_org_and_time(admin, http, job, store):
    request_id = http.post("/job/", json=job).json()["request_id"]
    admin("pause")
    (added, submitted) = admin("audit", "--org", ORG)
    assert (submitted["who"], submitted["action"], submitted["object"]) == ("tester", "job.submit", request_id)
    assert CANARY not in json.dumps(added)
    assert admin("audit", "--since", f"{dt.datetime.now(dt.UTC) + dt.timedelta(days=1):%Y-%m-%d}") == []
    assert [e["action"] for e in admin("audit", "--limit", "1")] == ["admin.pause"]
    assert f"tester  job.submit  {request_id}  done  {ORG}  testclient" in admin("audit", as_json=False)


def test_a_backup_is_made_and_put_back(admin, store, tmp_path):
    submit(store)
    file = tmp_path / "b.jsonl.zst"
    made = admin("backup", str(file))
    assert (made["rows"]["jobs"], made["size_bytes"]) == (1, file.stat().st_size)
    with pytest.raises(Exception, match="isn't empty") as caught:
        admin("restore", str(file))
    assert in_words(caught.value)[1] == 1
    assert admin("restore", str(file), "--force")["rows"] == made["rows"]
    assert [e["action"] for e in admin("audit")] == ["admin.restore"]


def test_the_operator_s_commands_need_this_version_s_schema(admin, store):
    store.downgrade("0004")
    assert "run tuneyard db upgrade" in admin("orgs", as_json=False, status=1)
    store.migrate()


def test_a_backup_that_can_not_be_restored_is_a_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"something else")
    JobStore.open(f"sqlite:///{tmp_path}/tuneyard.db").migrate()
    refused = tuneyard(tmp_path, "admin", "restore", str(tmp_path / "file"))
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert "nothing was changed" in refused.stderr
