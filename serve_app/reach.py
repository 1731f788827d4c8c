"""A Ray cluster reached as a driver, or soon a sentence why not."""

from __future__ import annotations

import socket

from train_loop.errors import first_line

CONNECT_S = 5.0


class CannotReach(Exception):
    """No cluster answers there; the message says why."""


class TokenRefused(Exception):
    """The cluster wants its token; the message says how to give it."""


def connect(address: str, namespace: str | None = None) -> None:
    """Have this process be a driver of the cluster at that address. Raises CannotReach, TokenRefused."""
    import ray
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RayError

    try:
        # Ray itself would go on trying for minutes where nothing listens, or for as long with a token that is refused.
        gcs, gcs_port = canonicalize_bootstrap_address(address).rsplit(":", 1)
        socket.create_connection((gcs.strip("[]"), int(gcs_port)), CONNECT_S).close()
        GcsClient(address=f"{gcs}:{gcs_port}")
        ray.init(f"{gcs}:{gcs_port}", namespace=namespace, log_to_driver=False, logging_level="ERROR")
    except AuthenticationError:
        raise TokenRefused(
            "this Ray cluster asks for its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token to the token"
        ) from None
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise CannotReach(f"Ray can't be reached: {first_line(error, type(error).__name__)}") from None
