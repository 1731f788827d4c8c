"""Every knob of the service: its default, its unit, and one place it is read from.

Environment variables (prefix TUNEYARD_) win over `<home>/settings.json`, which the embedded start-up writes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import psutil
from cryptography.fernet import Fernet
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, JsonConfigSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from train_loop.model.cache import DEFAULT_BYTES

# Ray's name, memory in GiB, dense 16-bit TFLOP/s by the data sheet: what plans are made of.
NVIDIA = {
    "b200": ("B200", 180, 2250),
    "h200": ("H200", 141, 989),
    "h100": ("H100", 80, 989),
    "a100": ("A100", 80, 312),
    "l40s": ("L40S", 48, 362),
    "l4": ("L4", 24, 121),
    "a10g": ("A10G", 24, 70),
    "t4": ("T4", 16, 65),
    "v100": ("V100", 32, 125),
}
EMBEDDED_CPUS_PER_WORKER = 0.25


class Profile(BaseModel):
    """What one worker of a gpu_type gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accelerator_type: str | None = Field(None, description="Ray's name of the accelerator.")
    resources: dict[str, float] = Field(description="Ray resources of one worker.")
    use_gpu: bool = Field(False, description="Whether workers train on GPUs.")
    gpus_per_node: int = Field(8, ge=1, description="Most workers on one node.")
    memory_gib: float | None = Field(None, gt=0, description="Memory of one GPU, in GiB.")
    tflops: float | None = Field(None, gt=0, description="Dense 16-bit TFLOP/s of one GPU, for time estimates.")
    price_per_hour: float | None = Field(None, ge=0, description="Price of one worker's hour, in your currency.")
    max_workers: int | None = Field(
        None,
        ge=0,
        description="Most workers of this kind that the cluster and its autoscaler can have; default see `autoscales`.",
    )


CLUSTER_PROFILES = {
    name: Profile(accelerator_type=ray_name, resources={"GPU": 1}, use_gpu=True, memory_gib=memory_gib, tflops=tflops)
    for name, (ray_name, memory_gib, tflops) in NVIDIA.items()
} | {"cpu": Profile(resources={"CPU": 1}, gpus_per_node=16)}
EMBEDDED_PROFILES = {name: Profile(resources={"CPU": EMBEDDED_CPUS_PER_WORKER}, gpus_per_node=16) for name in (*NVIDIA, "cpu")}


def _default_home() -> Path:
    return Path(os.environ.get("TUNEYARD_HOME") or Path.home() / ".tuneyard").absolute()


class Settings(BaseSettings):
    """The operator's settings."""

    model_config = SettingsConfigDict(env_prefix="TUNEYARD_", extra="ignore", protected_namespaces=())

    home: Path = Field(default_factory=_default_home, description="Folder of all local state.")
    database_url: str = Field("", repr=False, description="SQLAlchemy URL of the job store; default SQLite in home.")
    storage_uri: str = Field("", description="Where runs go: s3://bucket/prefix or a folder; default <home>/runs.")
    storage_endpoint_url: str | None = Field(None, description="Endpoint of an S3-compatible storage.")
    storage_access_key_id: str | None = Field(None, repr=False, description="Key id; default the machine's own role.")
    storage_secret_access_key: SecretStr | None = Field(None, description="Its secret.")
    storage_region: str | None = Field(None, description="Region of the storage.")
    model_mirror: str = Field("", description="Folder of base models, looked up before the hub; default <home>/models.")
    hub_offline: bool = Field(False, description="Never ask the model hub.")
    jwt_secret: SecretStr | None = Field(None, description="HS256 key of bearer tokens, at least 32 bytes.")
    jwt_public_key: str | None = Field(
        None, description="Instead: the issuer's public key, PEM text or a file (RSA, EC, Ed25519)."
    )
    jwt_jwks_url: str | None = Field(None, description="Instead: https URL of the issuer's keys (JWKS), by kid.")
    jwt_jwks_refresh_s: float = Field(30, ge=0, description="Least time between two fetches of the JWKS, in seconds.")
    jwt_jwks_max_age_s: float = Field(
        600, ge=0, description="Age from which the JWKS is fetched again, so that a withdrawn key ends, in seconds."
    )
    jwt_issuer: str | None = Field(None, description="Required `iss` of tokens.")
    jwt_audience: str | None = Field(None, description="Required `aud` of tokens.")
    jwt_leeway_s: int = Field(30, ge=0, description="Clock difference allowed in tokens, in seconds.")
    secret_key: SecretStr | None = Field(
        None, description="Fernet key that encrypts stored secrets; after a comma, earlier ones that still open what they sealed."
    )
    allowed_s3_endpoints: list[str] = Field(
        default_factory=list, description="Hosts (wildcards allowed) that s3 secrets may name; embedded: loopback."
    )
    allowed_tracker_endpoints: list[str] = Field(
        default_factory=list, description="Hosts (wildcards allowed) that mlflow and wandb secrets may name; embedded: loopback."
    )
    allowed_webhook_hosts: list[str] = Field(
        default_factory=list,
        description="Hosts (wildcards allowed) whose webhooks may be plain http and on a private network; others must be public "
        "ones, by https. Embedded: loopback.",
    )
    allowed_secret_arns: list[str] = Field(
        default_factory=list,
        description="ARNs (wildcards allowed, {org} is the org's UUID) of AWS Secrets Manager that jobs may name; default none.",
    )
    allowed_role_arns: list[str] = Field(
        default_factory=lambda: ["*"],
        description="ARNs (wildcards allowed, {org} is the org's UUID) of AWS roles that secrets may name; default any.",
    )
    aws_endpoint_url: str | None = Field(None, description="Endpoint of AWS STS and Secrets Manager; default AWS itself.")
    embedded: bool = Field(False, description="One machine, no GPU: every gpu_type runs as CPU workers.")
    profiles: dict[str, Profile] = Field(default_factory=dict, description="Infrastructure profiles by gpu_type.")
    max_running_jobs: int = Field(8, ge=1, description="Jobs running at once.")
    max_running_jobs_per_org: int | None = Field(None, ge=1, description="Jobs of one org running at once; default no limit.")
    max_gpus_per_org: int | None = Field(None, ge=1, description="Workers of one org's running jobs; default no limit.")
    max_queued_jobs_per_org: int = Field(1000, ge=1, description="Jobs of one org waiting; one more is a 429.")
    rate_limit: str = Field(
        "1200/minute",
        description="Requests of one org, as <n>/<second|minute|hour>; each ingress replica has an equal share of them.",
    )
    ingress_replicas: int | None = Field(
        None, ge=1, description="Processes that answer HTTP, all on the head; default 2 (a redeploy leaves one), embedded 1."
    )
    max_plans: int = Field(4, ge=1, description="Plans made at once for one ingress replica, each by a process with torch in it.")
    max_plans_per_org: int = Field(2, ge=1, description="Of those, for one org.")
    max_streams_per_org: int = Field(50, ge=1, description="Logs and events that an org follows at once at one ingress replica.")
    max_workers: int | None = Field(None, description="Most workers of all running jobs; default no limit.")
    autoscales: bool | None = Field(
        None,
        description="Whether machines come when there is no room: then a job too large for those there waits, else it is "
        "refused. Default yes, but not embedded.",
    )
    data_cpus: float = Field(1.0, gt=0, description="CPUs of one data preparation task.")
    ready_workers: int | None = Field(
        None,
        ge=0,
        description="Embedded only: processes kept ready for a job's workers, with torch and transformers loaded, some 400 MB "
        "each, and unless 0 those that a job has beside them; default one a core, but at most one for each 8 GiB of memory.",
    )
    data_cache_bytes: int = Field(
        100 << 30, ge=0, description="Prepared rows kept for later jobs of their org, in bytes; the least recently used go first."
    )
    model_cache_bytes: int = Field(
        DEFAULT_BYTES,
        ge=0,
        description="Copies of base models on each machine (TUNEYARD_MODEL_CACHE), in bytes; the least recently used go first, "
        "those in use stay.",
    )
    keep_journal_days: float | None = Field(
        None, ge=0, description="Days after a job's end that its log lines, events and metric points are kept; default for ever."
    )
    keep_checkpoints_days: float | None = Field(
        None,
        ge=0,
        description="Days after its end that the checkpoints of a COMPLETED job are kept; default for ever. What it trained, and "
        "the checkpoints of FAILED and CANCELED jobs, which a resume needs, stay.",
    )
    status_timeout_s: float = Field(1.0, gt=0, description="How long a status query waits for the job actor, in seconds.")
    cancel_grace_s: float = Field(60, ge=0, description="Seconds a canceled or drained job has to save before it is ended.")
    heartbeat_timeout_s: float = Field(60, gt=0, description="Seconds of silence after which a job actor counts as dead.")
    root_path: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9._~-]+)*$",
        description="Path below which a proxy publishes the service, as /tuneyard; the proxy may strip it or not.",
    )
    max_body_bytes: int = Field(1 << 20, ge=1024, description="Largest request body, in bytes.")
    ray_namespace: str = Field("tuneyard", description="Ray namespace of the service's actors.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: Any,
        env_settings: Any,
        dotenv_settings: Any,
        file_secret_settings: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = _default_home() / "settings.json"
        return init_settings, env_settings, JsonConfigSettingsSource(settings_cls, json_file=path)

    @model_validator(mode="after")
    def _fill_from_home(self) -> Settings:
        home = self.home.absolute()
        defaults = {
            "home": home,
            "database_url": self.database_url or f"sqlite:///{home}/tuneyard.db",
            "storage_uri": self.storage_uri or str(home / "runs"),
            "model_mirror": self.model_mirror or str(home / "models"),
            "profiles": self.profiles or (EMBEDDED_PROFILES if self.embedded else CLUSTER_PROFILES),
            "jwt_secret": self.jwt_secret or _read_secret(home / "jwt.key"),
            "ingress_replicas": self.ingress_replicas or (1 if self.embedded else 2),
            "autoscales": not self.embedded if self.autoscales is None else self.autoscales,
            "ready_workers": (_ready_workers() if self.ready_workers is None else self.ready_workers) if self.embedded else 0,
            "secret_key": self.secret_key or _read_secret(home / "secret.key"),
        }
        for name in ("allowed_s3_endpoints", "allowed_tracker_endpoints", "allowed_webhook_hosts"):
            if self.embedded and not getattr(self, name):
                defaults[name] = ["127.0.0.1", "localhost", "::1"]
        for name, value in defaults.items():
            object.__setattr__(self, name, value)
        return self

    @classmethod
    def load(cls) -> Settings:
        """Read environment and settings file. Generates nothing."""
        return cls()

    def require_shared_store(self, num_nodes: int) -> None:
        """Raise RuntimeError when a cluster would have to share a SQLite file, which only one machine can."""
        if self.database_url.startswith("sqlite") and (num_nodes > 1 or not self.embedded):
            raise RuntimeError(
                "the job store is SQLite, which can't be shared between machines: set TUNEYARD_DATABASE_URL to a PostgreSQL "
                "database (postgresql+psycopg://user:password@host/name), or TUNEYARD_EMBEDDED=true for a service on one machine"
            )

    def prepare_embedded_keys(self) -> None:
        """Make the token and encryption keys of an embedded home, once, readable by their owner only."""
        for name, make in (
            ("jwt.key", lambda: secrets.token_urlsafe(48)),
            ("secret.key", lambda: Fernet.generate_key().decode()),
        ):
            write_private(self.home / name, make(), keep=True)


def write_private(path: Path, text: str, *, keep: bool = False) -> None:
    """Write a file that only its owner may read, all of it or nothing; `keep` leaves one that is there alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # made with mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        if keep:
            with contextlib.suppress(FileExistsError):
                os.link(scratch, path)
        else:
            os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def _ready_workers() -> int:
    return min(len(os.sched_getaffinity(0)), psutil.virtual_memory().total // (8 << 30))


def _read_secret(path: Path) -> SecretStr | None:
    try:
        return SecretStr(path.read_text().strip())
    except FileNotFoundError:
        return None
