"""What stands before Serve's proxy, over a socket; what the proxy makes of it is in tests/service."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx
import pytest
import uvicorn

from serve_app.access import RequestId
from serve_app.proxy import BodyLimit, Problems, for_proxy

LIMIT = 1000
WAIT_S = 10


@contextlib.contextmanager
def served(app):
    """The address of an HTTP server with this app behind both."""
    server = uvicorn.Server(uvicorn.Config(BodyLimit(Problems(app), LIMIT), port=0, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + WAIT_S
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join(WAIT_S)


async def count(scope, receive, send):
    """Answers with the length of the body, once it has all of it."""
    length = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length += len(message["body"])
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


@pytest.fixture(scope="module")
def counting():
    with served(count) as (host, port):
        yield f"http://{host}:{port}"


@pytest.mark.parametrize("length", [0, 1, LIMIT])
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_within_the_limit_passes(counting, length, declared):
    body = b"x" * length
    answer = httpx.post(counting, content=body if declared else (body[i : i + 100] for i in range(0, length, 100)))
    assert (answer.status_code, answer.text) == (200, str(length))


@pytest.mark.parametrize("length", [LIMIT + 1, 1 << 24])
@pytest.mark.parametrize("declared", [True, False])
def test_a_longer_one_is_a_problem_that_the_client_gets_to_read(counting, length, declared):
    body = b"x" * length
    answer = httpx.post(counting, content=body if declared else (body[i : i + 4096] for i in range(0, length, 4096)))
    assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")
    assert answer.json()["detail"] == f"the body must be at most {LIMIT} bytes"


@pytest.mark.parametrize("declared", ["10737418240", "9" * 19])
def test_what_is_declared_too_long_is_refused_before_anything_is_sent(counting, declared):
    at = httpx.URL(counting)
    with socket.create_connection((at.host, at.port), timeout=WAIT_S) as client:
        client.sendall(f"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: {declared}\r\nExpect: 100-continue\r\n\r\n".encode())
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


@pytest.fixture
def hooked(monkeypatch):
    """A server as Serve starts one after it has called the hook."""
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    for_proxy()
    with served(count) as address:
        yield address


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
    ],
    ids=["no request", "version", "header", "null byte", "length", "chunk"],
)
def test_what_is_not_http_is_a_problem(hooked, sent):
    with socket.create_connection(hooked, timeout=WAIT_S) as client:
        client.sendall(sent)
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    line, *headers = head.decode().split("\r\n")
    assert line == "HTTP/1.1 400 Bad Request"
    assert {"content-type: application/problem+json", f"content-length: {len(body)}", "connection: close"} <= set(headers)
    assert json.loads(body)["status"] == 400


def test_what_is_http_is_answered_as_before(hooked):
    answer = httpx.post(f"http://{hooked[0]}:{hooked[1]}", content=b"xyz")
    assert (answer.status_code, answer.text) == (200, "3")


def test_an_answer_that_has_begun_stays_when_the_body_grows_too_long():
    async def answer_first(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.body", "body": b"no"})

    with served(answer_first) as (host, port), socket.create_connection((host, port), timeout=WAIT_S) as client:
        client.sendall(b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.sendall(b"3e9\r\n" + b"x" * 0x3E9 + b"\r\n")
        answer = client.recv(1 << 16)
        while not answer.endswith(b"no"):
            answer += client.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_other_protocols_pass():
    passed = []

    async def app(scope, receive, send):
        passed.append(scope["type"])

    asyncio.run(BodyLimit(Problems(app), LIMIT)({"type": "websocket"}, None, None))
    assert passed == ["websocket"]


def answering(*messages):
    """An app that sends these and ends."""

    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    return app


def plain(status, kind="text/plain; charset=utf-8"):
    start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]}
    return answering(start, {"type": "http.response.body", "body": b"words of Serve"})


@pytest.mark.parametrize("app", [answering(), plain(404), plain(408), plain(503)], ids=["nothing", "404", "408", "503"])
def test_what_the_proxy_says_itself_becomes_a_problem_to_come_again_after(app):
    with served(app) as (host, port):
        answer = httpx.post(f"http://{host}:{port}/job/", content=b"x")
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
    assert int(answer.headers["Retry-After"]) > 0
    assert "Serve" not in answer.text


@pytest.mark.parametrize(("status", "kind"), [(200, "text/plain"), (503, "application/problem+json"), (404, "text/html")])
def test_what_the_service_says_passes(status, kind):
    with served(plain(status, kind)) as (host, port):
        answer = httpx.get(f"http://{host}:{port}")
    assert (answer.status_code, answer.headers["content-type"], answer.text) == (status, kind, "words of Serve")


def test_nobody_is_told_what_runs_on_this_serve():
    with served(plain(200, "application/json")) as (host, port):
        answers = [httpx.request(method, f"http://{host}:{port}/-/routes") for method in ("GET", "HEAD", "POST")]
        assert httpx.get(f"http://{host}:{port}/-/healthz").status_code == 200
    assert {(a.status_code, a.headers["content-type"]) for a in answers} == {(404, "application/problem+json")}
    assert "Serve" not in answers[0].text


@pytest.mark.parametrize(("given", "told"), [("a-1", "a-1"), ("a b", None), (None, None)])
def test_every_answer_tells_the_id_that_what_is_behind_was_given_once(given, told):
    seen = {}

    async def echo(scope, receive, send):
        seen["headers"] = [value for name, value in scope["headers"] if name == b"x-request-id"]
        headers = [(b"x-request-id", b"of the app"), (b"X-Request-ID", b"of Serve")]
        await send({"type": "http.response.start", "status": 200, "headers": [(n.lower(), v) for n, v in headers]})
        await send({"type": "http.response.body", "body": b""})

    with served(RequestId(echo)) as (host, port):
        answer = httpx.get(f"http://{host}:{port}", headers={"X-Request-Id": given} if given else {})
    (found,) = answer.headers.get_list("x-request-id")
    assert seen["headers"] == [found.encode()]
    assert told in (None, found)
