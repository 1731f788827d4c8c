"""Where a base model's files come from: the operator's mirror, a bucket, or the hub; and into which local folder they go.

Only configuration, tokenizer and safetensors are ever fetched: pickles could run code.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_loop.errors import Cause, ModelError, RunFault
from train_loop.model import cache
from train_loop.model.mirror import COMPLETE, mirrored
from train_loop.spec import SCHEMES, ModelDetails
from train_loop.storage import DENIED, answers_later, download_file, is_away, patiently, within

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

DESCRIPTION = ("*.json", "*.model", "*.jinja", "*.txt")  # config and tokenizer
WEIGHTS = "*.safetensors"
MAX_CONFIG_BYTES = 1 << 20  # of a config.json, which is read where requests are answered
GOOGLE_S = 5.0  # for a config.json in Google's storage, whose client lets a server be silent for minutes
BASE_MODEL = "model_details.base_model"
SECRET = "model_details.secret_id"


def _closed(uri: str) -> tuple[FileSystem, str]:
    raise ModelError(f"{uri} can't be opened here: no storage was given.", field=BASE_MODEL)


@dataclass(frozen=True)
class ModelPlaces:
    """Where base models are looked for. `mirror` is a folder or an s3:// prefix, looked up first.

    `open_mirror` and `open_model` give the file system of an s3:// URI and the path in it: one with the operator's keys, the
    other with the user's.
    """

    mirror: str
    open_mirror: Callable[[str], tuple[FileSystem, str]] = _closed
    open_model: Callable[[str], tuple[FileSystem, str]] = _closed
    hub_token: str | None = field(default=None, repr=False)
    org_id: str = ""  # what one org's keys opened, no other finds in the cache
    cache_bytes: int = cache.DEFAULT_BYTES  # that copies on a machine's own disk may take


def model_folder(details: ModelDetails, places: ModelPlaces, *, weights: bool = True) -> Path:
    """The local folder of the base model; it is fetched once a machine.

    Without `weights` only config and tokenizer are sure to be there. Raises ModelError when there is no such model, or it
    can't be read; RunFault when the bucket, mirror or hub is away for longer than is waited for.
    """
    if details.source_type in SCHEMES:
        filesystem, path = places.open_model(details.base_model)
        folder = _from_bucket(filesystem, path, details.base_model, places.org_id, weights, places.cache_bytes)
        if folder is None:
            raise _missing(details.base_model)
        return folder
    folder = _from_mirror(details, places, weights)
    return _from_hub(details, places, weights) if folder is None else folder


def model_config(details: ModelDetails, places: ModelPlaces) -> dict[str, Any] | None:
    """The base model's config.json where a mirror or bucket has it, None for what has to come from the hub.

    Raises ModelError, and RunFault when the storage is away now: nothing is waited for.
    """
    if details.source_type == "gcs":
        return within(GOOGLE_S, lambda: _model_config(details, places), f"reading {details.base_model}")
    return _model_config(details, places)


def _model_config(details: ModelDetails, places: ModelPlaces) -> dict[str, Any] | None:
    if details.source_type in SCHEMES:
        filesystem, path = places.open_model(details.base_model)
        uri = details.base_model
    elif places.mirror.startswith("s3://"):
        uri = f"{places.mirror.rstrip('/')}/{name_in_mirror(details)}"
        filesystem, path = places.open_mirror(uri)
    else:
        folder = mirrored(Path(places.mirror), name_in_mirror(details))
        return None if folder is None else parse_config((folder / COMPLETE).read_bytes(), str(folder))
    try:
        with filesystem.open_input_stream(f"{path.rstrip('/')}/{COMPLETE}") as stream:
            text = stream.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        if details.source_type in SCHEMES:
            raise _missing(uri) from None
        return None
    except (OSError, ValueError) as error:
        if is_away(error) and not _is_elsewhere(error):
            raise RunFault(Cause.STORAGE_AWAY, f"The storage is away: {uri} can't be read.") from error
        raise _explained(error, uri) from None
    return parse_config(text, uri)


def parse_config(text: bytes, where: str) -> dict[str, Any]:
    """A model's config.json, which anyone may have written. Raises ModelError."""
    with contextlib.suppress(ValueError, RecursionError):
        config = json.loads(text) if len(text) <= MAX_CONFIG_BYTES else None
        if isinstance(config, dict):
            return config
    raise ModelError(
        f"{COMPLETE} of {where} isn't a model's configuration: it must be a JSON object of at most {MAX_CONFIG_BYTES} bytes.",
        field=BASE_MODEL,
    )


def size_of(config: Mapping[str, Any], *names: str) -> int | None:
    """A size of the language model by the first of these names that its config has as a number; None where it has none."""
    inner = config.get("text_config")
    inner = inner if isinstance(inner, dict) else config
    found = (inner.get(name) for name in names)
    return next((size for size in found if isinstance(size, int) and not isinstance(size, bool) and size > 0), None)


def context_of(config: Mapping[str, Any]) -> int | None:
    """The longest sample that the model takes, in tokens, if its config says so."""
    return size_of(config, "max_position_embeddings", "n_positions")


def hidden_size_of(config: Mapping[str, Any]) -> int | None:
    """The width of the model, if its config says so."""
    return size_of(config, "hidden_size", "n_embd", "d_model")


def name_in_mirror(details: ModelDetails) -> str:
    """The model's folder below a mirror: `<owner>/<name>`, with `@<revision>` where one is asked for."""
    return details.base_model + (f"@{details.revision}" if details.revision else "")


def revision_of(folder: Path) -> str | None:
    """The hub's commit that the folder is a snapshot of; None for what isn't from the hub."""
    return folder.name if folder.parent.name == "snapshots" else None


def weights_hash(folder: Path) -> str:
    """sha256 over the model's safetensors files in name order: which weights, whatever the folder is called."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(WEIGHTS)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _from_mirror(details: ModelDetails, places: ModelPlaces, weights: bool) -> Path | None:
    name = name_in_mirror(details)
    if not places.mirror.startswith("s3://"):
        return mirrored(Path(places.mirror), name)
    uri = f"{places.mirror.rstrip('/')}/{name}"
    filesystem, path = places.open_mirror(uri)
    return _from_bucket(filesystem, path, uri, "", weights, places.cache_bytes)


def _from_hub(details: ModelDetails, places: ModelPlaces, weights: bool) -> Path:
    import httpx2  # the hub's client raises its errors as they are
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    wanted = [*DESCRIPTION, *([WEIGHTS] if weights else [])]
    # The hub's client serves what it has to whoever asks while the hub is away: a private model has a cache per org.
    own = cache.root() / "hub" / places.org_id if places.hub_token else None

    def look() -> Path | Exception:
        try:
            return Path(
                snapshot_download(
                    details.base_model,
                    revision=details.revision,
                    token=places.hub_token,
                    cache_dir=own,
                    allow_patterns=wanted,
                )
            )
        except (OSError, ValueError, httpx2.HTTPError) as error:
            if hub_is_away(error):
                raise ConnectionError(f"the hub doesn't answer ({type(error.__cause__ or error).__name__})") from error
            return error

    with contextlib.ExitStack() as stack:
        if own is not None:
            name = repo_folder_name(repo_id=details.base_model, repo_type="model")
            stack.enter_context(cache.entry(own / name, places.cache_bytes))
        found = patiently(look, f"fetching {details.base_model} from the hub")
    try:
        if isinstance(found, Exception):
            raise found
        return found
    except RevisionNotFoundError as error:
        raise ModelError(f"{details.base_model} has no revision {details.revision}.", field="model_details.revision") from error
    except GatedRepoError as error:
        raise ModelError(
            f"{details.base_model} is gated: accept its terms on the hub, and name a secret of type hf in secret_id.",
            field=SECRET,
        ) from error
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise ModelError(
            f"base model {name_in_mirror(details)} is neither in the model mirror ({places.mirror}) nor on the hub: "
            f"{type(error).__name__}. Put it in the mirror, or correct model_details.base_model.",
            field=BASE_MODEL,
        ) from error


def hub_is_away(error: Exception) -> bool:
    """Whether the hub didn't answer, or not for now; a refusal is an answer, and so is being told to ask no hub."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # Its client says that there is no copy here either, and why that mattered as the cause.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    if isinstance(cause, HfHubHTTPError):
        return cause.response is not None and answers_later(cause.response.status_code)
    return isinstance(cause, httpx2.TransportError | ConnectionError | TimeoutError) and not isinstance(
        cause, OfflineModeIsEnabled
    )


def _from_bucket(filesystem: FileSystem, path: str, uri: str, owner: str, weights: bool, cache_bytes: int) -> Path | None:
    """Fetch a folder of a bucket into the cache, once for each state of it; None when no model is there."""
    path = path.rstrip("/")
    found = {name: info for name, info in _listing(filesystem, path, uri).items() if _is_wanted(name, weights=True)}
    if COMPLETE not in found:
        return None
    if not any(fnmatch.fnmatch(name, WEIGHTS) for name in found):
        raise ModelError(
            f"{uri} holds no safetensors, and nothing else is loaded: pickled weights can run code.", field=BASE_MODEL
        )
    state = repr([owner, uri, *((name, info.size, str(info.mtime)) for name, info in sorted(found.items()))])
    folder = cache.root() / (hashlib.sha256(state.encode()).hexdigest()[:24] + ("" if weights else "-description"))
    with cache.entry(folder, cache_bytes):
        if not folder.is_dir():
            part = folder.with_suffix(cache.PART)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            for name in sorted(found):
                if _is_wanted(name, weights):
                    _fetch(filesystem, f"{path}/{name}", part / name, found[name].size, uri)
            os.replace(part, folder)
    return folder


def _fetch(filesystem: FileSystem, path: str, local: Path, size: int, uri: str) -> None:
    try:
        download_file(filesystem, path, local)
    except OSError as error:
        raise _explained(error, uri) from None
    if (got := local.stat().st_size) != size:
        raise ModelError(f"{uri}/{local.name} changed while it was read: {got} of {size} bytes.", field=BASE_MODEL)


def _listing(filesystem: FileSystem, path: str, uri: str) -> dict[str, Any]:
    """The objects right in a folder, by name."""
    from pyarrow.fs import FileSelector, FileType

    def look() -> Any:
        try:
            return filesystem.get_file_info(FileSelector(path, allow_not_found=True))
        except OSError as error:
            if _is_elsewhere(error):
                raise _explained(error, uri) from None
            raise

    try:
        infos = patiently(look, f"looking for {uri}")
    except OSError as error:
        raise _explained(error, uri) from None
    return {info.base_name: info for info in infos if info.type == FileType.File}


def _is_elsewhere(error: Exception) -> bool:
    """Whether S3 says that the bucket is in another region."""
    return "HTTP status 301" in str(error)


def _missing(uri: str) -> ModelError:
    return ModelError(f"there is no model at {uri}: it must be a folder with {COMPLETE} and safetensors.", field=BASE_MODEL)


def _explained(error: BaseException | None, uri: str) -> ModelError:
    if isinstance(error, PermissionError) or any(sign in str(error) for sign in DENIED):
        return ModelError(
            f"the storage refused the keys for {uri}: check that the secret named by secret_id may read and list it.",
            field=SECRET,
            code="storage_access_denied",
        )
    return ModelError(
        f"{uri} can't be read ({type(error).__name__}): correct base_model, or the endpoint and region of its secret.",
        field=BASE_MODEL,
    )


def _is_wanted(name: str, weights: bool) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in (*DESCRIPTION, *([WEIGHTS] if weights else [])))
