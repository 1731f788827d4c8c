"""The service's own identity at AWS: with it, users' roles are assumed and their secrets read from Secrets Manager."""

from __future__ import annotations

import datetime as dt
import fnmatch
import json
import logging
import re
import threading
from collections.abc import Iterable
from typing import Any

import structlog

from serve_app.secret_types import AwsRole, SecretData, parse_untyped
from train_loop.errors import DatasetError

log = structlog.get_logger()
SECRET_ID = "dataset_details.secret_id"
SECRET_ARN = re.compile(r"arn:aws[a-z-]*:secretsmanager:([a-z0-9-]{1,32}):\d{12}:secret:[\w/+=.@-]{1,512}", re.ASCII)
ANY_REGION = "us-east-1"  # STS answers for every region from each one
REFRESH_BEFORE_S = 900  # a reader that is handed keys may use them for a while
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 10
NOT_FOUND = frozenset(
    {"ResourceNotFoundException", "InvalidRequestException", "InvalidParameterException", "ValidationException"}
)
BAD_IDENTITY = frozenset(
    {
        *("InvalidClientTokenId", "UnrecognizedClientException", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
        *("InvalidSignatureException", "IncompleteSignature", "ExpiredToken", "ExpiredTokenException"),
    }
)
BUSY = frozenset({"Throttling", "ThrottlingException", "TooManyRequestsException", "RequestLimitExceeded"})


def is_arn(secret_id: str) -> bool:
    """Whether this names a secret by ARN and not one of the vault's."""
    return secret_id.startswith("arn:")


def may_name(org_id: str, arn: str, patterns: Iterable[str]) -> bool:
    """Whether the operator lets this org name this secret of Secrets Manager. Asks AWS nothing."""
    return SECRET_ARN.fullmatch(arn) is not None and is_listed(org_id, arn, patterns)


def is_listed(org_id: str, arn: str, patterns: Iterable[str]) -> bool:
    """Whether one of the operator's patterns, in which {org} is the org's UUID, is this ARN's."""
    return any(fnmatch.fnmatchcase(arn, pattern.replace("{org}", org_id)) for pattern in patterns)


class AwsIdentity:
    """Asks AWS as the service. Keeps the temporary keys it was given until they are about to expire."""

    def __init__(self, endpoint_url: str | None = None) -> None:
        self._endpoint_url = endpoint_url
        self._sessions: dict[tuple[str, AwsRole], tuple[dict[str, str], dt.datetime]] = {}
        self._lock = threading.Lock()

    def assume(self, org_id: str, role: AwsRole) -> dict[str, str]:
        """Temporary keys of the role, as the data of an aws secret. Raises DatasetError."""
        with self._lock:  # one question for all of a run's workers
            keys, expires = self._sessions.get((org_id, role), ({}, dt.datetime.min.replace(tzinfo=dt.UTC)))
            if expires - dt.datetime.now(dt.UTC) < dt.timedelta(seconds=REFRESH_BEFORE_S):
                keys, expires = self._assume(org_id, role)
                self._sessions[org_id, role] = keys, expires
        return dict(keys)

    def _assume(self, org_id: str, role: AwsRole) -> tuple[dict[str, str], dt.datetime]:
        request = {"RoleArn": role.role_arn, "RoleSessionName": session_name(org_id)}
        if role.external_id is not None:
            request["ExternalId"] = role.external_id.get_secret_value()
        answer, refusal = self._ask("sts", "assume_role", role.region, request)
        if refusal is not None:
            raise _error(
                "role_not_assumable",
                "the role of this secret can't be assumed: its trust policy must allow this service's AWS identity "
                f"(session name {session_name(org_id)}), and external_id must be the one it asks for.",
            )
        got = answer["Credentials"]
        keys = {
            "access_key_id": got["AccessKeyId"],
            "secret_access_key": got["SecretAccessKey"],
            "session_token": got["SessionToken"],
        }
        return keys | ({"region": role.region} if role.region else {}), got["Expiration"]

    def fetch(self, arn: str) -> SecretData:
        """What Secrets Manager holds under an ARN: the data of an aws or s3 secret. Raises DatasetError."""
        region = arn.split(":")[3]
        answer, refusal = self._ask("secretsmanager", "get_secret_value", region, {"SecretId": arn})
        if refusal in NOT_FOUND:
            raise _error("secret_not_found", f"Secrets Manager has no secret {arn}, or it is being deleted: correct secret_id.")
        if refusal is not None:
            raise _error(
                "secret_access_denied",
                f"this service may not read {arn}: allow its AWS identity secretsmanager:GetSecretValue, and kms:Decrypt "
                "if the secret has a key of its own.",
            )
        data = _json_object(answer.get("SecretString"))
        parsed = parse_untyped(data) if data is not None else None
        if parsed is None:
            raise _error(
                "secret_malformed",
                f"the secret {arn} must be a JSON object with the fields of an aws or s3 secret: access_key_id and "
                "secret_access_key, or role_arn; with session_token or external_id, region, endpoint_url; and no others.",
            )
        return parsed

    def _ask(
        self, service: str, operation: str, region: str | None, request: dict[str, str]
    ) -> tuple[dict[str, Any], str | None]:
        """AWS's answer, or the code it refused with. Raises DatasetError where the secret isn't at fault."""
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError, CredentialRetrievalError, NoCredentialsError

        if (logger := logging.getLogger("botocore")).getEffectiveLevel() < logging.INFO:
            logger.setLevel(logging.INFO)  # its debug lines hold whole answers
        config = Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": 3},
            ignore_configured_endpoint_urls=True,  # AWS_ENDPOINT_URL is mostly some storage's
        )
        # Nothing is raised inside a handler: botocore's errors quote requests and answers, and would stay on as context.
        reason = "unreachable"
        answer: dict[str, Any] = {}
        try:
            session = boto3.Session()
            where = region or session.region_name or ANY_REGION
            client = session.client(service, region_name=where, endpoint_url=self._endpoint_url, config=config)
            answer, reason = getattr(client, operation)(**request), "answered"
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            reason = "unreachable" if status >= 500 else str(error.response.get("Error", {}).get("Code", ""))
        except (NoCredentialsError, CredentialRetrievalError):
            reason = "no credentials"
        except (BotoCoreError, OSError, ValueError) as error:
            log.warning("AWS can't be asked", service=service, error=type(error).__name__)
        if reason == "answered":
            return answer, None
        log.warning("AWS gave no answer", service=service, operation=operation, reason=_plain(reason))
        if reason == "no credentials":
            raise _error(
                "aws_identity_missing",
                "this service has no AWS identity of its own, which roles and Secrets Manager need: store keys by POST /secret/ "
                "or ask the operator to give it one.",
            )
        if reason in BAD_IDENTITY:
            raise _error("aws_identity_refused", "AWS doesn't accept this service's own identity: ask the operator to renew it.")
        if reason == "unreachable" or reason in BUSY:
            raise _error("aws_unreachable", f"AWS ({service}) doesn't answer this service: try again later.")
        return {}, reason


def session_name(org_id: str) -> str:
    """The name of the org's sessions, by which a role's trust policy can tell orgs apart (sts:RoleSessionName)."""
    return f"tuneyard-{org_id}"


def _error(code: str, message: str) -> DatasetError:
    return DatasetError(message, field=SECRET_ID, code=code)


def _plain(reason: str) -> str:
    return re.sub(r"[^\w. -]", "", reason)[:64]


def _json_object(text: object) -> dict[str, Any] | None:
    try:
        data = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
