"""OpenTelemetry traces, where the standard OTEL_EXPORTER_OTLP_ENDPOINT says where they go.

Elsewhere there are none: each call here returns at once, and loads nothing (Ray itself loads the SDK, FastAPI the API).

A job is one trace, and its id is the request_id, which as a UUID is just as long. The ids of the spans that others are below
follow from it too, so that no process has to hand anything to the next: whoever knows the job knows its trace.

    submit                  by the ingress, linked with the span of its HTTP request
    ├─ queued, launch       by the dispatcher, for each attempt
    └─ attempt              by its job actor
       └─ preparing_data, …   its phases
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from contextvars import ContextVar
from functools import cache
from typing import Any

import structlog

from serve_app.store.jobs import Job

log = structlog.get_logger()
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
NAME = "OTEL_SERVICE_NAME"
OF_JOB = "tuneyard.request_id"
LAST_WORDS_MS = 2000  # that an ending process gives a collector
UNTRACED = ("/healthz", "/readyz")

_next_ids: ContextVar[tuple[int, int] | None] = ContextVar("next_ids", default=None)  # of a trace and a span


@cache
def _provider() -> Any:
    """The SDK's provider of tracers; None where traces aren't configured."""
    if not any(os.environ.get(name) for name in ENDPOINTS) or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    except ImportError:
        log.warning(f"{ENDPOINTS[0]} is set, but there are no traces: pip install tuneyard[otel]")
        return None

    class Ids(RandomIdGenerator):
        def generate_trace_id(self) -> int:
            ids = _next_ids.get()
            return ids[0] if ids else super().generate_trace_id()

        def generate_span_id(self) -> int:
            ids = _next_ids.get()
            return ids[1] if ids else super().generate_span_id()

    provider = TracerProvider(
        resource=Resource.create({} if os.environ.get(NAME) else {"service.name": "tuneyard"}), id_generator=Ids()
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def of_requests() -> Any:
    """What FastAPI is told about telemetry: spans of requests go where ours do, and nothing else goes anywhere."""
    provider = _provider()
    return {
        "tracer_provider": provider,
        "tracing": provider is not None,
        **dict.fromkeys(("metrics", "logs", "operation_spans", "auto_configure"), False),
        "exclude": lambda scope: scope["path"].rstrip("/") in UNTRACED,
    }


def concerns(request_id: str) -> None:
    """Have the span of the HTTP request under way name the job that it is about."""
    if _provider() is not None:
        from opentelemetry import trace

        trace.get_current_span().set_attribute(OF_JOB, request_id)


def submitted(job: Job, began_ns: int) -> None:
    """The job is stored: begin its trace."""
    if _provider() is None:
        return
    from opentelemetry import trace

    request = trace.get_current_span()
    request.add_link(_context(job.request_id, "submit"))
    links = [trace.Link(request.get_span_context())] if request.get_span_context().is_valid else []
    _span(job, "submit", None, began_ns, name_id="submit", links=links)


def launched(job: Job, began_ns: int) -> None:
    """The dispatcher has started an attempt at the job, which as told here still waits for it."""
    attempt = {"tuneyard.attempt": job.attempt + 1}
    _span(job, "queued", "submit", _ns(job.waiting_since.timestamp()), began_ns, attributes=attempt)
    _span(job, "launch", "submit", began_ns, attributes=attempt)


class AttemptTrace:
    """An attempt's span and those of its phases, each sent when it ends."""

    def __init__(self, job: Job) -> None:
        self._job, self._began_ns = job, time.time_ns()
        self._phase: tuple[str, int] | None = None
        self._id = f"attempt {job.attempt}"

    def phase(self, name: str) -> None:
        """A phase begins, and the one before is over."""
        now = time.time_ns()
        if self._phase is not None:
            _span(self._job, self._phase[0], self._id, self._phase[1], now)
        self._phase = name, now

    def end(self, job: Job) -> None:
        """The attempt is over, and left the job like this. Waits, shortly, for what is still to be sent."""
        if (provider := _provider()) is None:
            return
        if self._phase is not None:
            _span(self._job, self._phase[0], self._id, self._phase[1])
        told = {"tuneyard.status": str(job.status), "tuneyard.attempt": self._job.attempt, "tuneyard.message": job.message}
        failed = job.message if job.error_code or job.retry_at else None
        _span(self._job, "attempt", "submit", self._began_ns, name_id=self._id, attributes=told, error=failed)
        provider.force_flush(LAST_WORDS_MS)


def _span(
    job: Job,
    name: str,
    parent: str | None,
    began_ns: int,
    ended_ns: int | None = None,
    *,
    name_id: str | None = None,
    attributes: dict[str, Any] | None = None,
    links: Any = (),
    error: str | None = None,
) -> None:
    """Make a whole span of the job's trace, below the one with the `parent` name; with `name_id` others can be below it."""
    if (provider := _provider()) is None:
        return
    from opentelemetry import trace
    from opentelemetry.context import Context

    above = Context()
    if parent is not None:
        above = trace.set_span_in_context(trace.NonRecordingSpan(_context(job.request_id, parent)), above)
    of_job = {OF_JOB: job.request_id, "tuneyard.org": job.org_id, "tuneyard.experiment": job.experiment_name}
    ids = _next_ids.set((_trace_id(job.request_id), _span_id(job.request_id, name_id))) if name_id else None
    try:
        made = provider.get_tracer("tuneyard").start_span(
            name, context=above, attributes=of_job | (attributes or {}), links=links, start_time=began_ns
        )
    finally:
        if ids is not None:
            _next_ids.reset(ids)
    if error is not None:
        made.set_status(trace.StatusCode.ERROR, error)
    made.end(ended_ns)


def _context(request_id: str, name_id: str) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    trace_id, span_id = _trace_id(request_id), _span_id(request_id, name_id)
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def _trace_id(request_id: str) -> int:
    return uuid.UUID(request_id).int


def _span_id(request_id: str, name_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{request_id} {name_id}".encode()).digest()[:8])


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
