"""The service's object storage: where a run's folder is, and links with which its files can be fetched."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyarrow.fs import FileSelector, FileType
from pydantic import BaseModel, ValidationError

from serve_app.settings import Settings
from train_loop.data.sources import Credentials, Timeouts, filesystem_for
from train_loop.layout import ADAPTER_FOLDER, MANIFEST, MERGED_FOLDER, RECORDS

LINK_S = 900
WHILE_ASKED = Timeouts(connect_s=2, silence_s=5, attempts=1)  # somebody waits, and holds one of the replica's threads


def run_uri(settings: Settings, org_id: str, request_id: str) -> str:
    """The run's folder in object storage."""
    return f"{settings.storage_uri.rstrip('/')}/{org_id}/{request_id}"


def storage_credentials(settings: Settings) -> Credentials | None:
    """The service's own keys to the storage, or None where the machine has a role."""
    if settings.storage_access_key_id is None or settings.storage_secret_access_key is None:
        return None
    return Credentials(
        access_key_id=settings.storage_access_key_id,
        secret_access_key=settings.storage_secret_access_key.get_secret_value(),
        endpoint_url=settings.storage_endpoint_url,
        region=settings.storage_region,
    )


def artifacts(settings: Settings, org_id: str, request_id: str) -> list[dict[str, Any]]:
    """The run's files that are meant for users: name, uri, size_bytes, sha256 (None while the run goes on), url.

    A url works for LINK_S seconds; None where the storage is a plain folder. Raises OSError, within seconds, when the storage is
    away.
    """
    uri = run_uri(settings, org_id, request_id)
    storage, path = filesystem_for(uri, storage_credentials(settings), timeouts=WHILE_ASKED)
    found = {
        i.path.removeprefix(f"{path}/"): i.size
        for i in storage.get_file_info([f"{path}/{n}" for n in (MANIFEST, *RECORDS)])
        if _is_file(i)
    }
    hashes: dict[str, str] = {}
    if MANIFEST in found:  # it comes last, so everything else is there
        with storage.open_input_stream(f"{path}/{MANIFEST}") as stream:
            text = stream.read()
        hashes = _hashes(text) | {MANIFEST: hashlib.sha256(text).hexdigest()}
        outputs = {ADAPTER_FOLDER, MERGED_FOLDER}
        for folder in outputs & {name.partition("/")[0] for name in hashes} or outputs:
            listing = storage.get_file_info(FileSelector(f"{path}/{folder}", recursive=True, allow_not_found=True))
            found |= {i.path.removeprefix(f"{path}/"): i.size for i in listing if _is_file(i)}
    link = _linker(settings, path)
    return [
        {"name": name, "uri": f"{uri}/{name}", "size_bytes": size, "sha256": hashes.get(name), "url": link(name)}
        for name, size in sorted(found.items())
    ]


class _Listed(BaseModel):
    name: str
    sha256: str


class _Manifest(BaseModel):
    records: list[_Listed] = []
    adapter_files: list[_Listed] = []
    merged_files: list[_Listed] = []


def _hashes(text: bytes) -> dict[str, str]:
    """The sha256 of the files that a manifest lists; of none where it was damaged, for the files can be fetched nevertheless."""
    try:
        manifest = _Manifest.model_validate_json(text)
    except ValidationError:
        return {}
    folders = {"": manifest.records, f"{ADAPTER_FOLDER}/": manifest.adapter_files, f"{MERGED_FOLDER}/": manifest.merged_files}
    return {f"{folder}{file.name}": file.sha256 for folder, files in folders.items() for file in files}


def _is_file(info: Any) -> bool:
    return bool(info.type == FileType.File)


def _s3(settings: Settings) -> tuple[Any, str, str]:
    """A client of the S3 storage, its bucket and the prefix of all runs."""
    import boto3
    from botocore.config import Config

    keys = storage_credentials(settings)
    client = boto3.client(
        "s3",
        endpoint_url=settings.storage_endpoint_url,
        region_name=settings.storage_region or "us-east-1",
        aws_access_key_id=keys and keys.access_key_id,
        aws_secret_access_key=keys and keys.secret_access_key,
        config=Config(signature_version="s3v4"),
    )
    bucket, _, prefix = settings.storage_uri.removeprefix("s3://").partition("/")
    return client, bucket, prefix.rstrip("/")


def _linker(settings: Settings, path: str) -> Any:
    if not settings.storage_uri.startswith("s3://"):
        return lambda name: None
    client, bucket, _ = _s3(settings)
    folder = path.removeprefix(f"{bucket}/")
    return lambda name: client.generate_presigned_url(
        "get_object", Params={"Bucket": bucket, "Key": f"{folder}/{name}"}, ExpiresIn=LINK_S
    )


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was begun."""

    key: str
    upload_id: str


def abandoned_uploads(settings: Settings, older_than: dt.datetime) -> Iterator[Upload]:
    """Multipart uploads below the runs that were begun before then and never ended; none where the storage is a plain folder.

    They are a killed process's parts, which cost money and show in no listing.
    """
    if not settings.storage_uri.startswith("s3://"):
        return
    client, bucket, prefix = _s3(settings)
    for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=f"{prefix}/" if prefix else ""):
        for found in page.get("Uploads", []):
            if found["Initiated"] < older_than:
                yield Upload(found["Key"], found["UploadId"])


def abort_upload(settings: Settings, upload: Upload) -> None:
    """Give its parts up."""
    client, bucket, _ = _s3(settings)
    client.abort_multipart_upload(Bucket=bucket, Key=upload.key, UploadId=upload.upload_id)
