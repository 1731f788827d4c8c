"""Bearer tokens: JWT in, Principal out.

Which algorithms count is decided by the configured key alone, never by a token's header; `kid` is only ever looked up among the
keys of the JWKS, and `jku`, `x5u` and `jwk` are ignored (RFC 8725).
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from serve_app.errors import ApiError
from serve_app.settings import Settings
from serve_app.store.audit import By

MIN_KEY_BYTES = 32
MIN_RSA_BITS = 2048
JWKS_TIMEOUT_S = 5.0
MALFORMED = (ValueError, TypeError, RecursionError)  # what an answer raises that is no JWKS
DEFAULT_SCOPES = frozenset({"jobs:read", "jobs:write", "secrets:write"})
CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
JWKS_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "ES512", "EdDSA"]

FindKey = Callable[[str], tuple[Any, list[str]]]


@dataclass(frozen=True)
class Principal:
    """Who is asking, for which organisations, allowed what."""

    subject: str
    orgs: frozenset[str]
    scopes: frozenset[str]
    address: str | None = None  # where the request comes from, as far as the connection tells

    @property
    def by(self) -> By:
        """For the audit log."""
        return By(self.subject, self.address)

    def require_org(self, org: str) -> None:
        """Raise 403 unless the token speaks for `org`."""
        if org not in self.orgs:
            raise ApiError(403, f"this token doesn't speak for org {org}")

    def require_scope(self, scope: str) -> None:
        """Raise 403 unless the token has `scope`."""
        if scope not in self.scopes and "admin" not in self.scopes:
            raise ApiError(403, f"this token lacks the scope {scope}")


class Verifier:
    """Checks tokens against the operator's key. Thread-safe. `may_wait`: for an issuer's keys, to be fetched first."""

    def __init__(self, settings: Settings, find_key: FindKey, *, may_wait: bool = False) -> None:
        self._settings, self._find_key, self.may_wait = settings, find_key, may_wait

    @classmethod
    def from_settings(cls, settings: Settings) -> Verifier:
        """The verifier of this service. Raises RuntimeError for a missing, weak or ambiguous key."""
        ways = {
            "TUNEYARD_JWT_JWKS_URL": settings.jwt_jwks_url,
            "TUNEYARD_JWT_PUBLIC_KEY": settings.jwt_public_key,
            "TUNEYARD_JWT_SECRET": settings.jwt_secret if "jwt_secret" in settings.model_fields_set else None,
        }
        given = [name for name, value in ways.items() if value]
        if len(given) > 1:
            raise RuntimeError(f"{' and '.join(given)} are both set: tokens are checked against one kind of key")
        if settings.jwt_jwks_url:
            keys = _Jwks(settings.jwt_jwks_url, settings.jwt_jwks_refresh_s, settings.jwt_jwks_max_age_s)
            return cls(settings, keys.find, may_wait=True)
        if settings.jwt_public_key:
            public, algorithm = _public_key(settings.jwt_public_key)
            return cls(settings, lambda _: (public, [algorithm]))
        if settings.jwt_secret is None:
            raise RuntimeError(f"no key to check tokens with: set one of {', '.join(ways)}")
        secret = hmac_key(settings)
        return cls(settings, lambda _: (secret, ["HS256"]))

    def authenticate(self, header: str | None) -> Principal:
        """The principal of an Authorization header. Raises 401 (RFC 6750) for anything but a valid token, 503 without keys."""
        scheme, _, token = (header or "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "no bearer token: send Authorization: Bearer <JWT>", headers=headers)
        settings = self._settings
        try:
            key, algorithms = self._find_key(token)
            claims = jwt.decode(
                token,
                key,
                algorithms=algorithms,
                issuer=settings.jwt_issuer,
                audience=settings.jwt_audience,
                leeway=settings.jwt_leeway_s,
                options={"require": ["exp", "sub"], "verify_aud": settings.jwt_audience is not None},
            )
        except jwt.ExpiredSignatureError:
            raise _unauthorized("the token has expired") from None
        except (jwt.PyJWTError, ValueError) as error:
            raise _unauthorized(f"the token isn't valid ({type(error).__name__})") from None
        return Principal(str(claims["sub"]), _orgs(claims), _scopes(claims))


class _Jwks:
    """An issuer's keys: fetched when they are needed, again for an unknown kid and once `max_age_s` old, so that a withdrawn key
    ends; but never more often than `refresh_s`.

    When the issuer is away, the keys that are known go on working.
    """

    def __init__(self, url: str, refresh_s: float, max_age_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise RuntimeError("TUNEYARD_JWT_JWKS_URL must be https: whoever can change it on the way makes tokens")
        self._client = jwt.PyJWKClient(url, cache_jwk_set=False, timeout=JWKS_TIMEOUT_S)
        self._refresh_s, self._max_age_s = refresh_s, max_age_s
        self._lock = threading.Lock()
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._tried_at = self._known_at = -math.inf

    def find(self, token: str) -> tuple[Any, list[str]]:
        """The key that the token's kid names, and the algorithm that the key is for."""
        kid = jwt.get_unverified_header(token).get("kid")
        if kid not in self._keys:
            self._refresh()
        elif time.monotonic() - self._known_at >= self._max_age_s:
            self._refresh(wait=False)
        key = self._keys.get(kid)
        if key is None and kid is None and len(self._keys) == 1:
            key = next(iter(self._keys.values()))
        if not self._keys:
            message = "the keys that tokens are checked with can't be fetched; try again shortly"
            raise ApiError(503, message, headers={"Retry-After": "5"})
        if key is None:
            raise jwt.InvalidKeyError("no such key")
        return key.key, [key.algorithm_name]

    def _refresh(self, *, wait: bool = True) -> None:
        """Fetch the keys, unless that was tried a moment ago, or is being done and isn't to be waited for."""
        if not self._lock.acquire(blocking=wait):
            return
        try:
            now = time.monotonic()
            if now - self._tried_at < self._refresh_s:
                return
            self._tried_at = now
            with contextlib.suppress(jwt.PyJWTError, OSError, *MALFORMED):
                self._keys = {k.key_id: k for k in self._client.get_jwk_set().keys if _is_sound(k)}
                self._known_at = now
        finally:
            self._lock.release()


def _is_sound(key: jwt.PyJWK) -> bool:
    """Whether this key of a JWKS may check tokens."""
    weak = isinstance(key.key, rsa.RSAPublicKey | rsa.RSAPrivateKey) and key.key.key_size < MIN_RSA_BITS
    return key.algorithm_name in JWKS_ALGORITHMS and key.public_key_use != "enc" and not weak


def _public_key(text_or_path: str) -> tuple[Any, str]:
    """A PEM public key, given as text or as a path, and the algorithm it is for. Raises RuntimeError."""
    try:
        pem = text_or_path.encode() if "-----BEGIN" in text_or_path else Path(text_or_path).read_bytes()
        key = load_pem_public_key(pem)
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"TUNEYARD_JWT_PUBLIC_KEY isn't a PEM public key or a file with one ({type(error).__name__})"
        ) from None
    match key:
        case rsa.RSAPublicKey() if key.key_size >= MIN_RSA_BITS:
            return key, "RS256"
        case rsa.RSAPublicKey():
            raise RuntimeError(f"TUNEYARD_JWT_PUBLIC_KEY has {key.key_size} bits: an RSA key needs at least {MIN_RSA_BITS}")
        case ec.EllipticCurvePublicKey() if key.curve.name in CURVES:
            return key, CURVES[key.curve.name]
        case ed25519.Ed25519PublicKey() | ed448.Ed448PublicKey():
            return key, "EdDSA"
    raise RuntimeError(
        "TUNEYARD_JWT_PUBLIC_KEY is of a kind that no JWT algorithm uses: give an RSA, P-256/384/521 or Ed25519 key"
    )


def hmac_key(settings: Settings) -> str:
    """The HS256 key. Raises RuntimeError when it is missing or weak."""
    if settings.jwt_secret is None:
        raise RuntimeError("there is no token key: TUNEYARD_JWT_SECRET isn't set, and tuneyard up hasn't made one here yet")
    key = settings.jwt_secret.get_secret_value()
    if len(key.encode()) < MIN_KEY_BYTES:
        raise RuntimeError(f"TUNEYARD_JWT_SECRET must be at least {MIN_KEY_BYTES} bytes")
    return key


def mint_token(settings: Settings, org: str, subject: str, ttl_s: int, scope: str | None = None) -> str:
    """A token for `org`, valid for `ttl_s` seconds, signed with the service's own key. Raises RuntimeError without one."""
    if settings.jwt_jwks_url or settings.jwt_public_key:
        raise RuntimeError("this service checks tokens with an issuer's public key: get a token from that issuer")
    now = int(time.time())
    claims = {"sub": subject, "org": org, "iat": now, "exp": now + ttl_s}
    optional = {"scope": scope, "iss": settings.jwt_issuer, "aud": settings.jwt_audience}
    return jwt.encode(claims | {k: v for k, v in optional.items() if v}, hmac_key(settings), "HS256")


def _unauthorized(reason: str) -> ApiError:
    headers = {"WWW-Authenticate": f'Bearer error="invalid_token", error_description="{reason}"'}
    return ApiError(401, f"{reason}: send Authorization: Bearer <JWT>", headers=headers)


def _orgs(claims: dict[str, Any]) -> frozenset[str]:
    named = claims.get("orgs", [claims.get("org")])
    try:
        orgs = frozenset(str(uuid.UUID(org)) for org in named)
    except (TypeError, ValueError, AttributeError):
        orgs = frozenset()
    if not orgs or not isinstance(named, list):
        raise _unauthorized("the token names no org")
    return orgs


def _scopes(claims: dict[str, Any]) -> frozenset[str]:
    """RFC 8693's blank-separated string, or the list that some issuers write; absent is the default, never a mistake."""
    if "scope" not in claims:
        return DEFAULT_SCOPES
    scope = claims["scope"]
    named = scope.split() if isinstance(scope, str) else scope
    if not isinstance(named, list) or not all(isinstance(s, str) for s in named):
        raise _unauthorized("the token's scope is neither a string nor a list of strings")
    return frozenset(named)
