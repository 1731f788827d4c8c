"""A job's plan, made in a Ray worker: torch stays out of the ingress, and a template that never ends can be ended."""

from __future__ import annotations

from typing import Any

from serve_app.run_keys import keys_of
from serve_app.secrets import SecretVault
from serve_app.settings import Profile, Settings
from serve_app.store.jobs import JobStore
from train_loop.data.sources import dataset_filesystem
from train_loop.errors import UserError
from train_loop.run_files import model_places
from train_loop.spec import JobSpec

TIMEOUT_S = 30.0


def plan_job(spec: JobSpec, settings: Settings, vault: SecretVault) -> dict[str, Any]:
    """The job's plan with this service's models, hardware and prices. Raises UserError where the job would fail at once."""
    from train_loop.plan import make_plan

    keys = keys_of(spec, vault, settings)
    source = dataset_filesystem(spec.dataset_details, keys.dataset)
    hardware = _hardware(settings.profiles[spec.infra_config.gpu_type], spec.infra_config.num_workers)
    return make_plan(spec, model_places(spec, settings.model_mirror, keys, settings.model_cache_bytes), hardware, source)


def plan_in_worker(spec: str) -> dict[str, Any]:
    """The body of the Ray task: {"plan": …} or {"error": …}. It finds the secrets by itself, so no key is an argument."""
    settings = Settings.load()
    vault = SecretVault.from_settings(JobStore.open(settings.database_url), settings)
    try:
        return {"plan": plan_job(JobSpec.model_validate_json(spec), settings, vault)}
    except UserError as error:
        return {"error": {"message": error.message, "field": error.field, "code": error.code}}


def _hardware(profile: Profile, num_workers: int) -> Any:
    from train_loop.plan import GPU_MFU, Hardware, this_machine

    if profile.use_gpu:
        memory = None if profile.memory_gib is None else int(profile.memory_gib * 2**30)
        return Hardware("cuda", memory, (profile.tflops or 100) * 1e12 * GPU_MFU, profile.price_per_hour)
    # CPU workers of one machine share it.
    machine = this_machine()
    memory = machine.memory_bytes and machine.memory_bytes // num_workers
    return Hardware("cpu", memory, machine.flops / num_workers, profile.price_per_hour)
