"""Users' secrets: encrypted at rest with Fernet, opened only for the run that names them."""

from __future__ import annotations

import datetime as dt
import fnmatch
import ipaddress
import json
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from cryptography.fernet import Fernet, InvalidToken

from serve_app.errors import field_error, invalid
from serve_app.settings import Settings
from serve_app.store.jobs import JobStore
from serve_app.store.tables import secrets
from train_loop.errors import DatasetError

REQUIRED = ("access_key_id", "secret_access_key")
OPTIONAL = {"aws": ("session_token", "region"), "s3": ("session_token", "region", "endpoint_url")}
NOT_YET = ("gcs", "hf")
MAX_VALUE_CHARS = 8192
# Cloud metadata services that aren't link-local: AWS over IPv6, Alibaba, Oracle; and their names.
METADATA_ADDRESSES = frozenset({"fd00:ec2::254", "100.100.100.200", "192.0.0.192", "fd20:ce::254"})
METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "instance-data", "instance-data.ec2.internal"})


@dataclass(frozen=True)
class Secret:
    """What may be told about a secret."""

    secret_id: str
    org_id: str
    name: str
    type: str
    created_at: dt.datetime
    has_endpoint: bool = False


class SecretVault:
    """The org's secrets in the store."""

    def __init__(self, store: JobStore, key: str, allowed_endpoints: list[str]) -> None:
        self._store = store
        self._fernet = Fernet(key)
        self._allowed_endpoints = allowed_endpoints

    @classmethod
    def from_settings(cls, store: JobStore, settings: Settings) -> SecretVault:
        """The vault of this service. Raises RuntimeError without a key."""
        if settings.secret_key is None:
            raise RuntimeError("TUNEYARD_SECRET_KEY isn't set: make one with cryptography.fernet.Fernet.generate_key()")
        return cls(store, settings.secret_key.get_secret_value(), settings.allowed_s3_endpoints)

    def create(self, org_id: str, name: str, type_: str, data: Mapping[str, Any]) -> Secret:
        """Store a secret. Raises ApiError 422 that names fields, never values."""
        self._check(type_, data)
        now = dt.datetime.now(dt.UTC)
        secret = Secret(str(uuid.uuid4()), org_id, name, type_, now)
        sealed = self._fernet.encrypt(json.dumps(dict(data)).encode())
        with self._store.write() as tx:
            tx.execute(
                sa.insert(secrets).values(
                    secret_id=secret.secret_id, org_id=org_id, name=name, type=type_, ciphertext=sealed, created_at=now
                )
            )
        return secret

    def list(self, org_id: str) -> list[Secret]:
        """The org's secrets, newest first, without values."""
        query = sa.select(secrets).where(secrets.c.org_id == org_id).order_by(secrets.c.created_at.desc())
        with self._store.read() as tx:
            return [Secret(s.secret_id, s.org_id, s.name, s.type, s.created_at) for s in tx.execute(query)]

    def delete(self, org_id: str, secret_id: str) -> bool:
        """Remove it; False when the org has no such secret."""
        mine = (secrets.c.org_id == org_id) & (secrets.c.secret_id == secret_id)
        with self._store.write() as tx:
            return tx.execute(sa.delete(secrets).where(mine)).rowcount > 0

    def find(self, org_id: str, secret_id: str) -> Secret | None:
        """What is known about a secret without opening its keys, or None."""
        with self._store.read() as tx:
            row = tx.execute(sa.select(secrets).where(secrets.c.org_id == org_id, secrets.c.secret_id == secret_id)).one_or_none()
        if row is None:
            return None
        has_endpoint = bool(self._open(row.ciphertext).get("endpoint_url"))
        return Secret(row.secret_id, row.org_id, row.name, row.type, row.created_at, has_endpoint)

    def reveal(self, org_id: str, secret_id: str) -> dict[str, str]:
        """The values, for the job actor only. Raises DatasetError when it is gone."""
        with self._store.read() as tx:
            sealed = tx.execute(
                sa.select(secrets.c.ciphertext).where(secrets.c.org_id == org_id, secrets.c.secret_id == secret_id)
            ).scalar()
        if sealed is None:
            raise DatasetError(
                f"secret {secret_id} doesn't exist any more: store the keys again by POST /secret/.",
                field="dataset_details.secret_id",
                code="secret_not_found",
            )
        data = self._open(sealed)
        if data.get("endpoint_url"):
            self._check_resolved(data["endpoint_url"])
        return data

    def _open(self, sealed: bytes) -> dict[str, str]:
        try:
            data: dict[str, str] = json.loads(self._fernet.decrypt(sealed))
        except InvalidToken:
            raise DatasetError(
                "this secret was sealed with another TUNEYARD_SECRET_KEY: store it again.",
                field="dataset_details.secret_id",
                code="secret_unreadable",
            ) from None
        return data

    def _check(self, type_: str, data: Mapping[str, Any]) -> None:
        if type_ in NOT_YET:
            raise invalid([field_error("type", f"{type_} is not supported yet", allowed=sorted(OPTIONAL))])
        if type_ not in OPTIONAL:
            raise invalid([field_error("type", "unknown type of secret", allowed=sorted(OPTIONAL))])
        known = (*REQUIRED, *OPTIONAL[type_])
        errors = [field_error(f"data.{k}", "this field is required") for k in REQUIRED if not data.get(k)]
        for name, value in data.items():
            if name in ("role_arn", "external_id"):
                errors.append(field_error(f"data.{name}", "is not supported yet", allowed=list(known)))
            elif name not in known:
                errors.append(field_error(f"data.{name}", "unknown field", allowed=list(known)))
            elif value is not None and (not isinstance(value, str) or len(value) > MAX_VALUE_CHARS):
                errors.append(field_error(f"data.{name}", f"must be a string of at most {MAX_VALUE_CHARS} characters"))
        endpoint = data.get("endpoint_url")
        if isinstance(endpoint, str) and not errors and not self._endpoint_allowed(endpoint):
            allowed = ", ".join(self._allowed_endpoints) or "none"
            message = f"this endpoint isn't on the operator's list (TUNEYARD_ALLOWED_S3_ENDPOINTS: {allowed})"
            errors.append(field_error("data.endpoint_url", message))
        if errors:
            raise invalid(errors)

    def _endpoint_allowed(self, url: str) -> bool:
        """Whether the operator's list has this host, and it isn't, by whatever spelling, one that answers with a machine's own
        credentials."""
        try:
            parts = urlsplit(url)
            host = parts.hostname
            _ = parts.port
        except ValueError:
            return False
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.path.strip("/") or parts.query:
            return False
        host = host.rstrip(".").lower()
        address = _address(host)
        if host in METADATA_NAMES or (address is not None and _is_off_limits(address)):
            return False
        return any(fnmatch.fnmatchcase(host, pattern.lower()) for pattern in self._allowed_endpoints)

    def _check_resolved(self, url: str) -> None:
        """Names are judged by what they stand for now. Raises DatasetError."""
        host = urlsplit(url).hostname or ""
        try:
            found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
        except (OSError, UnicodeError):
            return  # the storage can't be reached: the reader says so in its own words
        if not self._endpoint_allowed(url) or any(_is_off_limits(ipaddress.ip_address(a.partition("%")[0])) for a in found):
            raise DatasetError(
                f"the endpoint {host} of this secret may not be used here.",
                field="dataset_details.secret_id",
                code="endpoint_refused",
            )


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a literal stands for, also in the spellings that only the C library reads (2852039166, 0xa9.254.1)."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.ip_address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None


def _is_off_limits(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        return _is_off_limits(mapped)
    return address.is_link_local or address.is_multicast or address.is_unspecified or str(address) in METADATA_ADDRESSES
