"""What lines of logs have, and may not show."""

import json
import re
import subprocess
import sys

import pytest
from starlette.testclient import TestClient

from serve_app.access import request_id_of
from serve_app.app import build_app
from tests.conftest import ORG, Idle


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_all_that_a_request_logs_has_its_id_and_the_jobs(http, job, capsys):
    given = {"X-Request-Id": "from-outside-1"}
    request_id = http.post("/job/", json=job | {"infra_config": {"gpu_type": "cpu"}}, headers=given).json()["request_id"]
    said = {line["event"]: line for line in lines(capsys)}
    assert said.keys() >= {"submitted", "request"}
    for event in ("submitted", "request"):
        assert (said[event]["request_id"], said[event]["http_request_id"]) == (request_id, "from-outside-1")
    assert (said["request"]["method"], said["request"]["path"], said["request"]["status"]) == ("POST", "/job/", 200)
    named = {"org_id": ORG, "request_id": request_id}
    http.get("/job/get/", params=named)
    http.get(f"/job/{request_id}")
    http.post("/job/cancel/", json=named)
    http.post("/job/resume/", json=named)
    said = lines(capsys)
    assert {line["event"] for line in said} == {"request", "cancel requested", "resumed"}
    assert {line["request_id"] for line in said} == {request_id}  # also where only the query or the body names it
    assert len({line["http_request_id"] for line in said}) == 4


def test_another_request_isnt_about_the_same_job_and_probes_have_no_line(http, job, capsys):
    http.post("/job/", json=job | {"infra_config": {"gpu_type": "cpu"}})
    capsys.readouterr()
    http.get("/job/list/", params={"org_id": ORG})
    for probe in ("/healthz", "/readyz/"):
        http.get(probe)
    (line,) = lines(capsys)
    assert "request_id" not in line


def test_what_fails_has_a_line_too(settings, store, capsys):
    app = build_app(settings, store, Idle())

    @app.get("/broken")
    def broken():
        raise ValueError("nobody foresaw this")

    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/broken", headers={"X-Request-Id": "x"}).status_code == 500
    said = {line["event"]: line for line in lines(capsys)}
    assert said["request"]["status"] == 500
    assert said["unexpected error"]["http_request_id"] == "x"


@pytest.mark.parametrize("given", [None, "", "a b", 'quote"', "x" * 129, "caf\u00e9"])
def test_an_id_that_is_none_is_replaced(given):
    headers = [] if given is None else [(b"x-request-id", given.encode("latin-1"))]
    assert re.fullmatch("[0-9a-f]{32}", request_id_of({"type": "http", "headers": headers}))


def test_what_train_loop_logs_in_a_jobs_process_is_json_with_its_id():
    code = "from serve_app import logs; logs.configure(request_id='r'); import logging; "
    code += "logging.getLogger('train_loop.storage').warning('the storage is %s', 'away')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = json.loads(done.stdout)
    assert (line["event"], line["request_id"], line["level"]) == ("the storage is away", "r", "warning")
