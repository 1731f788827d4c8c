"""What each type of secret holds. Checks, OpenAPI and the names in errors all come from these models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from serve_app.errors import ApiError, field_error, invalid, one_of, validation_errors
from train_loop.spec import AWS_REGION

MAX_VALUE_CHARS = 8192
ROLE_ARN = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]{1,512}", re.ASCII)
EXTERNAL_ID = re.compile(r"[\w+=,.@:/-]{2,1224}", re.ASCII)
ANY_REGION = re.compile(r"[\w.-]{1,64}", re.ASCII)  # outside AWS it only takes part in the signature
PEM = re.compile(r"\s*-----BEGIN ([A-Z ]*)PRIVATE KEY-----\s.+\s-----END \1PRIVATE KEY-----\s*", re.DOTALL)
# Google's libraries post to the token_uri that a key names, so that only Google's own pass.
GOOGLE_TOKEN_URIS = (
    *("https://oauth2.googleapis.com/token", "https://accounts.google.com/o/oauth2/token"),
    "https://www.googleapis.com/oauth2/v4/token",
)


def _wrong(message: str, **context: Any) -> PydanticCustomError:
    return PydanticCustomError("secret", message, context)  # type: ignore[arg-type]


def _one_word(value: SecretStr) -> SecretStr:
    if re.search(r"[\s\x00-\x1f\x7f]", value.get_secret_value()):
        raise _wrong("must hold no spaces or line breaks")
    return value


def _aws_region(value: str) -> str:
    if not AWS_REGION.fullmatch(value):
        raise _wrong("not an AWS region; one looks like us-west-2")
    return value


def _role_arn(value: str) -> str:
    if not ROLE_ARN.fullmatch(value):
        raise _wrong("not the ARN of a role; one looks like arn:aws:iam::123456789012:role/name")
    return value


def _external_id(value: SecretStr) -> SecretStr:
    if not EXTERNAL_ID.fullmatch(value.get_secret_value()):
        raise _wrong("must be 2 to 1224 letters, digits and _+=,.@:/-")
    return value


def _service_account(value: SecretStr) -> SecretStr:
    wrong = _service_account_fault(value.get_secret_value())
    if wrong is not None:
        raise _wrong(wrong)
    return value


def _service_account_fault(text: str) -> str | None:
    try:
        key = json.loads(text)
    except (ValueError, RecursionError):
        key = None
    if not isinstance(key, dict) or key.get("type") != "service_account":
        return 'must be the JSON text of a service account key, with "type": "service_account"'
    if not isinstance(key.get("client_email"), str) or "@" not in key["client_email"]:
        return "client_email is missing from the JSON text"
    if not isinstance(key.get("private_key"), str) or not PEM.fullmatch(key["private_key"]):
        return "private_key is missing from the JSON text, or isn't a private key in PEM"
    if key.get("token_uri", GOOGLE_TOKEN_URIS[0]) not in GOOGLE_TOKEN_URIS:
        return f"token_uri in the JSON text must be Google's, {GOOGLE_TOKEN_URIS[0]}"
    if key.get("universe_domain", "googleapis.com") != "googleapis.com":
        return "universe_domain in the JSON text must be googleapis.com"
    return None


Value = Annotated[SecretStr, Field(max_length=MAX_VALUE_CHARS), AfterValidator(_one_word)]


class SecretData(BaseModel):
    """Base of every kind: unknown names are errors, `null` and "" mean absent, and no error shows what was given."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _absent(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if k not in cls.model_fields or v not in (None, "")}

    def values(self) -> dict[str, str]:
        """All that is set, in the clear."""
        given = {k: v for k, v in self if v is not None}
        return {k: v.get_secret_value() if isinstance(v, SecretStr) else v for k, v in given.items()}


class AwsKeys(SecretData):
    """Type aws: keys of an AWS account."""

    access_key_id: Value = Field(description="Access key id.")
    secret_access_key: Value = Field(description="Its secret.")
    session_token: Value | None = Field(None, description="Of temporary keys.")
    region: Annotated[str, AfterValidator(_aws_region)] | None = Field(None, description="Region of the buckets.")


class AwsRole(SecretData):
    """Type aws: a role that the service assumes with its own AWS identity when a run needs keys."""

    role_arn: Annotated[str, AfterValidator(_role_arn)] = Field(
        description="The role. Its trust policy should ask for the session name tuneyard-<org>, so that it serves no other org."
    )
    external_id: Annotated[SecretStr, AfterValidator(_external_id)] | None = Field(
        None, description="The external id that the role's trust policy asks for."
    )
    region: Annotated[str, AfterValidator(_aws_region)] | None = Field(None, description="Region of the buckets.")


class S3Keys(SecretData):
    """Type s3: keys of anything S3-compatible."""

    access_key_id: Value = Field(description="Access key id.")
    secret_access_key: Value = Field(description="Its secret.")
    session_token: Value | None = Field(None, description="Of temporary keys.")
    endpoint_url: str | None = Field(
        None,
        max_length=MAX_VALUE_CHARS,
        description="Where the storage is: one of the operator's allowed endpoints; default AWS.",
    )
    region: str | None = Field(None, description="Region of the buckets, as the storage calls it.")

    @model_validator(mode="after")
    def _region(self) -> Self:
        if self.region is not None and self.endpoint_url is None and not AWS_REGION.fullmatch(self.region):
            raise _wrong("not an AWS region, and no endpoint_url is given; one looks like us-west-2", field="region")
        if self.region is not None and not ANY_REGION.fullmatch(self.region):
            raise _wrong("must be at most 64 letters, digits and _.-", field="region")
        return self


class S3Role(AwsRole):
    """Type s3: the same role, whose buckets are reached by an endpoint of their own, such as one of a VPC."""

    endpoint_url: str | None = Field(
        None,
        max_length=MAX_VALUE_CHARS,
        description="Where the storage is: one of the operator's allowed endpoints; default AWS.",
    )


class GcsServiceAccount(SecretData):
    """Type gcs: the key of a Google Cloud service account."""

    service_account_json: Annotated[SecretStr, Field(max_length=MAX_VALUE_CHARS), AfterValidator(_service_account)] = Field(
        description="The key file's whole text: JSON with type service_account, client_email and private_key."
    )


class HfToken(SecretData):
    """Type hf: a token of the Hugging Face hub."""

    token: Value = Field(description="Access token that may read the repository.")


class MlflowServer(SecretData):
    """Type mlflow: an MLflow server that metrics are sent to."""

    tracking_uri: str = Field(
        max_length=MAX_VALUE_CHARS, description="URL of the server: one whose host is on the operator's list."
    )
    username: Value | None = Field(None, description="With password: for a server that asks who it is.")
    password: Value | None = Field(None, description="With username.")
    token: Value | None = Field(None, description="Instead: a bearer token.")
    experiment: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="Experiment that runs go into, made where it isn't there; default tuneyard."
    )

    @model_validator(mode="after")
    def _who(self) -> Self:
        if (self.username is None) != (self.password is None):
            raise _wrong("a username goes with a password", field="password" if self.password is None else "username")
        if self.token is not None and self.username is not None:
            raise _wrong("give either a token or username and password, not both", field="token")
        return self


class WandbProject(SecretData):
    """Type wandb: a project of Weights & Biases that metrics are sent to."""

    api_key: Value = Field(description="API key.")
    project: Annotated[str, Field(max_length=128, pattern=r"^[\w.-]+$")] = Field(description="Project that runs go into.")
    entity: Annotated[str, Field(max_length=128, pattern=r"^[\w.-]+$")] | None = Field(
        None, description="Team or user of the project; default the key's own."
    )
    base_url: str | None = Field(
        None,
        max_length=MAX_VALUE_CHARS,
        description="Of a server of one's own: one whose host is on the operator's list; default W&B's cloud.",
    )


TYPES: dict[str, tuple[type[SecretData], ...]] = {
    "aws": (AwsKeys, AwsRole),
    "gcs": (GcsServiceAccount,),
    "hf": (HfToken,),
    "mlflow": (MlflowServer,),
    "s3": (S3Keys, S3Role),
    "wandb": (WandbProject,),
}
ROLES: dict[str, type[AwsRole]] = {"aws": AwsRole, "s3": S3Role}
# The types that open what is at each source_type.
OPENS = {"s3": ("aws", "s3"), "gcs": ("gcs",), "hf": ("hf",)}
TRACKERS = ("mlflow", "wandb")  # those that report_to may name


def data_schema() -> dict[str, Any]:
    """OpenAPI's description of `data`."""
    return {"anyOf": [model.model_json_schema() for models in TYPES.values() for model in models]}


def parse(type_: str, data: Mapping[str, Any]) -> SecretData:
    """The data of a secret of this type. Raises ApiError 422 that names fields, never values."""
    if type_ not in TYPES:
        message = f"unknown type of secret: it {one_of(sorted(TYPES), type_)}"
        raise invalid([field_error("type", message, allowed=sorted(TYPES))])
    model = TYPES[type_][0]
    if type_ in ROLES and _has_role(data):
        model = ROLES[type_]
        if data.get("access_key_id") or data.get("secret_access_key"):
            raise invalid([field_error("data.role_arn", "give either a role or keys, not both")])
    parsed = _validate(model, data)
    if isinstance(parsed, SecretData):
        return parsed
    raise invalid([e | {"field": f"data.{e['field']}"} for e in parsed])


def faults(type_: str, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is wrong with the data of a secret of this type, by field."""
    try:
        parse(type_, data)
    except ApiError as error:
        return error.errors
    return []


def parse_untyped(data: Mapping[str, Any]) -> SecretData | None:
    """The data of a secret of type aws or s3 that doesn't say which, or None if it is neither."""
    at_endpoint = bool(data.get("endpoint_url"))
    model: type[SecretData] = AwsKeys
    if _has_role(data):
        model = S3Role if at_endpoint else AwsRole
    elif at_endpoint:
        model = S3Keys
    parsed = _validate(model, data)
    return parsed if isinstance(parsed, SecretData) else None


def _has_role(data: Mapping[str, Any]) -> bool:
    return bool(data.get("role_arn") or data.get("external_id"))


def _validate(model: type[SecretData], data: Mapping[str, Any]) -> SecretData | list[dict[str, Any]]:
    # Errors are returned: an exception raised in the handler would carry pydantic's, which holds the input, as its context.
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        return validation_errors(error, model, echo=False)
