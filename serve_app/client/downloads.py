"""A job's files, fetched by their links: checked names, whole files only, and never with the service's token."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from serve_app.client.answers import MAX_TRIES, TRANSIENT, wait_s
from serve_app.client.api import is_loopback

TIMEOUT_S = 60.0
BLOCK_BYTES = 1 << 20


class DownloadError(ValueError):
    """A file can't be had, or isn't what the service said it is."""


class LinkExpired(DownloadError):
    """The storage refuses the link; a new one may work."""


class StorageAway(DownloadError):
    """The storage doesn't answer now."""


@dataclass(frozen=True)
class Wanted:
    """One file: what the service calls it, where it is, where it goes, its hash if the service knows one."""

    name: str
    url: str
    target: Path
    sha256: str | None


def wanted(listing: Mapping[str, Any], folder: Path) -> dict[str, Wanted]:
    """The listed files by name. Raises DownloadError if one would land outside of `folder`, or has no link."""
    return {str(file["name"]): _wanted(file, folder) for file in listing["files"]}


def _wanted(file: Mapping[str, Any], folder: Path) -> Wanted:
    name, url = str(file["name"]), file.get("url")
    # Windows' rules too: they are the stricter ones, and a name is the same on every machine.
    parts = PureWindowsPath(name).parts
    target = folder / name
    refused = not name.isprintable() or not parts or ":" in name or {"..", "\\", "/"} & set(parts) or "\\" in name
    if refused or not target.resolve().is_relative_to(folder.resolve()) or target.resolve() == folder.resolve():
        raise DownloadError(f"{name!r} would be written outside of {folder}")
    if not url:
        raise DownloadError(f"{name} has no link, the service keeps its files in a folder: {file.get('uri')}")
    return Wanted(name, str(url), target, file.get("sha256"))


def fetch(file: Wanted) -> None:
    """Download one file: to a temporary name, checked, then renamed. Raises LinkExpired, DownloadError."""
    stop = stop_after_attempt(MAX_TRIES)
    for attempt in Retrying(stop=stop, wait=wait_s, retry=retry_if_exception_type(StorageAway), reraise=True):
        with attempt:
            _fetch_once(file)


def _fetch_once(file: Wanted) -> None:
    # A connection of its own, without our token: the link carries its own right, and the storage isn't the service.
    # No error may quote the link, for the same reason.
    try:
        with (
            httpx.Client(timeout=TIMEOUT_S, trust_env=not is_loopback(file.url)) as http,
            http.stream("GET", file.url, headers={"Accept-Encoding": "identity"}) as answer,
        ):
            _check(answer.status_code, file.name)
            _write(answer, file)
    except httpx.TransportError as error:
        raise StorageAway(f"{file.name}: the storage can't be reached ({type(error).__name__})") from None
    except httpx.InvalidURL:
        raise DownloadError(f"{file.name}: its link isn't a URL") from None


def _check(status: int, name: str) -> None:
    if status == httpx.codes.OK:
        return
    kind = LinkExpired if status == httpx.codes.FORBIDDEN else StorageAway if status in TRANSIENT else DownloadError
    raise kind(f"{name}: the storage answers {status}")


def _write(answer: httpx.Response, file: Wanted) -> None:
    file.target.parent.mkdir(parents=True, exist_ok=True)
    part = file.target.with_name(f".{uuid.uuid4().hex}.part")
    sha256 = hashlib.sha256()
    try:
        with part.open("xb") as out:
            for block in answer.iter_bytes(BLOCK_BYTES):
                sha256.update(block)
                out.write(block)
        if file.sha256 not in (None, sha256.hexdigest()):
            raise DownloadError(f"{file.name} arrived damaged: its sha256 isn't the one of the manifest")
        part.replace(file.target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
