"""Where the files of a run are, and what opens them: its own folder, the dataset, the base model, the adapter it starts from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from train_loop.data.sources import (
    Credentials,
    DatasetKeys,
    GoogleKey,
    Timeouts,
    dataset_filesystem,
    filesystem_for,
    google_filesystem,
    path_of,
)
from train_loop.errors import DatasetError, ModelError, UserError
from train_loop.layout import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS
from train_loop.model.cache import DEFAULT_BYTES
from train_loop.model.source import SECRET, ModelPlaces
from train_loop.spec import JobSpec
from train_loop.storage import download_file
from train_loop.trackers.tracker import TrackerKeys

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


@dataclass(frozen=True)
class Keys:
    """Credentials of a run. They travel from the monitor to who needs them, and are never part of a plan or config."""

    dataset: DatasetKeys | None = None
    storage: Credentials | None = None
    model: Credentials | GoogleKey | None = None
    hub_token: str | None = field(default=None, repr=False)

    def values(self) -> list[str]:
        """What no log may show."""
        found = [value for keys in (self.dataset, self.storage, self.model) if keys is not None for value in keys.values()]
        return found if self.hub_token is None else [*found, self.hub_token]


def _no_trackers(name: str) -> TrackerKeys:
    raise UserError(f"no secret {name} was given", field="train_config.report_to")


@dataclass(frozen=True)
class RunFiles:
    """Where a run's bytes are. Picklable and free of credentials: they come from the monitor when a file is opened."""

    storage_uri: str  # the run's own folder: <storage>/<org>/<request_id>
    model_mirror: str  # a folder, or s3://bucket/prefix that the storage's keys open
    keys: Callable[[], Keys]
    tracker: Callable[[str], TrackerKeys] = _no_trackers  # opens a secret of report_to
    model_cache_bytes: int = DEFAULT_BYTES

    def storage(self) -> tuple[FileSystem, str]:
        """The run's file system and folder."""
        return filesystem_for(self.storage_uri, self.keys().storage)

    def source(self, spec: JobSpec) -> FileSystem:
        """The dataset's file system."""
        return dataset_filesystem(spec.dataset_details, self.keys().dataset)

    def models(self, spec: JobSpec) -> ModelPlaces:
        """Where the job's base model is looked for."""
        return model_places(spec, self.model_mirror, self.keys(), self.model_cache_bytes)

    def start(self, spec: JobSpec, name: str) -> tuple[FileSystem, str]:
        """File system and folder of the adapter that init_from names: a run of the same org, else a URI for the user's keys."""
        if "/" not in name:
            storage, run_path = self.storage()
            return storage, f"{run_path.rpartition('/')[0]}/{name}/{ADAPTER_FOLDER}"
        keys, details = self.keys(), spec.dataset_details
        source_type, opener = ("gcs", GoogleKey) if name.startswith("gs://") else ("s3", Credentials)
        found = next((k for k in (keys.model, keys.dataset) if isinstance(k, opener)), None)
        # The machine's own role only for who runs this without the service; there a private dataset in a bucket always has keys.
        own = details.source_type == source_type and details.ownership == "private"
        anonymous = found is None and not own
        if source_type == "gcs":
            return google_filesystem(found if isinstance(found, GoogleKey) else None, anonymous=anonymous), path_of(name)
        return filesystem_for(name, found if isinstance(found, Credentials) else None, details.region, anonymous=anonymous)


def model_places(
    spec: JobSpec, mirror: str, keys: Keys, cache_bytes: int = DEFAULT_BYTES, timeouts: Timeouts = Timeouts()
) -> ModelPlaces:
    """Where the job's base model is looked for, and what opens it; `timeouts` are those of S3."""
    details = spec.model_details
    anonymous = keys.model is None and details.ownership == "public"

    def open_model(uri: str) -> tuple[FileSystem, str]:
        if details.source_type != "gcs":
            found = keys.model if isinstance(keys.model, Credentials) else None
            return filesystem_for(uri, found, details.region, anonymous=anonymous, timeouts=timeouts)
        try:
            google = keys.model if isinstance(keys.model, GoogleKey) else None
            return google_filesystem(google, anonymous=anonymous), path_of(uri)
        except DatasetError as error:
            raise ModelError(error.message, field=SECRET, code=error.code) from None

    return ModelPlaces(
        mirror,
        open_mirror=lambda uri: filesystem_for(uri, keys.storage, timeouts=timeouts),
        open_model=open_model,
        hub_token=keys.hub_token,
        org_id=spec.org,
        cache_bytes=cache_bytes,
    )


def fetch_start(spec: JobSpec, files: RunFiles, scratch: Path) -> Path | None:
    """A local folder with the adapter that init_from names, or None without one. Raises ModelError."""
    at, name = "train_config.adapter_config.init_from", spec.train_config.adapter_config.init_from
    if name is None:
        return None
    folder = Path(tempfile.mkdtemp(dir=scratch, prefix="start-"))
    try:
        storage, path = files.start(spec, name)
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            download_file(storage, f"{path}/{file}", folder / file)
    except DatasetError as error:
        raise ModelError(f"init_from {name} can't be read: {error.message}", field=at, code=error.code) from None
    except OSError as error:
        what = "there is no adapter" if isinstance(error, FileNotFoundError) else "the storage refused the keys"
        raise ModelError(f"init_from {name} can't be read: {what}.", field=at) from error
    return folder
