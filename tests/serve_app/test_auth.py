"""Tokens against every kind of key, and the known attacks on them, through the HTTP interface."""

import base64
import contextlib
import hashlib
import hmac
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from starlette.testclient import TestClient

from serve_app.app import build_app
from serve_app.auth import Verifier, mint_token
from serve_app.settings import Settings
from tests.conftest import ORG, Idle

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
KEYS = {"RS256": RSA, "ES256": EC, "EdDSA": ED}


def pem(key):
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def claims_with(**usual):
    """Makes a token's claims; None leaves one out."""

    def make(**changes):
        found = {"sub": "x", "org": ORG, "exp": time.time() + 60} | usual | changes
        return {k: v for k, v in found.items() if v is not None}

    return make


claims = claims_with()


def token(algorithm, key=None, headers=None, **changes):
    return jwt.encode(claims(**changes), key or KEYS[algorithm], algorithm, headers=headers)


@pytest.fixture
def service(settings, store):
    """The status of a request with a token, to a service with these settings."""

    @contextlib.contextmanager
    def running(**options):
        with TestClient(build_app(Settings(**options), store, Idle()), raise_server_exceptions=False) as client:

            def status(token):
                answer = client.get("/job/list/", params={"org_id": ORG}, headers={"Authorization": f"Bearer {token}"})
                assert token not in answer.text
                if answer.status_code == 401:
                    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
                return answer.status_code

            yield status

    return running


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_public_key_as_text_or_file(service, tmp_path, algorithm):
    path = tmp_path / "key.pem"
    path.write_text(pem(KEYS[algorithm]))
    for given in (pem(KEYS[algorithm]), str(path)):
        with service(jwt_public_key=given) as status:
            assert status(token(algorithm)) == 200
            other = {"RS256": "ES256", "ES256": "EdDSA", "EdDSA": "RS256"}[algorithm]
            assert status(token(other)) == 401


class Issuer:
    """A real JWKS server that counts how often it is asked."""

    def __init__(self):
        self.keys, self.body, self.asked, issuer = {}, None, 0, self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                issuer.asked += 1
                keys = [issuer.jwk(kid, key) for kid, key in issuer.keys.items()]
                body = json.dumps({"keys": keys}).encode() if issuer.body is None else issuer.body
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                return

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/keys"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def jwk(kid, key):
        kind = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}[
            next(a for a, k in KEYS.items() if type(k) is type(key))
        ]
        return kind.to_jwk(key.public_key(), as_dict=True) | {"kid": kid, "use": "sig"}

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def issuer():
    issuer = Issuer()
    yield issuer
    with contextlib.suppress(OSError):
        issuer.close()


def test_jwks_keys_rotate(service, issuer):
    issuer.keys = {"a": RSA}
    with service(jwt_jwks_url=issuer.url, jwt_jwks_refresh_s=0) as status:
        assert [status(token("RS256", headers={"kid": "a"})) for _ in range(3)] == [200] * 3
        assert issuer.asked == 1
        issuer.keys = {"b": EC, "c": ED}
        assert status(token("ES256", headers={"kid": "b"})) == 200
        assert status(token("EdDSA", headers={"kid": "c"})) == 200
        assert issuer.asked == 2
        assert status(token("RS256", headers={"kid": "a"})) == 401  # withdrawn
        assert status(token("ES256", headers={"kid": "c"})) == 401  # another key's name


def test_a_withdrawn_key_ends_though_nobody_asks_for_a_new_one(service, issuer):
    issuer.keys = {"a": RSA}
    with service(jwt_jwks_url=issuer.url, jwt_jwks_refresh_s=0, jwt_jwks_max_age_s=0) as status:
        assert status(token("RS256", headers={"kid": "a"})) == 200
        issuer.keys = {"b": EC}
        assert status(token("RS256", headers={"kid": "a"})) == 401
        assert status(token("ES256", headers={"kid": "b"})) == 200
        issuer.close()  # an issuer that is away withdraws nothing
        assert status(token("ES256", headers={"kid": "b"})) == 200


def test_a_weak_key_of_the_issuer_opens_nothing(service, issuer):
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    issuer.keys = {"a": RSA, "weak": weak}
    with service(jwt_jwks_url=issuer.url) as status:
        assert status(token("RS256", headers={"kid": "a"})) == 200
        assert status(token("RS256", key=weak, headers={"kid": "weak"})) == 401


def test_unknown_kids_do_not_become_a_flood_of_fetches(service, issuer):
    issuer.keys = {"a": RSA}
    with service(jwt_jwks_url=issuer.url, jwt_jwks_refresh_s=3600) as status:
        assert status(token("RS256", headers={"kid": "a"})) == 200
        for kid in [f"random-{i}" for i in range(20)] + ["../../etc/passwd", "http://evil/keys", ""]:
            assert status(token("RS256", headers={"kid": kid})) == 401
        assert issuer.asked == 1


def test_an_issuer_that_is_away(service, issuer):
    issuer.keys = {"a": RSA}
    with service(jwt_jwks_url=issuer.url, jwt_jwks_refresh_s=0) as status:
        assert status(token("RS256", headers={"kid": "a"})) == 200
        issuer.close()
        assert status(token("RS256", headers={"kid": "a"})) == 200
        assert status(token("RS256", headers={"kid": "b"})) == 401
    with service(jwt_jwks_url=issuer.url) as status:
        assert status(token("RS256", headers={"kid": "a"})) == 503


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"keys": [7]}', json.dumps({"keys": [Issuer.jwk(["a"], RSA)]}).encode()], ids=["deep", "7", "kid"]
)
def test_an_issuer_whose_keys_are_none(service, issuer, body):
    issuer.keys = {"a": RSA}
    with service(jwt_jwks_url=issuer.url, jwt_jwks_refresh_s=0) as status:
        assert status(token("RS256", headers={"kid": "a"})) == 200
        issuer.body = body
        assert status(token("RS256", headers={"kid": "b"})) == 401
        assert status(token("RS256", headers={"kid": "a"})) == 200
    with service(jwt_jwks_url=issuer.url) as status:
        assert status(token("RS256", headers={"kid": "a"})) == 503


def forged(header, key):
    """A token signed with HMAC under a header of the attacker's choice."""
    part = lambda value: base64.urlsafe_b64encode(value).rstrip(b"=")  # noqa: E731
    signed = part(json.dumps(header).encode()) + b"." + part(json.dumps(claims()).encode())
    return (signed + b"." + part(hmac.new(key, signed, hashlib.sha256).digest())).decode()


ATTACKS = {
    "none": lambda: jwt.encode(claims(), None, "none"),
    "nOnE": lambda: forged({"alg": "nOnE"}, b""),
    "HS256 with the public key": lambda: forged({"alg": "HS256", "kid": "a"}, pem(RSA).encode()),
    "own jwk": lambda: token("ES256", headers={"kid": "a", "jwk": Issuer.jwk("a", EC)}),
    "own jku": lambda: token("ES256", headers={"kid": "a", "jku": "http://127.0.0.1:1/keys"}),
    "kid list": lambda: forged({"alg": "RS256", "kid": ["a"]}, b"k"),
    "expired": lambda: token("RS256", headers={"kid": "a"}, exp=time.time() - 3600),
    "not yet": lambda: token("RS256", headers={"kid": "a"}, nbf=time.time() + 3600),
    "from the future": lambda: token("RS256", headers={"kid": "a"}, iat=time.time() + 3600),
    "no exp": lambda: token("RS256", headers={"kid": "a"}, exp=None),
    "exp as text": lambda: forged({"alg": "RS256"}, b"k"),
    "no sub": lambda: token("RS256", headers={"kid": "a"}, sub=None),
    "no org": lambda: token("RS256", headers={"kid": "a"}, org=None),
    "orgs empty": lambda: token("RS256", headers={"kid": "a"}, orgs=[]),
    "orgs as text": lambda: token("RS256", headers={"kid": "a"}, orgs=ORG),
    "orgs as object": lambda: token("RS256", headers={"kid": "a"}, orgs={ORG: 1}),
    "wrong audience": lambda: token("RS256", headers={"kid": "a"}, aud="other"),
    "no audience": lambda: token("RS256", headers={"kid": "a"}, aud=None),
    "wrong issuer": lambda: token("RS256", headers={"kid": "a"}, iss="other"),
    "garbage": lambda: "a.b.c",
    "half": lambda: token("RS256", headers={"kid": "a"})[:-40],
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("way", ["jwks", "pem"])
def test_attacks_are_401(service, issuer, monkeypatch, name, way):
    issuer.keys = {"a": RSA}
    key = {"jwt_jwks_url": issuer.url} if way == "jwks" else {"jwt_public_key": pem(RSA)}
    if "audience" not in name and "issuer" not in name:
        right = token("RS256", headers={"kid": "a"})
        options = key
    else:
        right = token("RS256", headers={"kid": "a"}, aud="tuneyard", iss="us")
        options = key | {"jwt_audience": "tuneyard", "jwt_issuer": "us"}
        monkeypatch.setattr("tests.serve_app.test_auth.claims", claims_with(aud="tuneyard", iss="us"))
    with service(**options) as status:
        assert status(right) == 200
        assert status(ATTACKS[name]()) == 401


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"jwt_secret": "short"}, "32 bytes"),
        ({"jwt_secret": "k" * 40, "jwt_public_key": pem(RSA)}, "both set"),
        ({"jwt_public_key": "not a key"}, "PEM"),
        ({"jwt_public_key": pem(rsa.generate_private_key(public_exponent=65537, key_size=1024))}, "2048"),
        ({"jwt_public_key": pem(ec.generate_private_key(ec.SECP256K1()))}, "P-256"),
        ({"jwt_jwks_url": "http://issuer.example/keys"}, "https"),
        ({"home": "/nowhere"}, "TUNEYARD_JWT_JWKS_URL"),
    ],
)
def test_a_service_without_a_sound_key_does_not_start(store, settings, options, said):
    with pytest.raises(RuntimeError, match=said):
        Verifier.from_settings(Settings(embedded=False, **options))


def test_an_exp_that_is_text_is_401_though_the_signature_is_right(service):
    now = int(time.time())
    with service(jwt_public_key=pem(RSA)) as status:
        for exp, expected in ((now + 60, 200), (f"{now + 60}s", 401), ([now + 60], 401), (True, 401)):
            signed = jwt.api_jws.encode(json.dumps({"sub": "x", "org": ORG, "exp": exp}).encode(), RSA, "RS256")
            assert status(signed) == expected, exp


def test_clocks_may_differ_by_the_leeway_and_no_more(service):
    now = time.time()
    with service(jwt_public_key=pem(RSA), jwt_leeway_s=100) as status:
        assert status(token("RS256", exp=now - 50)) == status(token("RS256", nbf=now + 50)) == 200
        assert status(token("RS256", exp=now - 150)) == status(token("RS256", nbf=now + 150)) == 401


def test_tokens_of_an_issuer_are_not_minted_here(settings):
    with pytest.raises(RuntimeError, match="issuer"):
        mint_token(Settings(jwt_public_key=pem(RSA)), ORG, "x", 60)
