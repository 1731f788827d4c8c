"""Users' secrets: encrypted at rest with Fernet, opened only for the run that names them."""

from __future__ import annotations

import datetime as dt
import fnmatch
import ipaddress
import json
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
        with self._store.transaction() as tx:
            tx.execute(
                sa.insert(secrets).values(
                    secret_id=secret.secret_id, org_id=org_id, name=name, type=type_, ciphertext=sealed, created_at=now
                )
            )
        return secret

    def list(self, org_id: str) -> list[Secret]:
        """The org's secrets, newest first, without values."""
        query = sa.select(secrets).where(secrets.c.org_id == org_id).order_by(secrets.c.created_at.desc())
        with self._store.transaction() as tx:
            return [Secret(s.secret_id, s.org_id, s.name, s.type, s.created_at) for s in tx.execute(query)]

    def delete(self, org_id: str, secret_id: str) -> bool:
        """Remove it; False when the org has no such secret."""
        mine = (secrets.c.org_id == org_id) & (secrets.c.secret_id == secret_id)
        with self._store.transaction() as tx:
            return tx.execute(sa.delete(secrets).where(mine)).rowcount > 0

    def find(self, org_id: str, secret_id: str) -> Secret | None:
        """What is known about a secret without opening its keys, or None."""
        with self._store.transaction() as tx:
            row = tx.execute(sa.select(secrets).where(secrets.c.org_id == org_id, secrets.c.secret_id == secret_id)).one_or_none()
        if row is None:
            return None
        has_endpoint = bool(self._open(row.ciphertext).get("endpoint_url"))
        return Secret(row.secret_id, row.org_id, row.name, row.type, row.created_at, has_endpoint)

    def reveal(self, org_id: str, secret_id: str) -> dict[str, str]:
        """The values, for the job actor only. Raises DatasetError when it is gone."""
        with self._store.transaction() as tx:
            sealed = tx.execute(
                sa.select(secrets.c.ciphertext).where(secrets.c.org_id == org_id, secrets.c.secret_id == secret_id)
            ).scalar()
        if sealed is None:
            raise DatasetError(
                f"secret {secret_id} doesn't exist any more: store the keys again by POST /secret/.",
                field="dataset_details.secret_id",
                code="secret_not_found",
            )
        return self._open(sealed)

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
        try:
            parts = urlsplit(url)
            host = parts.hostname
            _ = parts.port
        except ValueError:
            return False
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.path.strip("/") or parts.query:
            return False
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            pass
        else:
            if address.is_link_local or address.is_multicast or address.is_unspecified:
                return False
        return any(fnmatch.fnmatch(host.lower(), pattern.lower()) for pattern in self._allowed_endpoints)
