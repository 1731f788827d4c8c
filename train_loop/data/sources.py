"""Where bytes are: object storage and local folders through pyarrow, and its errors in plain words."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs as pafs

from train_loop.errors import DatasetError, RunFault
from train_loop.spec import COMPRESSED, DatasetDetails, FileSplit, JobSpec
from train_loop.storage import DENIED, NO_BUCKET, NO_OBJECT, patiently

REQUEST_TIMEOUT_S = 20
FIRST_CONTACT_S = 90  # an outage of the dataset's storage that is waited for before its address is taken to be wrong
PATH = "dataset_details.dataset_path"
EVAL_PATH = "dataset_config.split.eval_path"
SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "json": (".json", ".json.gz", ".json.zst"),
    "parquet": (".parquet",),
    "zip": (".zip",),
}
SECRET = "dataset_details.secret_id"
MAX_ETAGS = 32  # files that are asked for theirs, one request each
GCS_SCOPES = ["https://www.googleapis.com/auth/devstorage.read_only"]


@dataclass(frozen=True)
class Timeouts:
    """How long one request to S3 may take to connect and then be without an answer, and how often it is made."""

    connect_s: float = 5
    silence_s: float = REQUEST_TIMEOUT_S
    attempts: int = 3


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

    def values(self) -> list[str]:
        """What no log may show."""
        return [v for v in (self.access_key_id, self.secret_access_key, self.session_token) if v]


@dataclass(frozen=True)
class GoogleKey:
    """The key of a service account, as JSON text that doesn't show in its repr."""

    service_account_json: str = field(repr=False)

    def token(self) -> tuple[str, dt.datetime]:
        """A token to read with, and until when it is good (UTC). Raises DatasetError."""
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import Request
        from google.oauth2 import service_account

        try:
            key = service_account.Credentials.from_service_account_info(json.loads(self.service_account_json), scopes=GCS_SCOPES)
            key.refresh(Request())
        except (GoogleAuthError, ValueError) as error:
            # Its own text may quote the key.
            raise DatasetError(
                f"Google gave no token for the service account of the secret ({type(error).__name__}): store its key again.",
                field=SECRET,
                code="storage_access_denied",
            ) from None
        return key.token, key.expiry.replace(tzinfo=dt.UTC)

    def values(self) -> list[str]:
        """What no log may show."""
        private = json.loads(self.service_account_json).get("private_key", "")
        return [self.service_account_json, private, *private.splitlines()[1:-1]]


@dataclass(frozen=True)
class HubToken:
    """A token of the Hugging Face hub, which doesn't show in its repr."""

    token: str = field(repr=False)

    def values(self) -> list[str]:
        """What no log may show."""
        return [self.token]


DatasetKeys = Credentials | GoogleKey | HubToken


def dataset_keys(source_type: str, data: Mapping[str, str]) -> DatasetKeys:
    """From the `data` of a secret that opens datasets of this source_type."""
    if source_type == "gcs":
        return GoogleKey(data["service_account_json"])
    return HubToken(data["token"]) if source_type == "hf" else Credentials.from_secret(data)


@dataclass(frozen=True)
class SourceFile:
    """One object of a dataset. `path` is its name in the file system, `modified` an ISO 8601 time (of the hub a hash).

    `name` is what tells it from the dataset's other files: its path below their prefix; "" where there is just one.
    """

    path: str
    uri: str
    size_bytes: int
    modified: str
    name: str = ""
    is_eval: bool = False  # its rows are for evaluation only
    etag: str = ""  # S3's, of a dataset of few files


def dataset_filesystem(details: DatasetDetails, keys: DatasetKeys | None) -> pafs.FileSystem:
    """The file system that the dataset is in. Without keys it uses the machine's own, or none for what is public.

    Raises DatasetError.
    """
    anonymous = keys is None and details.ownership == "public"
    if details.source_type == "gcs":
        return google_filesystem(keys if isinstance(keys, GoogleKey) else None, anonymous=anonymous)
    if details.source_type == "hf":
        return _hub(keys if isinstance(keys, HubToken) else None)
    found = keys if isinstance(keys, Credentials) else None
    return filesystem_for(details.dataset_path, found, details.region, anonymous=anonymous)[0]


def google_filesystem(key: GoogleKey | None, *, anonymous: bool) -> pafs.FileSystem:
    """Google's storage. Without a key it uses the machine's own, or none. Raises DatasetError when Google gives no token."""
    options: dict[str, object] = {"retry_time_limit": dt.timedelta(seconds=REQUEST_TIMEOUT_S)}
    if key is not None:
        # pyarrow reads keys from a file that the environment names, which is one for all orgs of a process: give it a token.
        options["access_token"], options["credential_token_expiration"] = key.token()
    return pafs.GcsFileSystem(anonymous=anonymous, **options)


def _hub(token: HubToken | None) -> pafs.FileSystem:
    from huggingface_hub import HfFileSystem

    # No token means none: not the one that somebody has logged in with on this machine. Another org's listing isn't kept.
    hub = HfFileSystem(token=token.token if token else False, skip_instance_cache=True)
    return pafs.PyFileSystem(pafs.FSSpecHandler(hub))


def filesystem_for(
    uri: str,
    credentials: Credentials | None,
    region: str | None = None,
    *,
    anonymous: bool = False,
    timeouts: Timeouts = Timeouts(),
) -> tuple[pafs.FileSystem, str]:
    """The file system of `uri` and the path in it. Without credentials S3 uses the machine's own (role, profile)."""
    if not uri.startswith("s3://"):
        return pafs.LocalFileSystem(), path_of(uri)
    options: dict[str, object] = {
        "connect_timeout": timeouts.connect_s,
        "request_timeout": timeouts.silence_s,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=timeouts.attempts),
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
    return pafs.S3FileSystem(**options), path_of(uri)


def path_of(uri: str) -> str:
    """The path in its file system."""
    for scheme in ("s3://", "gs://", "hf://"):
        if uri.startswith(scheme):
            return uri.removeprefix(scheme).rstrip("/")
    return str(Path(uri.removeprefix("file://")).absolute())


def explain(error: BaseException | None, uri: str, field: str = PATH) -> DatasetError:
    """The storage error as a sentence for the owner of `uri`: which thing is wrong, and how to mend it."""
    text, name = str(error), field.rpartition(".")[2]
    bucket = path_of(uri).partition("/")[0]
    if any(s in text for s in NO_BUCKET):
        return DatasetError(
            f"bucket {bucket} doesn't exist: correct {name} ({uri}) or create the bucket.",
            field=field,
            code="bucket_not_found",
        )
    if isinstance(error, PermissionError) or any(s in text for s in DENIED):
        return DatasetError(
            f"the storage refused the keys for {uri}: check that the secret named by secret_id holds valid keys "
            "that may read this bucket. Without a secret_id it must be public.",
            field=SECRET,
            code="storage_access_denied",
        )
    if isinstance(error, FileNotFoundError) and uri.startswith("hf://"):
        return DatasetError(
            f"the hub has nothing at {path_of(uri)}, or shows it only to those with a token for it: correct {name}, or name a "
            "secret of type hf by secret_id.",
            field=field,
            code="object_not_found",
        )
    if isinstance(error, FileNotFoundError) or any(s in text for s in NO_OBJECT):
        return DatasetError(
            f"there is no object at {uri}: correct {name} or upload the file.",
            field=field,
            code="object_not_found",
        )
    if isinstance(error, TimeoutError) or any(s in text for s in ("NETWORK_CONNECTION", "curlCode", "timed out", "Timeout")):
        return DatasetError(
            f"the storage of {uri} can't be reached: check the endpoint_url of the secret and that the storage is up. "
            "Without a secret_id s3:// is AWS's own.",
            field=field,
            code="storage_unreachable",
        )
    return DatasetError(f"{uri} can't be read: {type(error).__name__}.", field=field, code="storage_error")


def find_files(spec: JobSpec, filesystem: pafs.FileSystem, patience_s: float | None = 0) -> list[SourceFile]:
    """The dataset's files in name order, after them those that are for evaluation only.

    Raises DatasetError, with a code of its own for each cause. An outage is waited out for `patience_s` (None: as long as for
    the run's own storage, then RunFault).
    """
    details, split = spec.dataset_details, spec.dataset_config.split
    dataset, held_out_at = details.dataset_path, split.eval_path if isinstance(split, FileSplit) else ""
    if details.source_type == "hf":
        dataset, held_out_at = f"hf://datasets/{dataset}", f"hf://datasets/{dataset}/{held_out_at}"
    streaming = spec.dataset_config.preprocessing.streaming
    found = _files_at(dataset, PATH, details.dataset_type, filesystem, patience_s)
    _check_streaming(found, PATH, streaming)
    if not isinstance(split, FileSplit):
        return found
    held_out = _files_at(held_out_at, EVAL_PATH, details.dataset_type, filesystem, patience_s)
    _check_streaming(held_out, EVAL_PATH, streaming)
    paths = {f.path for f in held_out}
    found = [f for f in found if f.path not in paths]
    if not found:
        raise DatasetError(
            f"{split.eval_path} holds all of {details.dataset_path}: nothing is left to train on.",
            field=EVAL_PATH,
            code="dataset_empty",
        )
    return found + [replace(f, is_eval=True) for f in held_out]


def _check_streaming(files: Sequence[SourceFile], field: str, streaming: bool) -> None:
    compressed = [f.uri for f in files if f.path.endswith(COMPRESSED)]
    if streaming and compressed:
        raise DatasetError(
            f"streaming reads single rows, which a compressed file doesn't allow: store {compressed[0]} uncompressed.",
            field=field,
            code="cannot_stream",
        )


def _files_at(uri: str, field: str, dataset_type: str, filesystem: pafs.FileSystem, patience_s: float | None) -> list[SourceFile]:
    path = path_of(uri)

    def look() -> list[pafs.FileInfo]:
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            _check_bucket(filesystem, path, uri)
            raise FileNotFoundError(uri)
        if info.type == pafs.FileType.File and not uri.endswith("/"):
            return [info]
        return [i for i in filesystem.get_file_info(pafs.FileSelector(path, recursive=True)) if i.type == pafs.FileType.File]

    try:
        there = patiently(look, f"looking for {uri}", patience_s)
    except OSError as error:
        raise explain(error, uri, field) from None
    except RunFault as fault:
        if patience_s is None:
            raise
        raise explain(fault.__cause__, uri, field) from None
    one = [i.path for i in there] == [path]
    suffixes = SUFFIXES[dataset_type]
    of_type = there if one else [i for i in there if i.path.endswith(suffixes) and not _is_hidden(i.path[len(path) :])]
    if not of_type:
        kinds = ", ".join(suffixes)
        raise DatasetError(f"{uri} holds no file that ends in {kinds}.", field=field, code="object_not_found")
    files = [
        SourceFile(
            path=i.path,
            uri=uri if one else f"{uri.rstrip('/')}{i.path[len(path) :]}",
            size_bytes=i.size,
            modified=_version(filesystem, i),
            name="" if one else i.path[len(path) + 1 :],
        )
        for i in of_type
        if i.size > 0
    ]
    if not files:
        raise DatasetError(f"{uri} is empty: it has no rows to train on.", field=field, code="dataset_empty")
    if isinstance(filesystem, pafs.S3FileSystem) and len(files) <= MAX_ETAGS:
        files = [replace(f, etag=_etag(filesystem, f)) for f in files]
    return sorted(files, key=lambda f: f.name)


def _etag(filesystem: pafs.S3FileSystem, file: SourceFile) -> str:
    """What S3 calls this content: its times count whole seconds, in which a file may be replaced by another of its size."""

    def ask() -> str:
        with filesystem.open_input_stream(file.path) as stream:
            return str(stream.metadata().get("ETag", b"").decode())

    try:
        return patiently(ask, f"looking at {file.uri}")
    except OSError as error:
        raise explain(error, file.uri) from None


def _version(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> str:
    """What changes when the file does, besides its size."""
    if isinstance(filesystem, pafs.PyFileSystem):  # the hub tells no time, but a hash
        return str(filesystem.handler.fs.info(info.path)["blob_id"])
    return info.mtime.isoformat() if info.mtime else ""


def _is_hidden(path: str) -> bool:
    """Whether it is one of those that tools leave beside data (_SUCCESS, .part)."""
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _check_bucket(filesystem: pafs.FileSystem, path: str, uri: str) -> None:
    if uri.startswith("s3://"):
        bucket = path.partition("/")[0]
        if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
            raise OSError(f"NoSuchBucket: {bucket}")
