"""Bearer tokens: JWT in, Principal out."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

import jwt

from serve_app.errors import ApiError
from serve_app.settings import Settings

ALGORITHM = "HS256"
MIN_KEY_BYTES = 32
DEFAULT_SCOPES = frozenset({"jobs:read", "jobs:write", "secrets:write"})


@dataclass(frozen=True)
class Principal:
    """Who is asking, for which organisations, allowed what."""

    subject: str
    orgs: frozenset[str]
    scopes: frozenset[str]

    def require_org(self, org: str) -> None:
        """Raise 403 unless the token speaks for `org`."""
        if org not in self.orgs:
            raise ApiError(403, f"this token doesn't speak for org {org}")

    def require_scope(self, scope: str) -> None:
        """Raise 403 unless the token has `scope`."""
        if scope not in self.scopes and "admin" not in self.scopes:
            raise ApiError(403, f"this token lacks the scope {scope}")


def _unauthorized(reason: str) -> ApiError:
    headers = {"WWW-Authenticate": f'Bearer error="invalid_token", error_description="{reason}"'}
    return ApiError(401, f"{reason}: send Authorization: Bearer <JWT>", headers=headers)


def _key(settings: Settings) -> str:
    key = settings.jwt_secret.get_secret_value() if settings.jwt_secret else ""
    if len(key.encode()) < MIN_KEY_BYTES:
        raise RuntimeError(f"TUNEYARD_JWT_SECRET must be at least {MIN_KEY_BYTES} bytes")
    return key


def authenticate(header: str | None, settings: Settings) -> Principal:
    """The principal of an Authorization header. Raises 401 (RFC 6750) for anything but a valid token."""
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise ApiError(401, "no bearer token: send Authorization: Bearer <JWT>", headers={"WWW-Authenticate": "Bearer"})
    try:
        claims = jwt.decode(
            token.strip(),
            _key(settings),
            algorithms=[ALGORITHM],
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            leeway=settings.jwt_leeway_s,
            options={"require": ["exp", "sub"], "verify_aud": settings.jwt_audience is not None},
        )
    except jwt.ExpiredSignatureError:
        raise _unauthorized("the token has expired") from None
    except jwt.PyJWTError as error:
        raise _unauthorized(f"the token isn't valid ({type(error).__name__})") from None
    named = claims.get("orgs", [claims.get("org")])
    try:
        orgs = frozenset(str(uuid.UUID(org)) for org in named)
    except (TypeError, ValueError, AttributeError):
        raise _unauthorized("the token names no org") from None
    return Principal(str(claims["sub"]), orgs, _scopes(claims))


def _scopes(claims: dict[str, Any]) -> frozenset[str]:
    """RFC 8693's blank-separated string, or the list that some issuers write; absent is the default, never a mistake."""
    if "scope" not in claims:
        return DEFAULT_SCOPES
    scope = claims["scope"]
    named = scope.split() if isinstance(scope, str) else scope
    if not isinstance(named, list) or not all(isinstance(s, str) for s in named):
        raise _unauthorized("the token's scope is neither a string nor a list of strings")
    return frozenset(named)


def mint_token(settings: Settings, org: str, subject: str, ttl_s: int, scope: str | None = None) -> str:
    """A token for `org`, valid for `ttl_s` seconds, signed with the service's own key."""
    now = int(time.time())
    claims = {"sub": subject, "org": org, "iat": now, "exp": now + ttl_s}
    optional = {"scope": scope, "iss": settings.jwt_issuer, "aud": settings.jwt_audience}
    return jwt.encode(claims | {k: v for k, v in optional.items() if v}, _key(settings), ALGORITHM)
