"""Users' secrets: encrypted at rest with Fernet, opened only for the run that names them."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from serve_app import endpoints
from serve_app.aws import SECRET_ID, AwsIdentity, is_arn, is_listed, may_name
from serve_app.errors import ApiError, field_error, invalid
from serve_app.secret_types import (
    OPENS,
    AwsKeys,
    AwsRole,
    GcsServiceAccount,
    HfToken,
    MlflowServer,
    S3Keys,
    S3Role,
    SecretData,
    WandbProject,
    parse,
)
from serve_app.settings import Settings
from serve_app.store.audit import By, add_entry
from serve_app.store.jobs import JobStore
from serve_app.store.tables import secrets
from train_loop.errors import DatasetError, UserError
from train_loop.trackers.tracker import TrackerKeys

TRACKER_URLS = {"tracking_uri", "base_url"}
REPORT_TO = "train_config.report_to"


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
    """The org's secrets: those in the store, and those that it may name in AWS Secrets Manager."""

    def __init__(
        self,
        store: JobStore,
        key: str,
        allowed_endpoints: Sequence[str],
        allowed_arns: Sequence[str] = (),
        aws: AwsIdentity | None = None,
        allowed_roles: Sequence[str] = ("*",),
        allowed_trackers: Sequence[str] = (),
    ) -> None:
        self._store = store
        # The first key seals; those after it are of before, and still open what they have sealed.
        self._fernet = MultiFernet([Fernet(k.strip()) for k in key.split(",")])
        self._allowed_endpoints = allowed_endpoints
        self._allowed_arns = allowed_arns
        self._aws = aws or AwsIdentity()
        self._allowed_roles = allowed_roles
        self._allowed_trackers = allowed_trackers

    @classmethod
    def from_settings(cls, store: JobStore, settings: Settings) -> SecretVault:
        """The vault of this service. Raises RuntimeError without a sound key."""
        make = "make one with cryptography.fernet.Fernet.generate_key()"
        if settings.secret_key is None:
            raise RuntimeError(f"TUNEYARD_SECRET_KEY isn't set: {make}")
        try:
            return cls(
                store,
                settings.secret_key.get_secret_value(),
                settings.allowed_s3_endpoints,
                settings.allowed_secret_arns,
                AwsIdentity(settings.aws_endpoint_url),
                settings.allowed_role_arns,
                settings.allowed_tracker_endpoints,
            )
        except ValueError:
            raise RuntimeError(f"TUNEYARD_SECRET_KEY isn't a Fernet key: {make}") from None

    def create(self, org_id: str, name: str, type_: str, data: Mapping[str, Any], by: By | None = None) -> Secret:
        """Store a secret. Raises ApiError 422 that names fields, never values."""
        parsed = parse(type_, data)
        values = parsed.values()
        if isinstance(parsed, AwsRole) and not is_listed(org_id, parsed.role_arn, self._allowed_roles):
            message = "the operator's list (TUNEYARD_ALLOWED_ROLE_ARNS) doesn't let this org use this role"
            raise invalid([field_error("data.role_arn", message)])
        if "endpoint_url" in values and not endpoints.is_allowed(values["endpoint_url"], self._allowed_endpoints):
            allowed = ", ".join(self._allowed_endpoints) or "none"
            message = f"this endpoint isn't on the operator's list (TUNEYARD_ALLOWED_S3_ENDPOINTS: {allowed})"
            raise invalid([field_error("data.endpoint_url", message)])
        for url in TRACKER_URLS & values.keys():
            if not endpoints.is_allowed(values[url], self._allowed_trackers, with_path=True):
                allowed = ", ".join(self._allowed_trackers) or "none"
                message = f"this server isn't on the operator's list (TUNEYARD_ALLOWED_TRACKER_ENDPOINTS: {allowed})"
                raise invalid([field_error(f"data.{url}", message)])
        now = dt.datetime.now(dt.UTC)
        secret = Secret(str(uuid.uuid4()), org_id, name, type_, now, "endpoint_url" in values)
        sealed = self.seal(json.dumps(values))
        with self._store.write() as tx:
            tx.execute(
                sa.insert(secrets).values(
                    secret_id=secret.secret_id, org_id=org_id, name=name, type=type_, ciphertext=sealed, created_at=now
                )
            )
            if by is not None:
                add_entry(tx, by, "secret.add", secret.secret_id, org_id=org_id)
        return secret

    def seal(self, text: str) -> bytes:
        """The text as it may be stored."""
        return self._fernet.encrypt(text.encode())

    def unseal(self, sealed: bytes) -> str:
        """The other way round. Raises DatasetError for what another key has sealed."""
        try:
            return self._fernet.decrypt(sealed).decode()
        except InvalidToken:
            raise _error(
                "secret_unreadable", "this secret was sealed with another TUNEYARD_SECRET_KEY: store it again."
            ) from None

    def list(self, org_id: str) -> list[Secret]:
        """The org's secrets, newest first, without values."""
        query = sa.select(secrets).where(secrets.c.org_id == org_id).order_by(secrets.c.created_at.desc())
        with self._store.read() as tx:
            return [Secret(s.secret_id, s.org_id, s.name, s.type, s.created_at) for s in tx.execute(query)]

    def delete(self, org_id: str, secret_id: str, by: By | None = None) -> bool:
        """Remove it; False when the org has no such secret."""
        mine = (secrets.c.org_id == org_id) & (secrets.c.secret_id == secret_id)
        with self._store.write() as tx:
            if tx.execute(sa.delete(secrets).where(mine)).rowcount == 0:
                return False
            if by is not None:
                add_entry(tx, by, "secret.delete", secret_id, org_id=org_id)
            return True

    def find(self, org_id: str, secret_id: str) -> Secret | None:
        """What is known about a stored secret, or None. Raises DatasetError when it can't be opened."""
        row = self._row(org_id, secret_id)
        if row is None:
            return None
        has_endpoint = "endpoint_url" in self._open(row).values()
        return Secret(row.secret_id, row.org_id, row.name, row.type, row.created_at, has_endpoint)

    def may_name(self, org_id: str, arn: str) -> bool:
        """Whether the operator lets this org name this secret of AWS Secrets Manager. Whether there is one isn't asked."""
        return may_name(org_id, arn, self._allowed_arns)

    def reveal(self, org_id: str, secret_id: str, source_type: str = "s3") -> dict[str, str]:
        """What opens a dataset or model of this source_type now, for the job actor only: of a role, temporary ones.

        Raises DatasetError.
        """
        data = self._fetch(org_id, secret_id) if is_arn(secret_id) else self._stored(org_id, secret_id)
        match data:
            case GcsServiceAccount() if source_type == "gcs":
                return data.values()
            case HfToken() if source_type == "hf":
                return data.values()
            case _ if source_type != "s3":
                pass
            case AwsRole() if not is_listed(org_id, data.role_arn, self._allowed_roles):
                listed = f"the operator's list (TUNEYARD_ALLOWED_ROLE_ARNS) doesn't let this org use {data.role_arn}."
                raise _error("role_not_allowed", listed)
            case S3Keys() | S3Role() if data.endpoint_url and not endpoints.is_allowed_now(
                data.endpoint_url, self._allowed_endpoints
            ):
                host = endpoints.host_of(data.endpoint_url)
                raise _error("endpoint_refused", f"the endpoint {host} of this secret may not be used here.")
            case S3Role() if data.endpoint_url:
                return self._aws.assume(org_id, data) | {"endpoint_url": data.endpoint_url}
            case AwsRole():
                return self._aws.assume(org_id, data)
            case AwsKeys() | S3Keys():
                return data.values()
        wanted = " or ".join(OPENS[source_type])
        raise _error("secret_wrong_type", f"this secret doesn't open what is at {source_type}: name one of type {wanted}.")

    def tracker(self, org_id: str, secret_id: str) -> TrackerKeys:
        """The keys of a tracker, for the job actor only. Raises UserError."""
        data = self._stored(org_id, secret_id)
        if not isinstance(data, MlflowServer | WandbProject):
            raise UserError("this secret is of no tracker", field=REPORT_TO, code="secret_wrong_type")
        values = data.values()
        for name in TRACKER_URLS & values.keys():
            if not endpoints.is_allowed_now(values[name], self._allowed_trackers, with_path=True):
                host = endpoints.host_of(values[name])
                raise UserError(
                    f"the server {host} of this secret may not be used here", field=REPORT_TO, code="endpoint_refused"
                )
        return TrackerKeys("mlflow" if isinstance(data, MlflowServer) else "wandb", values)

    def _fetch(self, org_id: str, arn: str) -> SecretData:
        if not self.may_name(org_id, arn):
            raise _error(
                "secret_not_allowed", f"the operator's list (TUNEYARD_ALLOWED_SECRET_ARNS) doesn't let this org use {arn}."
            )
        return self._aws.fetch(arn)

    def _stored(self, org_id: str, secret_id: str) -> SecretData:
        row = self._row(org_id, secret_id)
        if row is None:
            raise _error("secret_not_found", f"secret {secret_id} doesn't exist any more: store the keys again by POST /secret/.")
        return self._open(row)

    def _row(self, org_id: str, secret_id: str) -> sa.Row[Any] | None:
        with self._store.read() as tx:
            query = sa.select(secrets).where(secrets.c.org_id == org_id, secrets.c.secret_id == secret_id)
            return tx.execute(query).one_or_none()

    def _open(self, row: sa.Row[Any]) -> SecretData:
        # Nothing is raised inside a handler: the errors of json and pydantic hold the text they stumbled over.
        data: SecretData | None = None
        text = self.unseal(row.ciphertext)
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError, ApiError):
            data = parse(row.type, json.loads(text))
        if data is None:
            raise _error("secret_unreadable", "what is stored of this secret can't be read any more: store it again.")
        return data


def _error(code: str, message: str) -> DatasetError:
    return DatasetError(message, field=SECRET_ID, code=code)
