"""What the service measures, as it is recorded on the way to Ray's metrics."""

import datetime as dt

import pytest

from serve_app import meter, metrics
from serve_app.lifecycle import Status
from serve_app.meter import NAMED_ORGS, OTHER_ORGS, QueueMeter, RunMeter
from serve_app.store.journal import Notes
from tests.conftest import DOCUMENTED, ORG, OTHER_ORG, with_fields
from train_loop.errors import Cause
from train_loop.spec import JobSpec
from train_loop.storage import AWAY, BACK


class Recorded(dict):
    """What was recorded, by metric and labels: the last value of a gauge, the sum of a counter, the values of a histogram."""

    def of(self, metric, **labels):
        return self.get((metric.name, frozenset(labels.items())))

    def series(self, metric):
        return {labels: value for (name, labels), value in self.items() if name == metric.name}


@pytest.fixture
def recorded(monkeypatch):
    seen = Recorded()
    record = metrics.Metric.record

    def noted(metric, value, **labels):
        record(metric, value, **labels)  # Ray's own checks of labels and types
        assert set(labels) == set(metric.labels)
        key = metric.name, frozenset(labels.items())
        before = seen.get(key)
        seen[key] = (
            value if metric.kind == "gauge" else (before or 0) + value if metric.kind == "counter" else [*(before or []), value]
        )

    monkeypatch.setattr(metrics.Metric, "record", noted)
    return seen


def submit(store, name, org=ORG):
    spec = with_fields(DOCUMENTED, {"experiment_name": name, "org": org, "infra_config.gpu_type": "cpu"})
    return store.insert(JobSpec.model_validate(spec), "queued")[0].request_id


def test_a_pass_tells_what_is_in_the_store(store, recorded):
    running, between, ended = (submit(store, name) for name in ("a", "b", "c"))
    submit(store, "d", OTHER_ORG)
    for job in (running, between, ended):
        store.start_attempt(job, 0, 1)
    store.report(running, 1)
    store.record_fault(between, 1, Cause.HANG, "no step.")
    store.finish(ended, 1, Status.COMPLETED, message="done")
    QueueMeter(store).passed(0.2)
    counts = {dict(labels)["state"]: value for labels, value in recorded.series(metrics.JOBS).items() if value}
    assert counts == {"queued": 1, "running": 1, "retrying": 1, "completed": 1}
    assert recorded.of(metrics.JOBS, state="queued", org=OTHER_ORG) == 1
    assert recorded.of(metrics.JOBS, state="failed", org=OTHER_ORGS) == 0  # it is there before there are any
    assert recorded.of(metrics.WORKERS, org=ORG) == store.get(running).num_workers
    assert recorded.of(metrics.PASS_TIME) == [0.2]
    assert recorded.of(metrics.PASSES, outcome="done") == 1
    assert 0 <= recorded.of(metrics.OLDEST_QUEUED) < 60
    assert 0 <= recorded.of(metrics.HEARTBEAT_AGE) < 60


def test_the_age_of_what_waits_longest(store, recorded):
    store._now = lambda: dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
    submit(store, "old")
    store._now = lambda: dt.datetime.now(dt.UTC)
    submit(store, "new")
    QueueMeter(store).passed(0)
    assert 3600 <= recorded.of(metrics.OLDEST_QUEUED) < 3660


@pytest.mark.parametrize("store", ["sqlite", "postgresql"], indirect=True)
def test_faults_and_outages_are_counted_once_each_from_the_first_look_on(store, recorded, monkeypatch):
    monkeypatch.setattr(meter, "LOOK_S", 0.0)
    before, job = submit(store, "before"), submit(store, "job")
    store.start_attempt(before, 0, 1)
    store.record_fault(before, 1, Cause.HANG, "no step.")
    measure = QueueMeter(store)
    measure.passed(0)
    store.start_attempt(job, 0, 1)
    store.report(job, 1, Notes(events=[("storage_away", f"{AWAY} (reading x); waiting"), ("storage_away", f"{BACK} after 3 s")]))
    store.record_fault(job, 1, Cause.STORAGE_AWAY, "The storage was away for 300 s.")
    for _ in range(3):
        measure.passed(0)
    counted = {dict(labels)["cause"]: value for labels, value in recorded.series(metrics.FAULTS).items() if value}
    assert counted == {"storage_away": 1}
    assert recorded.of(metrics.STORAGE_OUTAGES, process="run") == 1


def test_however_many_orgs_there_are_few_are_named():
    counts = {("queued", f"org-{i}"): i + 1 for i in range(500)} | {("running", "org-0"): 1000}
    told = meter.by_named_org(counts, ["queued", "running"])
    assert len({org for _, org in told}) == NAMED_ORGS + 1
    assert told["running", "org-0"] == 1000
    assert sum(told.values()) == sum(counts.values())
    assert told["queued", OTHER_ORGS] == sum(i + 1 for i in range(1, 500 - NAMED_ORGS + 1))


def test_a_run_tells_what_its_status_tells(store, recorded):
    job = store.get(submit(store, "run"))
    point = {"step": 3, "loss": 2.5, "tokens_per_second": 70.0, "memory_bytes": 9}
    live = {"phase": "training", "step": 4, "total_steps": 9, "metrics": {"last": point, "eval_loss_after": None}}
    run = RunMeter(job, 2)
    run.show({"phase": "preparing_data"}, None, 100.0)
    assert recorded.series(metrics.JOB_LOSS) == {}
    run.show(live, 0.5, 123.0)
    of_job = {"request_id": job.request_id, "org": ORG, "experiment": "run"}
    wanted = {metrics.JOB_STEP: 4, metrics.JOB_TOTAL_STEPS: 9, metrics.JOB_ATTEMPT: 2, metrics.JOB_LOSS: 2.5}
    wanted |= {metrics.JOB_TOKENS: 70.0, metrics.JOB_STEP_TIME: 0.5, metrics.JOB_MEMORY: 9}
    assert {m.name: recorded.of(m, **of_job) for m in wanted} == {m.name: value for m, value in wanted.items()}
    assert recorded.of(metrics.JOB_PROGRESS, **of_job, phase="training") == 123.0
    assert recorded.series(metrics.JOB_EVAL_LOSS) == {}


def test_a_request_is_timed_by_its_route_whatever_the_path(http, recorded):
    for path in (
        "/job/00000000-0000-0000-0000-000000000001",
        "/job/00000000-0000-0000-0000-000000000002/",
        "/nothing",
        "/healthz",
    ):
        http.get(path)
    http.request("BREW", "/healthz")
    told = {tuple(sorted(dict(labels).items())) for labels in recorded.series(metrics.HTTP_TIME)}
    assert told == {
        (("method", "GET"), ("route", "/job/{request_id}"), ("status", "4xx")),
        (("method", "GET"), ("route", "none"), ("status", "4xx")),
        (("method", "GET"), ("route", "/healthz"), ("status", "2xx")),
        (("method", "other"), ("route", "/healthz"), ("status", "4xx")),
    }


def test_only_what_lasts_counts_and_only_a_run_names_its_job():
    for metric in metrics.METRICS:
        assert metric.kind in ("gauge", "counter", "histogram")
        assert ("request_id" in metric.labels) == metric.name.startswith("tuneyard_job_")
        assert metric.kind == "gauge" or "request_id" not in metric.labels
    assert len({metric.name for metric in metrics.METRICS}) == len(metrics.METRICS)
