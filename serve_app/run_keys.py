"""The credentials of a run: what the job names by reference, opened from the vault for the run alone."""

from __future__ import annotations

from dataclasses import replace

from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.storage import storage_credentials
from train_loop.data.sources import HubToken, dataset_keys
from train_loop.errors import DatasetError, ModelError
from train_loop.run_files import Keys
from train_loop.spec import JobSpec


def keys_of(spec: JobSpec, vault: SecretVault, settings: Settings) -> Keys:
    """Open the secrets that the job names. Raises DatasetError or ModelError, by whose secret it is."""
    dataset = None
    if spec.dataset_details.secret_id is not None:
        source_type = spec.dataset_details.source_type
        dataset = dataset_keys(source_type, vault.reveal(spec.org, spec.dataset_details.secret_id, source_type))
    return replace(model_keys(spec, vault, settings), dataset=dataset)


def model_keys(spec: JobSpec, vault: SecretVault, settings: Settings) -> Keys:
    """The same, without the dataset's: what opens the base model. Raises ModelError."""
    keys, details = Keys(storage=storage_credentials(settings)), spec.model_details
    if details.secret_id is None:
        return keys
    try:
        found = dataset_keys(details.source_type, vault.reveal(spec.org, details.secret_id, details.source_type))
    except DatasetError as error:
        raise ModelError(error.message, field="model_details.secret_id", code=error.code) from None
    return replace(keys, hub_token=found.token) if isinstance(found, HubToken) else replace(keys, model=found)
