"""A job's trace, as a collector of OTLP gets it."""

import subprocess
import sys

import pytest
from starlette.testclient import TestClient

from serve_app import traces
from serve_app.app import build_app
from serve_app.auth import mint_token
from serve_app.dispatcher import Passes
from serve_app.lifecycle import Status
from serve_app.scheduler import Shares
from serve_app.traces import AttemptTrace
from tests.conftest import DOCUMENTED, ORG, Idle, with_fields
from tests.observed import Spans
from tests.serve_app.simulated import SimCluster, World
from train_loop.errors import Cause
from train_loop.spec import JobSpec

OUTSIDE = "4bf92f3577b34da6a3ce929d0e0e4736"
LOADED = """
import sys
import serve_app.app, serve_app.dispatcher, serve_app.job_actor
serve_app.traces.of_requests()
print(sorted(name for name in sys.modules if name.startswith("opentelemetry.exporter.otlp")))
"""


@pytest.fixture
def spans(monkeypatch, serve):
    collected = Spans()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", serve(collected.handler()))
    traces._provider.cache_clear()
    yield collected
    traces._provider().shutdown()
    traces._provider.cache_clear()


def attributes(span):
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def test_all_that_happens_to_a_job_is_one_trace_whose_id_is_its_own(spans, settings, store, job):
    with TestClient(build_app(settings, store, Idle())) as http:
        http.headers["Authorization"] = f"Bearer {mint_token(settings, ORG, 'tester', 600)}"
        headers = {"traceparent": f"00-{OUTSIDE}-00f067aa0ba902b7-01"}
        answer = http.post("/job/", json=job | {"infra_config": {"gpu_type": "cpu"}}, headers=headers)
        http.get("/healthz")
    request_id = answer.json()["request_id"]
    world = World()
    world.now = store.get(request_id).created_at
    passes = Passes(settings.model_copy(update={"max_running_jobs": 0}), store, SimCluster(world), world.clock)
    passes._start(store.get(request_id), 1, Shares())
    attempt = AttemptTrace(store.get(request_id))
    attempt.phase("preparing_data")
    attempt.phase("training")
    attempt.end(store.finish(request_id, 1, Status.COMPLETED, message="done"))
    names = {"submit", "queued", "launch", "attempt", "preparing_data", "training"}
    of_job = spans.await_names(request_id, names)
    assert of_job.keys() == names
    root, run = of_job["submit"], of_job["attempt"]
    assert root.parent_span_id == b""
    assert {of_job[name].parent_span_id for name in ("queued", "launch", "attempt")} == {root.span_id}
    assert {of_job[name].parent_span_id for name in ("preparing_data", "training")} == {run.span_id}
    assert run.start_time_unix_nano <= of_job["training"].start_time_unix_nano <= of_job["training"].end_time_unix_nano
    assert attributes(run)["tuneyard.status"] == "COMPLETED"
    (request,) = [span for _, span in spans.received if span.name == "POST /job/"]
    assert request.trace_id.hex() == OUTSIDE  # the caller's own trace, linked with the job's both ways
    assert [link.span_id for link in request.links] == [root.span_id]
    assert [link.trace_id.hex() for link in root.links] == [OUTSIDE]
    assert attributes(request)["tuneyard.request_id"] == request_id
    assert {service for service, _ in spans.received} == {"tuneyard"}
    assert not [span for _, span in spans.received if "healthz" in span.name]


def test_an_attempt_that_a_fault_ends_is_an_error(spans, store):
    spec = JobSpec.model_validate(with_fields(DOCUMENTED, {"infra_config.gpu_type": "cpu"}))
    request_id = store.insert(spec, "queued")[0].request_id
    attempt = AttemptTrace(store.start_attempt(request_id, 0, 1))
    attempt.end(store.record_fault(request_id, 1, Cause.HANG, "no step."))
    span = spans.await_names(request_id, {"attempt"})["attempt"]
    assert (span.status.code, span.status.message[:24]) == (2, "Attempt 1 ended: no step")


def test_no_exporter_is_loaded_where_none_is_configured():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
