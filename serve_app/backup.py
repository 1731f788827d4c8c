"""The whole store in one file, and back again, into either kind of database.

The file is JSON lines under zstandard: what it is, the tables in rows, and at the end how many there were. It is written by our
own tables and not by the database's tools: one format that a SQLite on a laptop and a PostgreSQL give and take alike, whatever
their versions. Secrets are in it as they are in the store, sealed with TUNEYARD_SECRET_KEY.

What is restored has the schema that the file was made with; later migrations follow. All is one transaction, so a file that is
damaged, or cut off, changes nothing.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import zstandard
from sqlalchemy.engine import Connection

from serve_app.store import schema
from serve_app.store.audit import By, add_entry
from serve_app.store.jobs import JobStore
from serve_app.store.tables import UtcTime, leases, metadata
from train_loop.errors import UserError

FORMAT = 1
BATCH = 500
# What a running dispatcher knows of its cluster and itself. The schema's own row comes with the schema.
LIVE = ("leases", "capacity", "oldest_code")
TABLES = [table for table in metadata.sorted_tables if table.name not in LIVE]


class BackupError(UserError):
    """The file can't be made, or what is in it can't be restored here."""


def back_up(store: JobStore, path: Path) -> dict[str, int]:
    """Write all that the store holds at one moment to a new file, which only its owner may read; rows by table.

    The service may be running: it waits for nothing. Raises BackupError where the file exists, RuntimeError for another schema.
    """
    if path.exists():
        raise BackupError(f"{path} exists already: give another name")
    handle, scratch = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}-")  # made with mode 0600
    try:
        with os.fdopen(handle, "wb") as raw, _snapshot(store) as connection:
            with zstandard.ZstdCompressor(write_checksum=True).stream_writer(raw, closefd=False) as stream:
                counts = _dump(connection, stream)
            raw.flush()
            os.fsync(raw.fileno())
        os.link(scratch, path)  # and not over one that has come meanwhile
    except FileExistsError:
        raise BackupError(f"{path} exists already: give another name") from None
    finally:
        Path(scratch).unlink(missing_ok=True)
    return counts


@contextlib.contextmanager
def _snapshot(store: JobStore) -> Iterator[Connection]:
    """A connection that sees the store as it is at one moment."""
    if store.engine.name == "sqlite":
        with store.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            schema.require_usable(connection)  # the first read fixes what all others see
            yield connection
            connection.exec_driver_sql("ROLLBACK")
        return
    frozen = store.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    with frozen.connect() as connection:
        schema.require_usable(connection)
        yield connection


def _dump(connection: Connection, stream: Any) -> dict[str, int]:
    def write(value: Mapping[str, Any]) -> None:
        stream.write(json.dumps(value).encode() + b"\n")

    made = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    write({"format": FORMAT, "schema": schema.revision_of(connection), "version": version("tuneyard"), "made_at": made})
    counts = {}
    for table in TABLES:
        counts[table.name] = 0
        query = sa.select(table).order_by(*table.primary_key.columns).execution_options(yield_per=BATCH)
        for rows in connection.execute(query).partitions():
            write({"table": table.name, "rows": [{name: _wire(value) for name, value in row._mapping.items()} for row in rows]})
            counts[table.name] += len(rows)
    write({"rows": counts})
    return counts


def restore(store: JobStore, path: Path, by: By, *, force: bool = False) -> dict[str, int]:
    """Put what a backup holds into the store, which must be empty unless `force` has it replaced; rows by table.

    Raises BackupError where that can't be; nothing is changed then.
    """
    try:
        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            lines = _lines(stream)
            about = next(lines, None)
            if about is None or about.get("format") != FORMAT:
                raise BackupError(f"{path} isn't a backup that this version knows")
            if not schema.is_known(about["schema"]):
                raise BackupError(
                    f"{path} was made by version {about['version']} with schema {about['schema']}, which is later than this "
                    f"version's, {schema.head()}: restore it with that version"
                )
            with store.write() as tx:
                _make_room(tx, force)
                schema.upgrade(tx, about["schema"])
                counts = _load(tx, lines, path)
                schema.upgrade(tx)
                add_entry(tx, by, "admin.restore", path.name)
            return counts
    except (zstandard.ZstdError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackupError(f"{path} is no backup, or is damaged ({type(error).__name__}): nothing was changed") from None


def _lines(stream: Any) -> Iterator[dict[str, Any]]:
    reader = io.TextIOWrapper(stream, encoding="utf-8")
    return (json.loads(line) for line in reader)


def _make_room(tx: Connection, force: bool) -> None:
    """Leave nothing of ours in the database. Raises BackupError where that would take away what somebody needs."""
    there = schema.reflected(tx)
    ours = [*metadata.tables, "alembic_version"]
    mine = [there.tables[name] for name in ours if name in there.tables]
    if "leases" in there.tables:
        held = sa.select(leases.c.owner).where(leases.c.expires_at > dt.datetime.now(dt.UTC))
        if tx.execute(held).first() is not None:
            raise BackupError(
                "a dispatcher is at work on this database, or was 15 seconds ago: stop the service first "
                "(tuneyard serve --stop, or tuneyard down)"
            )
    full = [t.name for t in mine if t.name not in (*LIVE, "alembic_version") and tx.execute(sa.select(t).limit(1)).first()]
    if full and not force:
        raise BackupError(
            f"this database isn't empty ({', '.join(full)} have rows): give an empty one, or --force to replace all"
        )
    there.drop_all(tx, mine)


def _load(tx: Connection, lines: Iterator[dict[str, Any]], path: Path) -> dict[str, int]:
    tables, counts, said = schema.reflected(tx).tables, dict[str, int](), None
    for line in lines:
        if "table" not in line:
            said = line["rows"]
            break
        table = tables[line["table"]]
        rows = [{name: _stored(table.c[name], value) for name, value in row.items()} for row in line["rows"]]
        tx.execute(sa.insert(table), rows)
        counts[table.name] = counts.get(table.name, 0) + len(rows)
    if said is None or {name: number for name, number in said.items() if number} != counts:
        raise BackupError(f"{path} ends too early: it isn't whole, and nothing was changed")
    if tx.dialect.name == "postgresql":
        for name in counts:
            _count_on(tx, tables[name])
    return {name: counts.get(name, 0) for name in said}


def _count_on(tx: Connection, table: sa.Table) -> None:
    """Have the next id be one that isn't there yet."""
    for key in table.primary_key.columns:
        sequence = tx.execute(sa.select(sa.func.pg_get_serial_sequence(table.name, key.name))).scalar()
        if sequence is not None:
            tx.execute(sa.select(sa.func.setval(sequence, sa.select(sa.func.max(key)).scalar_subquery())))


def _wire(value: Any) -> Any:
    if isinstance(value, dt.datetime):
        return value.isoformat()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _stored(column: sa.Column[Any], value: Any) -> Any:
    if value is None:
        return None
    if isinstance(column.type, UtcTime):
        return dt.datetime.fromisoformat(value)
    if isinstance(column.type, sa.LargeBinary):
        return base64.b64decode(value, validate=True)
    return _finite(value) if isinstance(column.type, sa.JSON) else value


def _finite(value: Any) -> Any:
    """As PostgreSQL can hold it: a loss that is no number, which SQLite keeps, is null."""
    match value:
        case dict():
            return {name: _finite(item) for name, item in value.items()}
        case list():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value
