"""Python clients: `Client(url, token).submit(spec)`, and `AsyncClient` with the same calls awaited; and what they answer."""

from typing import TYPE_CHECKING, Any

from serve_app.client.answers import ApiError
from serve_app.client.awaited import AsyncClient
from serve_app.client.blocking import FINAL, Client
from serve_app.client.downloads import DownloadError

if TYPE_CHECKING:
    from serve_app.routes.answers import (
        ArtifactFile,
        Artifacts,
        Deleted,
        DeletedWebhook,
        EventEntry,
        Events,
        JobAnswer,
        JobList,
        JobMetrics,
        LogEntry,
        Logs,
        MetricPoint,
        NewWebhook,
        Plan,
        Points,
        SecretAnswer,
        Secrets,
        Submitted,
        TestedWebhook,
        WebhookAnswer,
        WebhookList,
    )
else:  # or a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """The type of an answer, loaded once somebody names it: its module needs all that the service does."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from serve_app.routes import answers

        return getattr(answers, name)


__all__ = [
    "FINAL",
    "ApiError",
    "ArtifactFile",
    "Artifacts",
    "AsyncClient",
    "Client",
    "Deleted",
    "DeletedWebhook",
    "DownloadError",
    "EventEntry",
    "Events",
    "JobAnswer",
    "JobList",
    "JobMetrics",
    "LogEntry",
    "Logs",
    "MetricPoint",
    "NewWebhook",
    "Plan",
    "Points",
    "SecretAnswer",
    "Secrets",
    "Submitted",
    "TestedWebhook",
    "WebhookAnswer",
    "WebhookList",
]
