"""Requests to URLs that users name: what they reach, and what they must not."""

import ipaddress
import socket
import time

import pytest

from serve_app import endpoints, outbound
from serve_app.outbound import Poster, Unreached, target_of
from tests.serve_app.receivers import make_certificate, receiving

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HOST = "hooks.example"

INWARD = [
    *("127.0.0.1", "127.8.9.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "0.0.0.0", "169.254.169.254", "100.64.0.1"),
    *("100.100.100.200", "192.0.0.192", "198.18.0.1", "192.0.2.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fd20:ce::254", "fec0::1", "ff02::1", "2001:db8::1", "100::1"),
    *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::8.8.8.8", "64:ff9b::a9fe:a9fe", "64:ff9b::808:808"),
    *("64:ff9b:1::808:808", "2002:7f00:1::", "2002:808:808::1", "2001::1"),
]


@pytest.mark.parametrize("address", INWARD)
def test_what_is_no_public_address_is_never_reached(address):
    assert not endpoints.is_public(ipaddress.ip_address(address))
    with pytest.raises(Unreached, match="isn't a public one"):
        Poster(lambda host, port: ["8.8.8.8", address]).post(target_of(f"https://{HOST}/", []), {}, b"")


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001:80b::200e"])
def test_public_addresses_are_public(address):
    assert endpoints.is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::", "fd00:ec2::254", "0.0.0.0"]
)
def test_a_machines_credentials_are_out_of_reach_of_listed_hosts_too(address):
    with pytest.raises(Unreached, match="isn't a public one"):
        Poster(lambda host, port: [address]).post(target_of(f"http://{HOST}/", ["*"]), {}, b"")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://hooks.example/", "must be https"),
        ("ftp://hooks.example/", "must be https"),
        ("file:///etc/passwd", "isn't a URL"),
        ("https://user:pw@hooks.example/", "user or password"),
        ("https://user@hooks.example/", "user or password"),
        ("https://hooks.example/#x", "fragment"),
        ("https://hooks.example:25/", "port"),
        ("https://hooks.example:0/", "port"),
        ("https://hooks.example:99999/", "isn't a URL"),
        ("https://hooks.example\\@127.0.0.1/", "backslashes"),
        ("https://hooks.example/\n", "visible ASCII"),
        ("https://höoks.example/", "visible ASCII"),
        ("https://hooks .example/", "visible ASCII"),
        ("https://[::1/", "isn't a URL"),
        ("https:///path", "isn't a URL"),
        ("https://a_b.example/", "isn't a URL"),
        ("hooks.example", "isn't a URL"),
        ("https://" + "a" * 2048, "at most 2048"),
        *(
            (f"https://{host}/", "public one")
            for host in (
                *("127.0.0.1", "[::1]", "localhost", "LOCALHOST.", "printer", "db.internal", "a.local", "169.254.169.254"),
                *("metadata.google.internal", "2130706433", "0x7f.1", "017700000001", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]"),
            )
        ),
    ],
)
def test_a_url_that_will_not_do_is_refused_with_what_to_mend(url, said):
    with pytest.raises(ValueError, match=said):
        target_of(url, [])


def test_hosts_on_the_operators_list_may_be_inward_and_plain():
    for url in ("http://127.0.0.1:9/", "https://127.0.0.1:25/x?y=z", "http://[::1]/", "http://localhost"):
        assert target_of(url, LOOPBACK).is_listed
    assert target_of("https://127.0.0.1:25/x?y=z", LOOPBACK).path == "/x?y=z"
    assert not target_of("https://hooks.example:8443/", LOOPBACK).is_listed
    shown = {"https://a.example/": "a.example", "https://a.example:8443/": "a.example:8443", "http://[::1]/": "[::1]"}
    assert {url: target_of(url, LOOPBACK).authority for url in shown} == shown
    with pytest.raises(ValueError, match="public one"):
        target_of("http://169.254.169.254/", ["*"])


def test_a_name_that_stands_for_another_address_the_second_time_gains_nothing(monkeypatch):
    """DNS rebinding: the first answer passes, the next ones are the machine itself."""
    asked, connected = [], []

    def rebinds(host, port):
        asked.append(host)
        return ["8.8.8.8"] if len(asked) == 1 else ["127.0.0.1"]

    def connects(address, *arguments, **named):
        connected.append(address)
        raise ConnectionRefusedError

    with receiving() as receiver:
        monkeypatch.setattr(socket, "create_connection", connects)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("looked up a second time"))
        with pytest.raises(Unreached, match="takes no connections"):
            Poster(rebinds).post(target_of(f"https://{HOST}:{receiver.port}/", []), {}, b"")
        assert (asked, connected, receiver.got) == ([HOST], [("8.8.8.8", receiver.port)], [])


def test_the_connection_goes_to_the_judged_address_and_tls_to_the_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(make_certificate(tmp_path, HOST)))
    with receiving(tmp_path / f"{HOST}.pem") as receiver:
        poster = Poster(lambda host, port: ["127.0.0.1"])
        assert poster.post(target_of(f"https://{HOST}:{receiver.port}/in?q=1", [HOST]), {"webhook-id": "m"}, b"{}") == 204
        ((headers, body),) = receiver.got
        assert (headers["host"], headers[":path"], headers["webhook-id"], body) == (
            f"{HOST}:{receiver.port}",
            "/in?q=1",
            "m",
            b"{}",
        )
        with pytest.raises(Unreached, match="certificate isn't trusted"):
            poster.post(target_of(f"https://other.example:{receiver.port}/", ["other.example"]), {}, b"")
        assert len(receiver.got) == 1


def test_an_authority_that_nobody_here_knows_is_not_trusted(tmp_path):
    with receiving(make_certificate(tmp_path, HOST)) as receiver, pytest.raises(Unreached, match="certificate isn't trusted"):
        Poster(lambda host, port: ["127.0.0.1"]).post(target_of(f"https://{HOST}:{receiver.port}/", [HOST]), {}, b"")


def test_no_redirect_is_followed(tmp_path):
    with receiving() as inner, receiving(status=307, headers={"location": inner.url}) as outer:
        assert Poster().post(target_of(outer.url, LOOPBACK), {}, b"x") == 307
        assert (len(outer.got), inner.got) == (1, [])


def test_no_proxy_of_the_environment_is_taken(monkeypatch):
    with receiving() as proxy, receiving() as receiver:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert Poster().post(target_of(receiver.url, LOOPBACK), {}, b"x") == 204
        assert (len(receiver.got), proxy.got) == (1, [])


def test_an_answer_that_comes_by_drops_is_given_up(monkeypatch):
    monkeypatch.setattr(outbound, "DEADLINE_S", 0.5)

    def drips(handler):
        for _ in range(2000):
            handler.wfile.write(b"H")
            time.sleep(0.05)

    with receiving(answer=drips) as receiver, pytest.raises(Unreached, match=r"didn't answer within 0\.5 s"):
        Poster().post(target_of(receiver.url, LOOPBACK), {}, b"x")


def test_an_answer_without_end_is_not_read():
    written = []

    def floods(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            written.append(handler.wfile.write(b"x" * 65536))

    with receiving(answer=floods) as receiver:
        assert Poster().post(target_of(receiver.url, LOOPBACK), {}, b"x") == 200
    assert sum(written) < 64 << 20  # what the sockets hold


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9\r\n\r\n", b"", b"HTTP/1.1 banana\r\n\r\n"])
def test_what_is_no_http_is_no_answer(said):
    answers = receiving(answer=lambda handler: handler.wfile.write(said))
    with answers as receiver, pytest.raises(Unreached, match="isn't HTTP"):
        Poster().post(target_of(receiver.url, LOOPBACK), {}, b"x")


def test_a_host_that_is_not_there_says_so():
    def missing(host, port):
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    with pytest.raises(Unreached, match="host isn't found"):
        Poster(missing).post(target_of(f"https://{HOST}/", []), {}, b"")
