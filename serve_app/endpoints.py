"""Which storage endpoints users may name: the operator's list, and never an address that hands out a machine's credentials."""

from __future__ import annotations

import fnmatch
import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

# Cloud metadata services that aren't link-local: AWS over IPv6, Alibaba, Oracle; and their names.
METADATA_ADDRESSES = frozenset({"fd00:ec2::254", "100.100.100.200", "192.0.0.192", "fd20:ce::254"})
METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "instance-data", "instance-data.ec2.internal"})
NAT64 = ipaddress.ip_network("64:ff9b::/96")
UNICAST = ipaddress.ip_network("2000::/3")  # of IPv6, all that anybody was ever given on the internet
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_allowed(url: str, patterns: Iterable[str], *, with_path: bool = False) -> bool:
    """Whether the operator's list has this host, and it isn't, by whatever spelling, one that answers with a machine's own
    credentials. A URL with a path is one only `with_path`."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
        return False
    if (parts.path.strip("/") and not with_path) or parts.query or parts.fragment:
        return False
    host = host.rstrip(".").lower()
    address = address_of(host)
    if host in METADATA_NAMES or (address is not None and is_off_limits(address)):
        return False
    return is_listed(host, patterns)


def is_listed(host: str, patterns: Iterable[str]) -> bool:
    """Whether the operator's list has this host, which is in lower case."""
    return any(fnmatch.fnmatchcase(host, pattern.lower()) for pattern in patterns)


def is_allowed_now(url: str, patterns: Iterable[str], *, with_path: bool = False) -> bool:
    """`is_allowed`, with names judged by the addresses they stand for at this moment."""
    if not is_allowed(url, patterns, with_path=with_path):
        return False
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host_of(url), None)}
    except (OSError, UnicodeError):
        return True  # the storage can't be reached: the reader says so in its own words
    return not any(is_off_limits(ipaddress.ip_address(address.partition("%")[0])) for address in found)


def host_of(url: str) -> str:
    """The host to show for an endpoint."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def address_of(host: str) -> Address | None:
    """The address that a literal stands for, also in the spellings that only the C library reads (2852039166, 0xa9.254.1)."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.ip_address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None


def is_public(address: Address) -> bool:
    """Whether this is an address of the internet at large: of nobody's own network, and no other one's wrapping."""
    if is_off_limits(address) or not address.is_global or address.is_multicast:
        return False
    return isinstance(address, ipaddress.IPv4Address) or (address in UNICAST and _wrapped(address) is None)


def is_off_limits(address: Address) -> bool:
    """Whether nobody may name this address, whatever the operator's list says."""
    inner = _wrapped(address)
    if inner is not None:
        return is_off_limits(inner)
    return address.is_link_local or address.is_multicast or address.is_unspecified or str(address) in METADATA_ADDRESSES


def _wrapped(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one is another way to: mapped, by NAT64, by 6to4, or in the compatible form of old."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in NAT64 or (address.packed[:12] == bytes(12) and not address.is_loopback):
        return ipaddress.IPv4Address(address.packed[12:])
    return address.ipv4_mapped or address.sixtofour
