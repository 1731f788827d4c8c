"""The schema of the store: brought to a revision, and judged by the code that is to work on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serve_app.store.tables import UtcTime, oldest_code

BASE = "base"


def head() -> str:
    """The revision that this code was written for."""
    return str(_scripts().get_current_head())


def revision_of(connection: Connection) -> str | None:
    """The schema's revision; None before the first one."""
    from alembic.runtime.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision()


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Bring the schema up to `revision`; one that is later already, and still good for this code, stays.

    Raises RuntimeError when it is of a later version that this code can't work on.
    """
    if is_known(found := revision_of(connection)):
        _run("upgrade", connection, revision)
    else:
        _require_later_to_fit(connection, found)


def downgrade(connection: Connection, revision: str) -> None:
    """Take the schema back to `revision`; `base` is before the first one."""
    _run("downgrade", connection, revision)


def require_usable(connection: Connection) -> None:
    """Raise RuntimeError unless this code can work on the schema: its own, or a later one that says that it may."""
    found = revision_of(connection)
    if not is_known(found):
        _require_later_to_fit(connection, found)
    elif found != head():
        raise RuntimeError(f"the job store's schema is at revision {found}, this version needs {head()}: run tuneyard db upgrade")


def is_known(revision: str | None) -> bool:
    """Whether this code has that revision: it isn't of a later version."""
    return revision is None or revision in {script.revision for script in _scripts().walk_revisions()}


def reflected(connection: Connection) -> sa.MetaData:
    """The tables as they are, whatever version made them, with times as the code has them."""
    found = sa.MetaData()

    def as_in_code(inspector: Any, table: Any, column: Any) -> None:
        if isinstance(column["type"], sa.DateTime):
            column["type"] = UtcTime()

    sa.event.listen(sa.Table, "column_reflect", as_in_code)
    try:
        found.reflect(connection)
    finally:
        sa.event.remove(sa.Table, "column_reflect", as_in_code)
    return found


def _require_later_to_fit(connection: Connection, found: str | None) -> None:
    oldest = connection.execute(sa.select(oldest_code.c.revision)).scalar_one_or_none()
    # Whoever has the oldest revision that may work on the schema comes from it.
    if oldest is None or not is_known(oldest):
        raise RuntimeError(
            f"the job store's schema is at revision {found}, of a later version that this one can't work with: install that "
            "version, or restore a backup from before"
        )


def _scripts() -> Any:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_config())


def _config() -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def _run(command: str, connection: Connection, revision: str) -> None:
    import alembic.command

    config = _config()
    config.attributes["connection"] = connection
    getattr(alembic.command, command)(config, revision)
