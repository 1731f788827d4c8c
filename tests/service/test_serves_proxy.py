"""Serve's proxy over a socket: bodies over the limit are refused before they are read, and what dies behind it is a problem."""

import json
import select
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.conftest import ORG
from tests.running import members

pytestmark = pytest.mark.service
CHUNK = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
GROWTH_BYTES = 32 << 20
ANSWER_S = 30


@pytest.fixture(scope="module")
def jobs_before(service):
    """Those of the tests before: none of these here makes any."""
    return jobs(service)


@pytest.fixture
def replica(service):
    """The ingress, without which the proxy has to do: it is stopped meanwhile."""
    (found,) = titled(service, "ServeReplica")
    found.suspend()
    yield found
    found.resume()


def jobs(service):
    return [job["request_id"] for job in service.client.iter_jobs(ORG)]


def titled(service, title):
    return [p for p in members(service.state()["instance"]) if p.info["cmdline"][:1][0].startswith(f"ray::{title}")]


def request(service, line, *headers):
    """A socket on which a request was begun."""
    at = urlsplit(service.up["url"])
    client = socket.create_connection((at.hostname, at.port), timeout=ANSWER_S)
    said = (f"{line} HTTP/1.1", f"Host: {at.netloc}", f"Authorization: Bearer {service.token}", *headers, "", "")
    client.sendall("\r\n".join(said).encode())
    return client


def send_until_answered(client, most_bytes):
    """Send chunks until something comes back; how many bytes that were."""
    sent = 0
    while sent < most_bytes and not select.select([client], [], [], 0)[0]:
        client.sendall(CHUNK)
        sent += len(CHUNK)
    return sent


def answer_on(client):
    """The status, headers and JSON that this socket is answered with."""
    answer = client.makefile("rb")
    status = int(answer.readline().split()[1])
    headers = dict(line.decode().lower().strip().split(": ", 1) for line in iter(answer.readline, b"\r\n"))
    return status, headers, json.loads(answer.read(int(headers["content-length"])))


def problem_on(client):
    """The status of the refusal on this socket, which tells how long a body may be and that the connection ends."""
    status, headers, problem = answer_on(client)
    assert (headers["content-type"], headers["connection"]) == ("application/problem+json", "close")
    assert problem["status"] == status
    assert "1048576 bytes" in problem["detail"]
    return status


@pytest.mark.parametrize("line", ["POST /job/", "POST /secret/", "GET /healthz"])
def test_who_declares_too_much_and_sends_nothing_is_refused(service, line):
    with request(service, line, "Content-Type: application/json", f"Content-Length: {10 << 30}") as client:
        assert problem_on(client) == 413


def test_who_waits_to_be_told_to_go_on_is_told_no(service):
    with request(service, "POST /job/", f"Content-Length: {10 << 30}", "Expect: 100-continue") as client:
        assert problem_on(client) == 413


def test_a_malformed_request_is_a_problem(service):
    with request(service, "GET /healthz", "no header") as client:
        status, headers, problem = answer_on(client)
    assert (status, headers["content-type"], problem["status"]) == (400, "application/problem+json", 400)


@pytest.mark.parametrize("line", ["POST /job/", "GET /healthz"])
def test_a_body_without_an_end_is_cut_off_and_held_nowhere(service, replica, line):
    (proxy,) = titled(service, "ProxyActor")
    before = proxy.memory_info().rss
    with request(service, line, "Content-Type: application/json", "Transfer-Encoding: chunked") as client:
        sent = send_until_answered(client, 1 << 30)
        assert problem_on(client) == 413
    assert sent < GROWTH_BYTES  # of which most is in the kernel's buffers
    assert proxy.memory_info().rss - before < GROWTH_BYTES


def test_the_service_goes_on_after_clients_that_hang_up_in_their_bodies(service, jobs_before):
    for _ in range(20):
        with request(service, "POST /job/", "Content-Type: application/json", "Content-Length: 1000000") as client:
            client.sendall(b'{"org":')
            time.sleep(0.05)
    assert jobs(service) == jobs_before
    folder = Path(service.state()["ray_dir"], "session_latest", "logs")
    logs = [
        p for p in (*folder.glob("serve/*"), *folder.glob("worker-*")) if p.is_file()
    ]  # the raylet tells of kills of other tests
    assert any("ServeReplica" in p.read_text(errors="replace") for p in logs)
    assert not [p for p in logs if b"unexpected error" in p.read_bytes()]


def test_a_request_whose_replica_dies_is_a_problem_to_come_again_after(service, jobs_before):
    (replica,) = titled(service, "ServeReplica")
    with request(service, "POST /job/", "Content-Type: application/json", "Content-Length: 1000") as client:
        client.sendall(b'{"org":')
        time.sleep(1)  # until the replica waits for the rest: what no replica has begun with, Serve gives to another one
        replica.kill()
        status, headers, problem = answer_on(client)
    assert (status, headers["content-type"], problem["status"]) == (503, "application/problem+json", 503)
    assert int(headers["retry-after"]) > 0
    deadline = time.monotonic() + ANSWER_S
    while httpx.get(f"{service.up['url']}/readyz", timeout=ANSWER_S).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert jobs(service) == jobs_before
