"""Who watches a service in tests: a real Prometheus with the files of deploy/, and a collector of traces."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serve_app.embedded.ports import free_ports

REPO = Path(__file__).parent.parent
TOOLS = REPO / ".prometheus/usr/bin"
DASHBOARDS = sorted((REPO / "deploy/grafana/dashboards").glob("*.json"))
ALERTS = REPO / "deploy/prometheus/alerts.yml"
WAIT_S = 120


def tool(name: str) -> Path:
    """Prometheus or promtool, as the Makefile puts them there."""
    assert (TOOLS / name).exists(), f"{name} isn't here: make .prometheus/usr/bin/promtool"
    return TOOLS / name


def dashboard_queries(dashboard: Path) -> list[tuple[str, str]]:
    """Title of the panel and expression of each query."""
    panels = json.loads(dashboard.read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", ())]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def tuneyard_names(text: str) -> set[str]:
    """The metrics of ours that a query names."""
    return set(re.findall(r"\bray_tuneyard_\w+", text))


class Prometheus:
    """A Prometheus of its own folder that scrapes what Ray lists, more often than deploy/prometheus.yml has it."""

    def __init__(self, folder: Path, discovery: Path) -> None:
        config = yaml.safe_load((ALERTS.parent / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(ALERTS)]
        (scrape,) = config["scrape_configs"]
        scrape["file_sd_configs"] = [{"files": [str(discovery)], "refresh_interval": "1s"}]
        path = folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self._log = (folder / "prometheus.log").open("w")
        command = [tool("prometheus"), f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--web.console.libraries=/nonexistent"]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=WAIT_S)
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return result

    def await_data(self, expressions: list[str]) -> None:
        """Until each has returned data at some time."""
        missing, deadline = list(expressions), time.monotonic() + WAIT_S
        while missing:
            with contextlib.suppress(httpx.TransportError):  # it starts
                missing = [expression for expression in missing if not self.query(expression)]
            assert time.monotonic() < deadline, f"no data: {missing}"
            time.sleep(0.5)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(WAIT_S)
        self._log.close()


@dataclass
class Spans:
    """What a collector of traces was sent: (service, span) in the order of arrival."""

    received: list[tuple[str, Any]] = field(default_factory=list)
    url: str = ""

    def handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        received = self.received

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
                    received.extend((service, span) for scope in resource.scope_spans for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler

    def of_job(self, request_id: str) -> dict[str, Any]:
        """The spans of its trace, by name."""
        return {span.name: span for _, span in self.received if span.trace_id.hex() == request_id.replace("-", "")}

    def await_names(self, request_id: str, names: set[str]) -> dict[str, Any]:
        deadline = time.monotonic() + WAIT_S
        while not names <= self.of_job(request_id).keys():
            assert time.monotonic() < deadline, f"only {self.of_job(request_id).keys()}"
            time.sleep(0.2)
        return self.of_job(request_id)
