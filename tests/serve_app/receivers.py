"""What webhooks are posted to: real servers on loopback that keep what they were sent."""

from __future__ import annotations

import contextlib
import datetime as dt
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HANG_S = 60  # a guard


@dataclass
class Receiver:
    """Answers each request with `status`, once `free` is set."""

    port: int = 0
    scheme: str = "http"
    status: int = 204
    headers: dict[str, str] = field(default_factory=dict)
    answer: Callable[[BaseHTTPRequestHandler], None] | None = None
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    free: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/hook?a=b"

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.got]


@contextlib.contextmanager
def receiving(certificate: Path | None = None, **how: Any) -> Iterator[Receiver]:
    """A receiver, over TLS where there is a certificate."""
    here = Receiver(**how)
    here.free.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            here.got.append(({k.lower(): v for k, v in self.headers.items()} | {":path": self.path}, body))
            here.free.wait(HANG_S)
            if here.answer is not None:
                here.answer(self)
                return
            self.send_response(here.status)
            for name, value in here.headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients go while they are answered

    server = Server(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        here.scheme = "https"
    here.port = server.server_port
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield here
    finally:
        here.free.set()
        server.shutdown()
        server.server_close()


def make_certificate(folder: Path, host: str) -> Path:
    """A file with a key and a certificate for this host, which signs itself."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    sealed = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / f"{host}.pem"
    path.write_bytes(sealed + made.public_bytes(pem))
    return path


def until(holds: Callable[[], Any], what: str) -> None:
    """Wait for it. Raises AssertionError where it doesn't come."""
    deadline = time.monotonic() + HANG_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
