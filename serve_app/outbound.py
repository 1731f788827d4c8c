"""POST to a URL that a user has named, which reaches only what users may reach.

Every address that the URL's host stands for is judged, and the connection is made to one that was: a name that is looked up again
may stand for another one (DNS rebinding). No redirect is followed, no proxy is taken from the environment, nothing of an answer
but its status is read.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

import httpcore
import httpx

from serve_app import endpoints

DEADLINE_S = 10.0  # from the first lookup to the answer's status
CONNECT_S = 5.0  # of one address
MAX_ADDRESSES = 3  # of a host that are tried
MAX_URL_CHARS = 2048
PORTS = {"https": 443, "http": 80}
FIRST_FREE_PORT = 1024  # ports below are of mail, files and the like
HOST = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)*")
TARGET = re.compile(r"[!-\[\]-~]*")  # visible ASCII but the backslash, which some take for a slash
INWARD = ("local", "localhost", "internal", "intranet", "lan", "home", "corp")  # last parts of names that are of no public host

Resolve = Callable[[str, int], Sequence[str]]
SocketOptions = Iterable[tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]]


class Unreached(Exception):
    """A request that has no answer; the message says why, and nothing of what is behind the URL."""


class _Refused(Exception):
    """The host stands for an address that isn't to be reached."""


@dataclass(frozen=True)
class Target:
    """A URL in its parts. `is_listed`: the operator vouches for its host, which may be on a network of one's own."""

    scheme: str
    host: str
    port: int
    path: str
    is_listed: bool

    @property
    def authority(self) -> str:
        """The host, and the port where it isn't the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    def takes(self, address: str) -> bool:
        """Whether a connection to this address may be made for it."""
        found = ip_address(address.partition("%")[0])
        return not endpoints.is_off_limits(found) if self.is_listed else endpoints.is_public(found)


def target_of(url: str, listed: Sequence[str]) -> Target:
    """The parts of a URL that may be posted to; `listed` are the operator's hosts. What a name stands for is judged later.

    Raises ValueError, whose text says what to mend.
    """
    if len(url) > MAX_URL_CHARS:
        raise ValueError(f"must be at most {MAX_URL_CHARS} characters")
    if not TARGET.fullmatch(url):
        raise ValueError("must be visible ASCII without backslashes: write other characters as %XX, and a host's as xn--")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise ValueError("isn't a URL: write it as https://host/path") from None
    if "@" in parts.netloc:
        raise ValueError("must hold no user or password: messages are signed instead")
    if parts.fragment:
        raise ValueError("must have no fragment (#)")
    address = endpoints.address_of(host)
    if not host or (address is None and not HOST.fullmatch(host)):
        raise ValueError("isn't a URL: write it as https://host/path")
    is_listed = endpoints.is_listed(host, listed)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    default = PORTS.get(parts.scheme)
    if default is None or (parts.scheme == "http" and not is_listed):
        raise ValueError("must be https; plain http is for hosts on the operator's list (TUNEYARD_ALLOWED_WEBHOOK_HOSTS)")
    target = Target(parts.scheme, str(address or host), default if port is None else port, path, is_listed)
    if target.port == 0 or not (is_listed or target.port == default or target.port >= FIRST_FREE_PORT):
        raise ValueError(f"its port must be {default}, or {FIRST_FREE_PORT} and above")
    inward = address is None and ("." not in host or host.rpartition(".")[2] in INWARD)
    if host in endpoints.METADATA_NAMES or (inward and not is_listed) or (address is not None and not target.takes(str(address))):
        raise ValueError("its host isn't a public one, nor on the operator's list (TUNEYARD_ALLOWED_WEBHOOK_HOSTS)")
    return target


def look_up(host: str, port: int) -> list[str]:
    """Every address that the host stands for now. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Poster:
    """Makes the requests. Thread-safe. What it trusts is certifi's, or the file in SSL_CERT_FILE."""

    def __init__(self, resolve: Resolve = look_up) -> None:
        self._resolve = resolve
        self._trust = httpx.create_ssl_context()

    def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> int:
        """The status of the answer, whatever it is. Raises Unreached."""
        sent: list[tuple[bytes | str, bytes | str]] = [("host", target.authority), *headers.items()]
        url = httpcore.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
        network = _Pinned(target, self._resolve, time.monotonic() + DEADLINE_S)
        try:
            with (
                httpcore.ConnectionPool(self._trust, max_connections=1, network_backend=network) as pool,
                pool.stream("POST", url, headers=sent, content=body) as answer,
            ):
                return int(answer.status)
        except _Refused:
            raise Unreached("its host stands for an address that isn't a public one") from None
        except httpcore.TimeoutException:
            raise Unreached(f"it didn't answer within {DEADLINE_S:g} s") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError, UnicodeError) as error:
            raise Unreached(_in_words(error)) from None


def _in_words(error: Exception) -> str:
    # httpcore's errors come from the network's own; its pool takes the cause away, and leaves the context.
    match error if isinstance(error, OSError | UnicodeError | httpcore.ProtocolError) else error.__context__:
        case ssl.SSLCertVerificationError() as refused:
            return f"its certificate isn't trusted: {refused.verify_message}"
        case ssl.SSLError():
            return "it doesn't speak TLS that is safe to use"
        case socket.gaierror() | UnicodeError():
            return "its host isn't found"
        case ConnectionRefusedError():
            return "it takes no connections"
        case httpcore.ProtocolError():
            return "its answer isn't HTTP"
    return "the connection to it failed"


class _Pinned(httpcore.NetworkBackend):
    """Looks the host up once, judges all that is found, and connects to that and nothing else. TLS still names the host."""

    def __init__(self, target: Target, resolve: Resolve, deadline: float) -> None:
        self._target, self._resolve, self._deadline = target, resolve, deadline
        self._network = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: SocketOptions | None = None,
    ) -> httpcore.NetworkStream:
        found = self._resolve(host, port)
        if not found or not all(self._target.takes(address) for address in found):
            raise _Refused
        failed: Exception | None = None
        for address in found[:MAX_ADDRESSES]:
            try:
                stream = self._network.connect_tcp(address, port, min(CONNECT_S, _left(self._deadline)))
                return _Hurried(stream, self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        assert failed is not None
        raise failed


class _Hurried(httpcore.NetworkStream):
    """A stream that has until its deadline, however little comes at a time."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Hurried(self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline)), self._deadline)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left
