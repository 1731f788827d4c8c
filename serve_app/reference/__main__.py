"""`python -m serve_app.reference`: write the pages of docs/ that are made from the code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from serve_app.app import build_app
from serve_app.reference import commands, http, settings
from serve_app.settings import Settings
from serve_app.store.jobs import JobStore


def main() -> None:
    """Write docs/api.md, docs/cli.md and docs/settings.md."""
    with tempfile.TemporaryDirectory() as home:
        Settings(home=Path(home), embedded=True).prepare_embedded_keys()
        made = Settings(home=Path(home), embedded=True)
        runtime: Any = None
        schema = build_app(made, JobStore.open(made.database_url), runtime).openapi()
    docs = Path(__file__).parent.parent.parent / "docs"
    pages = {"api.md": http.markdown(schema), "cli.md": commands.markdown(), "settings.md": settings.markdown()}
    for name, text in pages.items():
        (docs / name).write_text(text)


if __name__ == "__main__":
    main()
