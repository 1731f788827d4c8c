"""The page /docs, which shows the OpenAPI document and tries its calls, and all that the page loads.

FastAPI's own has its scripts from a CDN: it is empty where there is no internet, and elsewhere runs a stranger's code beside the
token that is typed into it.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html

PATH = "/docs"
PARTS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
NO_ICON = "data:,"


def install(app: FastAPI) -> None:
    """Have `app` show its document at PATH."""

    async def page(request: Request) -> Response:
        below = request.scope.get("root_path", "").rstrip("/")
        script, style = (f"{below}{PATH}/{name}" for name in PARTS)
        return get_swagger_ui_html(
            openapi_url=f"{below}{app.openapi_url}",
            title=app.title,
            swagger_js_url=script,
            swagger_css_url=style,
            swagger_favicon_url=NO_ICON,
        )

    def part(request: Request) -> Response:
        name = request.url.path.rpartition("/")[2]
        # The package is there for these files alone.
        content = (files("fastapi_offline") / "static" / name).read_bytes()
        return Response(content, media_type=PARTS[name], headers={"Cache-Control": "max-age=86400"})

    for path in (PATH, f"{PATH}/"):
        app.add_route(path, page, include_in_schema=False)
    for name in PARTS:
        app.add_route(f"{PATH}/{name}", part, include_in_schema=False)
