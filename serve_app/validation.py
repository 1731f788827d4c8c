"""From a submission's fields to a JobSpec that can run here, or all that is wrong with it at once."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import ValidationError

from serve_app.aws import is_arn
from serve_app.errors import MAX_ERRORS, beside, field_error, invalid, validation_errors
from serve_app.lifecycle import Status
from serve_app.quota import default_quota
from serve_app.run_keys import model_keys
from serve_app.secret_types import OPENS, TRACKERS
from serve_app.secrets import Secret, SecretVault
from serve_app.settings import Settings
from serve_app.storage import WHILE_ASKED, storage_credentials
from serve_app.store.jobs import JobStore
from serve_app.store.quotas import quota_of
from train_loop.advice import advice
from train_loop.data.rendering import needless
from train_loop.errors import Cause, DatasetError, ModelError, RunFault, UserError
from train_loop.model.mirror import COMPLETE
from train_loop.model.source import (
    BASE_MODEL,
    MAX_CONFIG_BYTES,
    context_of,
    hidden_size_of,
    model_config,
    name_in_mirror,
    parse_config,
)
from train_loop.model.source import SECRET as MODEL_SECRET
from train_loop.model.vision import FAMILIES, OTHER_TOWERS
from train_loop.run_files import Keys, model_places
from train_loop.section import NOT_SUPPORTED_YET, RULE, right_ones
from train_loop.spec import AWS_REGION, SCHEMES, DatasetDetails, InfraConfig, JobSpec, ModelDetails
from train_loop.storage import answers_later
from train_loop.trackers import weights_and_biases

PLAIN = ("org", "experiment_name")
SECTIONS = ("dataset_config", "model_details", "train_config", "dataset_details", "infra_config")
HUB_TIMEOUT_S = 3.0
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


def validate(
    payload: dict[str, Any],
    wrong: list[dict[str, Any]],
    settings: Settings,
    vault: SecretVault,
    capacity: Mapping[str, int],
    jobs: JobStore,
) -> tuple[JobSpec, list[str]]:
    """The job, if its fields are right and it can run here, and its warnings. Raises ApiError 422 with every error, RunFault when
    that the base model's storage or the hub is away is all that is wrong.

    `wrong` is what was found before. `capacity` is the most workers that the cluster could have, by gpu_type, as far as is known.
    """
    errors, right = wrong, {"org", *SECTIONS}
    try:
        spec = JobSpec.model_validate(payload)
    except ValidationError as error:
        errors = beside(errors, validation_errors(error, JobSpec))
        if len(errors) >= MAX_ERRORS:  # which may not be all that the checks below must know of
            raise invalid(errors) from None
        found = _right_ones(payload, error)
        spec, right = JobSpec.model_construct(**found), set(found)
    # Each with the fields that it reads: of a job that is wrong elsewhere it is still done.
    checks: tuple[tuple[set[str], Callable[[], list[dict[str, Any]]]], ...] = (
        ({"infra_config"}, lambda: _infra_errors(spec, settings, capacity, _max_gpus(spec, right, settings, jobs))),
        ({"infra_config", "train_config"}, lambda: _optim_errors(spec, settings)),
        ({"dataset_config"}, lambda: _template_errors(spec)),
        ({"org", "dataset_details"}, lambda: _dataset_errors(spec, vault)),
        ({"org", "model_details"}, lambda: _opening_errors(spec.org, "model_details", spec.model_details, vault)),
        ({"org", "model_details", "train_config"}, lambda: _start_errors(spec, jobs)),
        ({"org", "train_config"}, lambda: _tracker_errors(spec, vault)),
    )
    for about, check in checks:
        if about <= right:
            errors = beside(errors, check())
    config: dict[str, Any] = {}
    if {"org", "model_details"} <= right:
        try:
            config = _config(spec, settings, vault, {e["field"] for e in errors})
        except UserError as error:
            errors = beside(errors, [field_error(error.field or BASE_MODEL, error.message)])
        except RunFault:
            if not errors:
                raise
    if "dataset_config" in right:
        errors = beside(errors, _length_errors(spec, config))
    if "model_details" in right:
        errors = beside(errors, _sight_errors(spec, config))
    if errors:
        raise invalid(errors)
    return spec, list(advice(spec, hidden=hidden_size_of(config), context=context_of(config)))


def _right_ones(payload: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """The org and the sections that are right in themselves, though a rule over several fields may be broken."""
    broken = {str(e["loc"][0]) for e in error.errors(include_url=False) if e["type"] not in (RULE, NOT_SUPPORTED_YET)}
    org = {} if "org" in broken else {"org": str(uuid.UUID(payload["org"]))}
    return org | right_ones(JobSpec, payload, broken)


def _max_gpus(spec: JobSpec, right: Set[str], settings: Settings, jobs: JobStore) -> int | None:
    """How many workers the org may have, if it is known which org it is."""
    default = default_quota(settings)
    if "org" not in right:
        return default.max_gpus
    with jobs.read() as tx:
        return quota_of(tx, spec.org).over(default).max_gpus


def _infra_errors(spec: JobSpec, settings: Settings, capacity: Mapping[str, int], max_gpus: int | None) -> list[dict[str, Any]]:
    infra = spec.infra_config
    profile = settings.profiles.get(infra.gpu_type)
    errors = []
    if profile is None:
        names = sorted(settings.profiles)
        errors.append(
            field_error("infra_config.gpu_type", f"unknown gpu_type; this service has {', '.join(names)}", allowed=names)
        )
    elif infra.gpu_count > profile.gpus_per_node:
        message = f"a node of {infra.gpu_type} has {profile.gpus_per_node} GPU{'s' if profile.gpus_per_node > 1 else ''}"
        errors.append(field_error("infra_config.gpu_count", message, allowed={"le": profile.gpus_per_node}))
    return [*errors, *_size_errors(spec.infra_config, settings, capacity, max_gpus)]


def _size_errors(infra: InfraConfig, settings: Settings, capacity: Mapping[str, int], quota: int | None) -> list[dict[str, Any]]:
    # An elastic job starts on as few as that.
    nodes = infra.min_node_count or infra.node_count
    at_least = infra.gpu_count * nodes
    what = "gpu_count x node_count" if nodes == infra.node_count else "gpu_count x min_node_count"
    if quota is not None and at_least > quota:
        return [field_error("infra_config.node_count", f"{at_least} workers ({what}) are more than this org's quota of {quota}")]
    if settings.max_workers is not None and at_least > settings.max_workers:
        message = f"{what} is {at_least} workers; this service has room for {settings.max_workers}"
        return [field_error("infra_config.node_count", message)]
    most = capacity.get(infra.gpu_type, at_least)
    if most < at_least:
        offer = ", ".join(f"{name} ({count})" for name, count in sorted(capacity.items()) if count) or "none"
        message = f"{at_least} workers of {infra.gpu_type} are more than this cluster can have, {most}; it has {offer}"
        return [field_error("infra_config.node_count" if most else "infra_config.gpu_type", message)]
    return []


def _optim_errors(spec: JobSpec, settings: Settings) -> list[dict[str, Any]]:
    gpu_type, optim = spec.infra_config.gpu_type, spec.train_config.hyperparameters.optim
    profile = settings.profiles.get(gpu_type)
    if optim != "paged_adamw_8bit" or profile is None or profile.use_gpu:
        return []
    message = f"paged_adamw_8bit needs a GPU, and workers of {gpu_type} have none here: adamw_8bit takes the same steps"
    return [field_error("train_config.hyperparameters.optim", message, allowed=["adamw", "adamw_8bit"])]


def _dataset_errors(spec: JobSpec, vault: SecretVault) -> list[dict[str, Any]]:
    details = spec.dataset_details
    if details.source_type == "local":
        return [
            field_error(
                "dataset_details.source_type",
                "local paths are for runs without the service; use s3, gcs or hf",
                allowed=["s3", "gcs", "hf"],
            )
        ]
    return _opening_errors(spec.org, "dataset_details", details, vault)


def _template_errors(spec: JobSpec) -> list[dict[str, Any]]:
    template = spec.dataset_config.preprocessing.prompt.template
    if template is None:
        return []
    try:
        plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # transformers' own tag
        wrong = needless(ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(plain))
    except TemplateSyntaxError as error:
        message = f"isn't a Jinja template: {error.message} in line {error.lineno}"
    except (RecursionError, ValueError) as error:  # nesting without end; numbers of thousands of digits
        message = f"isn't a Jinja template that can be used ({type(error).__name__})"
    else:
        if wrong is None:
            return []
        message = wrong
    return [field_error("dataset_config.preprocessing.prompt.template", message)]


def _opening_errors(
    org_id: str, section: str, details: DatasetDetails | ModelDetails, vault: SecretVault
) -> list[dict[str, Any]]:
    """What keeps a section's secret and region from opening what it names."""
    types = OPENS.get(details.source_type, ())
    what = f"a {section.partition('_')[0]} of {details.source_type}"
    secret, errors = _secret(org_id, f"{section}.secret_id", details.secret_id, types, what, vault)
    has_endpoint = secret is not None and secret.has_endpoint
    if details.region is not None and not has_endpoint and not AWS_REGION.fullmatch(details.region):
        errors.append(field_error(f"{section}.region", "not an AWS region; one looks like us-west-2"))
    return errors


def _secret(
    org_id: str, field: str, name: str | None, types: Sequence[str], what: str, vault: SecretVault
) -> tuple[Secret | None, list[dict[str, Any]]]:
    """The stored secret of that name, if any, and what keeps it from being used."""
    unknown = "no such secret in this org: store the keys by POST /secret/ and use the secret_id it returns"
    if name is None:
        return None, []
    if is_arn(name) and "aws" not in types:
        message = f"{what} needs a secret of type {' or '.join(types)}, stored by POST /secret/: an ARN stands for keys of S3"
        return None, [field_error(field, message, allowed=list(types))]
    if is_arn(name):
        if vault.may_name(org_id, name):
            return None, []
        # Said without asking AWS, so that it doesn't tell whether there is such a secret.
        return None, [field_error(field, f"{unknown}, or have the operator allow the ARN (TUNEYARD_ALLOWED_SECRET_ARNS)")]
    try:
        secret = vault.find(org_id, name)
    except DatasetError as error:
        return None, [field_error(field, error.message)]
    if secret is None:
        return None, [field_error(field, unknown)]
    if secret.type not in types:
        message = f"this secret is of type {secret.type}, and {what} needs one of type {' or '.join(types)}"
        return None, [field_error(field, message, allowed=list(types))]
    return secret, []


def _config(spec: JobSpec, settings: Settings, vault: SecretVault, blamed: Set[str]) -> dict[str, Any]:
    """The base model's config.json; {} where that can't be looked for, as the fields that say where and with what are `blamed`.

    Raises ModelError for what keeps the job from using the model, RunFault when its storage or the hub is away.
    """
    details, closed = spec.model_details, MODEL_SECRET in blamed
    if BASE_MODEL in blamed or (details.source_type in SCHEMES and (closed or "model_details.region" in blamed)):
        return {}
    # The mirror is the operator's: it needs no keys of the user's.
    keys = Keys(storage=storage_credentials(settings)) if closed else model_keys(spec, vault, settings)
    config = model_config(details, model_places(spec, settings.model_mirror, keys, timeouts=WHILE_ASKED))
    if config is None and not closed:
        where = f"not in the model mirror ({settings.model_mirror}, setting TUNEYARD_MODEL_MIRROR)"
        config = _hub_config(details, keys.hub_token, f"{name_in_mirror(details)} is {where}", settings.hub_offline)
    return config or {}


def _length_errors(spec: JobSpec, config: dict[str, Any]) -> list[dict[str, Any]]:
    context, asked = context_of(config), spec.dataset_config.preprocessing.prompt.max_length
    if context is None or asked <= context:
        return []
    message = f"{asked} tokens are more than the context of {spec.model_details.base_model}, {context}"
    return [field_error("dataset_config.preprocessing.prompt.max_length", message, allowed={"le": context})]


def _sight_errors(spec: JobSpec, config: dict[str, Any]) -> list[dict[str, Any]]:
    """What keeps a vlm job's base from learning from images, if its config is known."""
    if spec.model_details.model_type != "vlm" or not config:
        return []
    kind, tower = config.get("model_type"), config.get("vision_config")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or (isinstance(tower, dict) and tower.get("model_type") in OTHER_TOWERS):
        names = ", ".join(known.name for known in FAMILIES.values())
        message = f"{spec.model_details.base_model} is none of the models that learn from images here, which are {names}"
        if not isinstance(tower, dict):
            message += "; for one that reads text alone, model_type is llm"
        return [field_error(BASE_MODEL, message, allowed=sorted(FAMILIES))]
    return []


def _hub_config(details: ModelDetails, token: str | None, where: str, offline: bool) -> dict[str, Any]:
    """The config.json of a model of the hub. Raises ModelError where the hub doesn't give it."""
    import httpx
    from huggingface_hub import constants, get_token, hf_hub_url

    if offline or constants.HF_HUB_OFFLINE:
        raise ModelError(f"{where}, and the hub is switched off", field=BASE_MODEL)
    url, text = hf_hub_url(details.base_model, COMPLETE, revision=details.revision), b""
    bearer = token or get_token()
    headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
    try:
        with httpx.stream("GET", url, headers=headers, timeout=HUB_TIMEOUT_S, follow_redirects=True) as answer:
            blocks = answer.iter_bytes() if answer.is_success else iter(())
            while len(text) <= MAX_CONFIG_BYTES and (block := next(blocks, b"")):
                text += block
    except httpx.HTTPError as error:
        raise _hub_away(where, f"can't be reached ({type(error).__name__})") from None
    except (httpx.InvalidURL, ValueError) as error:
        raise ModelError(f"{where}, and the hub can't be asked for it ({type(error).__name__})", field=BASE_MODEL) from None
    if answer.is_success:
        return parse_config(text, details.base_model)
    match answer.headers.get("X-Error-Code"):
        case "GatedRepo":
            message = f"{where}, and gated on the hub: accept its terms there, and name a secret of type hf"
            raise ModelError(message, field="model_details.secret_id")
        case "RevisionNotFound":
            raise ModelError(f"{where}, and the hub has no such revision of it", field="model_details.revision")
        case "RepoNotFound":
            seen = "no such public model" if token is None else "no such model that this token may read"
            raise ModelError(f"{where}, and the hub has {seen}", field=BASE_MODEL)
        case "EntryNotFound":
            raise ModelError(f"{where}, and what the hub has of that name holds no {COMPLETE}", field=BASE_MODEL)
    if answers_later(answer.status_code):
        raise _hub_away(where, f"answered {answer.status_code}")
    raise ModelError(f"{where}, and the hub answered {answer.status_code}", field=BASE_MODEL)


def _hub_away(where: str, said: str) -> RunFault:
    return RunFault(Cause.STORAGE_AWAY, f"{where}, and the hub {said} (setting TUNEYARD_HUB_OFFLINE, if there is none)")


def _tracker_errors(spec: JobSpec, vault: SecretVault) -> list[dict[str, Any]]:
    """What keeps the trackers that report_to names from being told."""
    errors: list[dict[str, Any]] = []
    for i, name in enumerate(spec.train_config.report_to):
        field = f"train_config.report_to.{i}"
        secret, wrong = _secret(spec.org, field, name, TRACKERS, "report_to", vault)
        errors += wrong
        if secret is not None and secret.type == "wandb" and not weights_and_biases.is_installed():
            message = "this service has no client of Weights & Biases: its operator installs tuneyard[wandb]"
            errors.append(field_error(field, message))
    return errors


def _start_errors(spec: JobSpec, jobs: JobStore) -> list[dict[str, Any]]:
    """What keeps training from going on from the adapter that init_from names."""
    field, name = "train_config.adapter_config.init_from", spec.train_config.adapter_config.init_from
    if name is None or name.startswith(("s3://", "gs://")):
        return []
    if not UUID.fullmatch(name):
        return [
            field_error(
                field, "init_from must be the request_id of a job of this org, or an s3://bucket/folder or gs://bucket/folder"
            )
        ]
    job = jobs.get(name)
    if job is None or job.org_id != spec.org:
        return [field_error(field, "no such job in this org")]
    if job.status != Status.COMPLETED:
        return [field_error(field, f"that job is {job.status}: only one that is COMPLETED has an adapter to go on from")]
    if job.spec["train_config"]["train_type"] != "lora":
        return [field_error(field, "that job trained every weight and has no adapter to go on from")]
    base = job.spec["model_details"]["base_model"]
    if base != spec.model_details.base_model:
        return [field_error(field, f"that job's adapter is for {base}, not for {spec.model_details.base_model}")]
    return []
