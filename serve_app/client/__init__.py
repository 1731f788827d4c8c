"""Python clients: `Client(url, token).submit(spec)`, and `AsyncClient` with the same calls awaited."""

from serve_app.client.answers import ApiError
from serve_app.client.awaited import AsyncClient
from serve_app.client.blocking import FINAL, Client
from serve_app.client.downloads import DownloadError

__all__ = ["FINAL", "ApiError", "AsyncClient", "Client", "DownloadError"]
