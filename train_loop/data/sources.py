"""Where bytes are: object storage and local folders through pyarrow, and its errors in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs as pafs

from train_loop.errors import DatasetError, RunFault
from train_loop.spec import DatasetDetails
from train_loop.storage import DENIED, NO_BUCKET, NO_OBJECT, patiently

CONNECT_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 20
FIRST_CONTACT_S = 90  # an outage of the dataset's storage that is waited for before its address is taken to be wrong
PATH = "dataset_details.dataset_path"
SECRET = "dataset_details.secret_id"


@dataclass(frozen=True)
class Credentials:
    """Keys to an S3 account. No part of them shows in its repr."""

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)
    endpoint_url: str | None = None
    region: str | None = None

    @classmethod
    def from_secret(cls, data: Mapping[str, str]) -> Credentials:
        """From the `data` of an aws or s3 secret."""
        return cls(**{k: data[k] for k in cls.__dataclass_fields__ if data.get(k)})


@dataclass(frozen=True)
class SourceFile:
    """One object of a dataset. `path` is its name in the file system, `modified` an ISO 8601 time."""

    path: str
    uri: str
    size_bytes: int
    modified: str


def filesystem_for(
    uri: str, credentials: Credentials | None, region: str | None = None, *, anonymous: bool = False
) -> tuple[pafs.FileSystem, str]:
    """The file system of `uri` and the path in it. Without credentials S3 uses the machine's own (role, profile)."""
    if not uri.startswith("s3://"):
        return pafs.LocalFileSystem(), str(Path(uri.removeprefix("file://")).absolute())
    options: dict[str, object] = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "request_timeout": REQUEST_TIMEOUT_S,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=3),
        "region": (credentials and credentials.region) or region or "us-east-1",
    }
    if credentials is not None:
        options |= {
            "access_key": credentials.access_key_id,
            "secret_key": credentials.secret_access_key,
            "session_token": credentials.session_token,
        }
        if credentials.endpoint_url:
            endpoint = urlsplit(credentials.endpoint_url)
            options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    elif anonymous:
        options["anonymous"] = True
    return pafs.S3FileSystem(**options), uri.removeprefix("s3://")


def explain(error: BaseException | None, uri: str) -> DatasetError:
    """The storage error as a sentence for the owner of `uri`: which thing is wrong, and how to mend it."""
    text = str(error)
    bucket = uri.removeprefix("s3://").partition("/")[0]
    if any(s in text for s in NO_BUCKET):
        return DatasetError(
            f"bucket {bucket} doesn't exist: correct dataset_path ({uri}) or create the bucket.",
            field=PATH,
            code="bucket_not_found",
        )
    if isinstance(error, PermissionError) or any(s in text for s in DENIED):
        return DatasetError(
            f"the storage refused the keys for {uri}: check that the secret named by secret_id holds valid keys "
            "that may read this bucket.",
            field=SECRET,
            code="storage_access_denied",
        )
    if isinstance(error, FileNotFoundError) or any(s in text for s in NO_OBJECT):
        return DatasetError(
            f"there is no object at {uri}: correct dataset_path or upload the file.",
            field=PATH,
            code="object_not_found",
        )
    if isinstance(error, TimeoutError) or any(s in text for s in ("NETWORK_CONNECTION", "curlCode", "timed out", "Timeout")):
        return DatasetError(
            f"the storage of {uri} can't be reached: check the endpoint_url of the secret and that the storage is up.",
            field=PATH,
            code="storage_unreachable",
        )
    return DatasetError(f"{uri} can't be read: {type(error).__name__}.", field=PATH, code="storage_error")


def find_files(details: DatasetDetails, filesystem: pafs.FileSystem, path: str, patience_s: float | None = 0) -> list[SourceFile]:
    """The dataset's files. Raises DatasetError, with a code of its own for each cause.

    An outage is waited out for `patience_s` (None: as long as for the run's own storage, then RunFault).
    """
    uri = details.dataset_path

    def look() -> pafs.FileInfo:
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            _check_bucket(filesystem, path, uri)
            raise FileNotFoundError(uri)
        return info

    try:
        info = patiently(look, f"looking for {uri}", patience_s)
    except OSError as error:
        raise explain(error, uri) from None
    except RunFault as fault:
        if patience_s is None:
            raise
        raise explain(fault.__cause__, uri) from None
    if info.type != pafs.FileType.File:
        raise DatasetError(f"{uri} is a folder: name one object.", field=PATH, code="object_not_found")
    if info.size == 0:
        raise DatasetError(f"{uri} is empty: it has no rows to train on.", field=PATH, code="dataset_empty")
    return [SourceFile(path, uri, info.size, info.mtime.isoformat() if info.mtime else "")]


def _check_bucket(filesystem: pafs.FileSystem, path: str, uri: str) -> None:
    if uri.startswith("s3://"):
        bucket = path.partition("/")[0]
        if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
            raise OSError(f"NoSuchBucket: {bucket}")
