"""From a submission's fields to a JobSpec that can run here, or all that is wrong with it at once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import ValidationError

from serve_app.aws import is_arn
from serve_app.errors import field_error, invalid, validation_errors
from serve_app.secret_types import OPENS_S3
from serve_app.secrets import Secret, SecretVault
from serve_app.settings import Settings
from train_loop.errors import DatasetError
from train_loop.spec import AWS_REGION, JobSpec

PLAIN = ("org", "experiment_name")
SECTIONS = ("dataset_config", "model_details", "train_config", "dataset_details", "infra_config")
HUB_TIMEOUT_S = 3.0


def validate(payload: dict[str, Any], settings: Settings, vault: SecretVault, capacity: Mapping[str, int]) -> JobSpec:
    """The job, if its fields are right and it can run here. Raises ApiError 422 with every error.

    `capacity` is the most workers that the cluster could have, by gpu_type, as far as is known.
    """
    try:
        spec = JobSpec.model_validate(payload)
    except ValidationError as error:
        raise invalid(validation_errors(error, JobSpec)) from None
    errors = [*_infra_errors(spec, settings, capacity), *_dataset_errors(spec, vault), *_model_errors(spec, settings)]
    if errors:
        raise invalid(errors)
    return spec


def _infra_errors(spec: JobSpec, settings: Settings, capacity: Mapping[str, int]) -> list[dict[str, Any]]:
    infra = spec.infra_config
    profile = settings.profiles.get(infra.gpu_type)
    if profile is None:
        names = sorted(settings.profiles)
        return [field_error("infra_config.gpu_type", f"unknown gpu_type; this service has {', '.join(names)}", allowed=names)]
    if infra.gpu_count > profile.gpus_per_node:
        message = f"a node of {infra.gpu_type} has {profile.gpus_per_node} GPUs"
        return [field_error("infra_config.gpu_count", message, allowed={"le": profile.gpus_per_node})]
    if spec.train_config.hyperparameters.optim == "paged_adamw_8bit" and not profile.use_gpu:
        message = f"paged_adamw_8bit needs a GPU, and workers of {infra.gpu_type} have none here: adamw_8bit takes the same steps"
        return [field_error("train_config.hyperparameters.optim", message, allowed=["adamw", "adamw_8bit"])]
    quota = settings.max_gpus_per_org
    if quota is not None and infra.num_workers > quota:
        return [field_error("infra_config.node_count", f"{infra.num_workers} workers are more than this org's quota of {quota}")]
    if settings.max_workers is not None and infra.num_workers > settings.max_workers:
        message = f"gpu_count x node_count is {infra.num_workers} workers; this service has room for {settings.max_workers}"
        return [field_error("infra_config.node_count", message)]
    at_least = infra.gpu_count * (infra.min_node_count or infra.node_count)
    most = capacity.get(infra.gpu_type, at_least)
    if most < at_least:
        offer = ", ".join(f"{name} ({count})" for name, count in sorted(capacity.items()) if count) or "none"
        message = f"{at_least} workers of {infra.gpu_type} are more than this cluster can have, {most}; it has {offer}"
        return [field_error("infra_config.node_count" if most else "infra_config.gpu_type", message)]
    return []


def _dataset_errors(spec: JobSpec, vault: SecretVault) -> list[dict[str, Any]]:
    details = spec.dataset_details
    if details.source_type == "local":
        return [
            field_error("dataset_details.source_type", "local paths are for runs without the service; use s3", allowed=["s3"])
        ]
    secret, errors = _dataset_secret(spec, vault)
    has_endpoint = secret is not None and secret.has_endpoint
    if details.region is not None and not has_endpoint and not AWS_REGION.match(details.region):
        errors.append(field_error("dataset_details.region", "not an AWS region; one looks like us-west-2"))
    template = spec.dataset_config.preprocessing.prompt.template
    if template is not None:
        try:
            plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # transformers' own tag
            ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        except TemplateSyntaxError as error:
            message = f"isn't a Jinja template: {error.message} in line {error.lineno}"
            errors.append(field_error("dataset_config.preprocessing.prompt.template", message))
        except (RecursionError, ValueError) as error:  # nesting without end; numbers of thousands of digits
            message = f"isn't a Jinja template that can be used ({type(error).__name__})"
            errors.append(field_error("dataset_config.preprocessing.prompt.template", message))
    return errors


def _dataset_secret(spec: JobSpec, vault: SecretVault) -> tuple[Secret | None, list[dict[str, Any]]]:
    """The stored secret that the dataset names, if any, and what keeps it from opening the dataset."""
    field, name = "dataset_details.secret_id", spec.dataset_details.secret_id
    unknown = "no such secret in this org: store the keys by POST /secret/ and use the secret_id it returns"
    if name is None:
        return None, []
    if is_arn(name):
        if vault.may_name(spec.org, name):
            return None, []
        # Said without asking AWS, so that it doesn't tell whether there is such a secret.
        return None, [field_error(field, f"{unknown}, or have the operator allow the ARN (TUNEYARD_ALLOWED_SECRET_ARNS)")]
    try:
        secret = vault.find(spec.org, name)
    except DatasetError as error:
        return None, [field_error(field, error.message)]
    if secret is None:
        return None, [field_error(field, unknown)]
    if spec.dataset_details.source_type == "s3" and secret.type not in OPENS_S3:
        message = f"this secret is of type {secret.type}, and an s3 dataset needs one of type {' or '.join(OPENS_S3)}"
        return None, [field_error(field, message, allowed=list(OPENS_S3))]
    return secret, []


def _model_errors(spec: JobSpec, settings: Settings) -> list[dict[str, Any]]:
    name = spec.model_details.base_model
    field = "model_details.base_model"
    folder = Path(settings.model_mirror, name)
    if (folder / "config.json").is_file():
        context = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
        asked = spec.dataset_config.preprocessing.prompt.max_length
        if context is not None and asked > context:
            message = f"{asked} tokens are more than the context of {name}, {context}"
            return [field_error("dataset_config.preprocessing.prompt.max_length", message, allowed={"le": context})]
        return []
    where = f"not in the model mirror ({settings.model_mirror}, setting TUNEYARD_MODEL_MIRROR)"
    if settings.hub_offline:
        return [field_error(field, f"{name} is {where}, and the hub is switched off")]
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        return [field_error(field, f"{name} is {where}, and the hub has no such public model")]
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        return [field_error(field, f"{name} is {where}, and the hub answered {status}")]
    except (OSError, httpx.HTTPError, ValueError) as error:
        reason = type(error).__name__
        return [field_error(field, f"{name} is {where}, and the hub can't be reached ({reason})")]
    return []
