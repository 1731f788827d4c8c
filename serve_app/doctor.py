"""What the service stands on, looked at from where its settings are: each is well, or in words what is wrong and how to mend it.

Every check has a thread of its own and so much time: whatever is down, or hangs, the others are told of all the same.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import email.utils
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from serve_app.auth import Verifier
from serve_app.cluster import DISPATCHER, bundle_of
from serve_app.scheduler import Room
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.storage import WHILE_ASKED, storage_credentials
from serve_app.store import schema
from serve_app.store.jobs import JobStore
from serve_app.store.tables import leases, secrets
from train_loop.data.sources import filesystem_for
from train_loop.errors import DatasetError, first_line
from train_loop.model.mirror import COMPLETE

LIMIT_S = 20.0
RAY_S = 120.0  # a driver takes seconds to start, on a busy machine many
MAX_SECRETS = 200  # opened to see whether the key fits
WARN_CLOCK_S, MAX_CLOCK_S = 2.0, 10.0  # the dispatcher's lease is 15 s
LOW_BYTES, FULL_BYTES = 10 << 30, 1 << 30
HUB_HELP = "put models into it (tuneyard models has the embedded ones), or set TUNEYARD_MODEL_MIRROR"


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and where it isn't well how to mend it."""

    check: str
    level: Level
    said: str
    mend: str | None = None


Check = Callable[[Settings], Iterator[Finding]]
InWords = Callable[[Exception], str]


def examine(settings: Settings, ray_address: str, in_words: InWords, limit_s: float = LIMIT_S) -> list[Finding]:
    """Look at everything, all at once; in order. Takes no longer than the slowest may."""
    asked: list[tuple[str, Check, float]] = [
        ("database", _database, limit_s),
        ("secret key", _secret_key, limit_s),
        ("token key", _token_key, limit_s),
        ("storage", _storage, limit_s),
        ("models", _models, limit_s),
        ("disk", _disk, limit_s),
        ("ray", lambda settings: _ray(settings, ray_address, max(limit_s, RAY_S)), max(limit_s, RAY_S) + 5),
    ]
    found: dict[str, list[Finding]] = {name: [] for name, _, _ in asked}
    threads = {}
    for name, check, limit in asked:
        body = threading.Thread(target=_run, args=[name, check, settings, found[name], in_words], daemon=True, name=name)
        body.start()
        threads[body] = time.monotonic() + limit
    for thread, until in threads.items():
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            limit = next(limit for name, _, limit in asked if name == thread.name)
            found[thread.name].append(
                Finding(thread.name, Level.FAIL, f"no answer within {limit:g} s", "it hangs: see its own log, or start it again")
            )
    return [finding for findings in found.values() for finding in list(findings)]


def _run(name: str, check: Check, settings: Settings, found: list[Finding], in_words: InWords) -> None:
    try:
        found.extend(check(settings))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        found.append(Finding(name, Level.FAIL, in_words(error), "mend that, and look again"))


def _database(settings: Settings) -> Iterator[Finding]:
    name, url = "database", sa.make_url(settings.database_url)
    if url.get_backend_name() == "sqlite":
        if not settings.embedded:
            yield Finding(
                name, Level.WARN, "SQLite, for a service on one machine only", "set TUNEYARD_DATABASE_URL to a PostgreSQL"
            )
        if url.database and not Path(url.database).exists():
            yield Finding(name, Level.FAIL, f"there is no {url.database}", "run tuneyard db upgrade, or tuneyard up")
            return
    store = JobStore.open(settings.database_url)
    with store.read() as tx:
        found = schema.revision_of(tx)
    if found is None:
        yield Finding(name, Level.FAIL, "it has no tables", "run tuneyard db upgrade")
        return
    try:
        store.require_current()
    except RuntimeError as error:
        yield Finding(name, Level.FAIL, str(error), "see there")
        return
    with store.read() as tx:
        expires = tx.execute(sa.select(leases.c.expires_at).where(leases.c.name == DISPATCHER)).scalar()
    with contextlib.suppress(_Undone), store.write() as tx:
        tx.execute(
            sa.insert(leases).values(name=f"doctor-{uuid.uuid4()}", owner="doctor", epoch=0, expires_at=dt.datetime.now(dt.UTC))
        )
        raise _Undone
    yield Finding(name, Level.OK, f"{store.engine.name}, schema {found}, can be written")
    if expires is not None and expires > dt.datetime.now(dt.UTC):
        yield Finding("dispatcher", Level.OK, "one is at work")
    else:
        last = "none ever was" if expires is None else f"the last one wrote at {expires:%Y-%m-%d %H:%M:%S} UTC"
        yield Finding("dispatcher", Level.WARN, f"none is at work; {last}", "start the service: tuneyard serve, or tuneyard up")
    yield from _secrets(settings, store)
    if store.engine.name != "sqlite":
        with store.read() as tx:
            yield from _clock("the database's", lambda: tx.execute(sa.select(sa.func.clock_timestamp())).scalar_one())


class _Undone(Exception):
    """Takes back what was written to see whether it can be."""


def _secret_key(settings: Settings) -> Iterator[Finding]:
    name = "secret key"
    try:
        SecretVault.from_settings(JobStore.open(settings.database_url), settings)
    except RuntimeError as error:
        yield Finding(name, Level.FAIL, str(error), "give the key that the stored secrets were sealed with, if there are any")
        return
    yield Finding(name, Level.OK, "it is a sound key")


def _secrets(settings: Settings, store: JobStore) -> Iterator[Finding]:
    try:
        vault = SecretVault.from_settings(store, settings)
    except RuntimeError:
        return  # which is told already
    with store.read() as tx:
        query = sa.select(secrets.c.org_id, secrets.c.secret_id).order_by(secrets.c.created_at.desc()).limit(MAX_SECRETS)
        stored = tx.execute(query).all()
    closed = [secret_id for org_id, secret_id in stored if not _opens(vault, org_id, secret_id)]
    if closed:
        mend = "set TUNEYARD_SECRET_KEY to the key that they were sealed with, or have their owners store them again"
        yield Finding("secrets", Level.FAIL, f"{len(closed)} of {len(stored)} can't be opened with this key", mend)
    else:
        yield Finding("secrets", Level.OK, f"{len(stored)} can be opened")


def _opens(vault: SecretVault, org_id: str, secret_id: str) -> bool:
    try:
        vault.find(org_id, secret_id)
    except DatasetError:
        return False
    return True


def _token_key(settings: Settings) -> Iterator[Finding]:
    name = "token key"
    try:
        Verifier.from_settings(settings)
    except RuntimeError as error:
        yield Finding(name, Level.FAIL, str(error), "see docs/operations.md, Tokens")
        return
    if settings.jwt_jwks_url:
        import jwt

        try:
            keys = jwt.PyJWKClient(settings.jwt_jwks_url, timeout=5).get_jwk_set().keys
        except (jwt.PyJWTError, OSError, ValueError) as error:
            said = f"{settings.jwt_jwks_url} gives no keys ({type(error).__name__})"
            yield Finding(name, Level.FAIL, said, "check TUNEYARD_JWT_JWKS_URL, and that this machine reaches the issuer")
            return
        yield Finding(name, Level.OK, f"the issuer gives {len(keys)} keys")
        return
    yield Finding(name, Level.OK, "a public key" if settings.jwt_public_key else "a key of its own, HS256")


def _storage(settings: Settings) -> Iterator[Finding]:
    uri = settings.storage_uri.rstrip("/")
    storage, root = filesystem_for(uri, storage_credentials(settings), settings.storage_region, timeouts=WHILE_ASKED)
    path, content = f"{root}/.doctor-{uuid.uuid4()}", uuid.uuid4().bytes
    mend = "check TUNEYARD_STORAGE_URI, _ENDPOINT_URL, the keys or the machine's role, and that they may write, read and delete"
    step = "written"
    try:
        if not uri.startswith("s3://"):
            Path(root).mkdir(parents=True, exist_ok=True)
        with storage.open_output_stream(path) as stream:
            stream.write(content)
        step = "read"
        with storage.open_input_stream(path) as stream:
            same = stream.read() == content
        step = "deleted"
        storage.delete_file(path)
    except OSError as error:
        yield Finding("storage", Level.FAIL, f"an object below {uri} can't be {step}: {_short(error)}", mend)
        return
    if not same:
        yield Finding("storage", Level.FAIL, f"{uri} gives back other bytes than were written", "it is broken: use another one")
    else:
        yield Finding("storage", Level.OK, f"{uri}: an object was written, read and deleted")
    if uri.startswith("s3://"):
        yield from _clock("the storage's", lambda: _storage_time(settings))


def _short(error: BaseException) -> str:
    return first_line(error, type(error).__name__)[:200]


def _models(settings: Settings) -> Iterator[Finding]:
    from pyarrow.fs import FileSelector, FileType

    uri = settings.model_mirror
    storage, root = filesystem_for(uri, storage_credentials(settings), settings.storage_region, timeouts=WHILE_ASKED)
    found: list[str] = []
    hollow: list[str] = []
    for owner in storage.get_file_info(FileSelector(root, allow_not_found=True)):
        if owner.type != FileType.Directory or owner.base_name.startswith("."):
            continue
        for folder in storage.get_file_info(FileSelector(owner.path)):
            if folder.type != FileType.Directory:
                continue
            names = {i.base_name for i in storage.get_file_info(FileSelector(folder.path))}
            whole = COMPLETE in names and any(name.endswith(".safetensors") for name in names)
            (found if whole else hollow).append(f"{owner.base_name}/{folder.base_name}")
    for name in hollow:
        yield Finding("models", Level.WARN, f"{name} in {uri} has no {COMPLETE} or no safetensors", "copy the whole model there")
    if found:
        yield Finding(
            "models", Level.OK, f"{len(found)} in {uri}: {', '.join(sorted(found)[:5])}{' …' if len(found) > 5 else ''}"
        )
    elif settings.hub_offline:
        yield Finding(
            "models", Level.FAIL, f"none in {uri}, and TUNEYARD_HUB_OFFLINE is set: no job can have a base model", HUB_HELP
        )
    else:
        yield Finding("models", Level.OK, f"none in {uri}: they come from the hub, or from buckets")


def _disk(settings: Settings) -> Iterator[Finding]:
    places = {"home": settings.home, "temporary files": Path(tempfile.gettempdir())}
    if not settings.storage_uri.startswith("s3://"):
        places["storage"] = Path(settings.storage_uri.removeprefix("file://"))
    seen = set()
    for what, folder in places.items():
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if (device := there.stat().st_dev) in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(there).free
        level = Level.FAIL if free < FULL_BYTES else Level.WARN if free < LOW_BYTES else Level.OK
        mend = None if level is Level.OK else "make room, or put it on a larger disk"
        yield Finding("disk", level, f"{free / (1 << 30):.1f} GiB free at {there} ({what})", mend)


def _clock(whose: str, ask: Callable[[], dt.datetime | None]) -> Iterator[Finding]:
    """How far this machine's clock is from another one."""
    before = dt.datetime.now(dt.UTC)
    theirs, after = ask(), dt.datetime.now(dt.UTC)
    if theirs is None:
        return
    # Theirs is of some moment between, and may be cut to a second.
    off = max((before - theirs).total_seconds() - 1, (theirs - after).total_seconds(), 0.0)
    level = Level.FAIL if off > MAX_CLOCK_S else Level.WARN if off > WARN_CLOCK_S else Level.OK
    mend = None if level is Level.OK else "have both set by NTP: leases, tokens and S3's signatures go by the clock"
    yield Finding("clock", level, f"{off:.0f} s off {whose}" if off >= 1 else f"the same as {whose}", mend)


def _storage_time(settings: Settings) -> dt.datetime | None:
    import httpx

    url = settings.storage_endpoint_url or f"https://s3.{settings.storage_region or 'us-east-1'}.amazonaws.com"
    told = httpx.head(url, timeout=5, trust_env=False).headers.get("Date")
    return email.utils.parsedate_to_datetime(told) if told else None


def _ray(settings: Settings, address: str, limit_s: float) -> Iterator[Finding]:
    command = [sys.executable, "-m", "serve_app.ray_probe", address, settings.ray_namespace]
    # Read when Ray is imported: the embedded one is a Ray of one machine, which is on 127.0.0.1 only (serve_app.embedded.head).
    alone = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if settings.embedded else {}
    try:
        done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        yield Finding(
            "ray", Level.FAIL, f"no answer within {limit_s:g} s", "it hangs: see Ray's logs on the head, or start it again"
        )
        return
    try:
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        yield Finding("ray", Level.FAIL, f"asking it ended with status {done.returncode}", "see: " + " ".join(command[1:]))
        return
    if "error" in told:
        mend = "give the token" if told["token"] else "start Ray (tuneyard up, ray start), or name it with --address"
        yield Finding("ray", Level.FAIL, told["error"], mend)
        return
    nodes = told["nodes"]
    draining = sum(node["draining"] for node in nodes)
    leaving = f", {draining} of them to go soon" if draining else ""
    yield Finding("ray", Level.OK, f"version {told['ray']}, {len(nodes)} nodes{leaving}")
    if not told["dispatcher"]:
        yield Finding(
            "ray", Level.FAIL, "the dispatcher's actor isn't there or doesn't answer", "start the service: tuneyard serve"
        )
    yield from _profiles(settings, [node["resources"] for node in nodes if not node["draining"]])


def _profiles(settings: Settings, nodes: list[dict[str, float]]) -> Iterator[Finding]:
    """What of the profiles the nodes have room for."""
    room = {name: Room.of(nodes).count(bundle_of(profile)) for name, profile in settings.profiles.items()}
    there = {name: count for name, count in room.items() if count}
    kinds = {name.removeprefix("accelerator_type:") for node in nodes for name in node if name.startswith("accelerator_type:")}
    unnamed = kinds - {profile.accelerator_type for profile in settings.profiles.values()}
    if unnamed:
        mend = "add a profile with that accelerator_type to TUNEYARD_PROFILES"
        yield Finding("profiles", Level.WARN, f"no profile is for the cluster's {', '.join(sorted(unnamed))}", mend)
    if there:
        yield Finding("profiles", Level.OK, "workers that fit: " + ", ".join(f"{count} {name}" for name, count in there.items()))
    elif settings.autoscales:
        yield Finding(
            "profiles", Level.WARN, "no node has room for any now", "none is needed where an autoscaler brings nodes for jobs"
        )
    else:
        yield Finding(
            "profiles", Level.FAIL, "no node has room for a worker of any profile", "add machines, or mend TUNEYARD_PROFILES"
        )
