"""The file itself: told apart, checked, copied and upgraded before anything uses it.

All of this is synchronous and runs before the pools open: what is wrong with the
file must fail the start.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from twisted.logger import Logger

from tursi.errors import DatabaseError
from tursi.store import connection as connections
from tursi.store.schema import APPLICATION_ID, UPGRADES

COPIES = 3
"""How many copies from before an upgrade are kept."""

log = Logger()


def inspect(path: Path) -> None:
    """Raise ``DatabaseError`` if the daemon couldn't use the file; change nothing.

    A missing file is fine, since ``prepare`` makes one.
    """
    with _explained(path):
        if path.exists():
            with _connected(path, "ro") as connection:
                _check(connection, path)


def prepare(path: Path) -> None:
    """Bring the file to the newest schema, making it if it is missing.

    Call it only while holding the lock on the state folder. Raises
    ``DatabaseError``, ``DatabaseBusy`` or ``DatabaseFull``; the file is then as
    it was, or at a version between, whole.
    """
    with _explained(path):
        if not path.exists():
            _create(path)
        with _connected(path, "rw") as connection:
            version = _check(connection, path)
            connections.for_writing(connection)
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
            if mode != "wal":
                raise DatabaseError(
                    f"The database {path} is on a file system that SQLite can't share between "
                    "connections; put the state folder on a local disk."
                )
            if 0 < version < len(UPGRADES):
                _copy(connection, path, version)
            for number in range(version, len(UPGRADES)):
                _upgrade(connection, number)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise connections.meaning(error, path) from error
    except OSError as error:
        raise DatabaseError(f"The database {path} can't be used: {error.strerror}.") from error


@contextmanager
def _connected(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA busy_timeout={connections.BUSY_MILLISECONDS}")
        yield connection


def _check(connection: sqlite3.Connection, path: Path) -> int:
    """The file's version, if it is ours, whole and not from the future."""
    (identity,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    empty = identity == 0 and version == 0 and objects == 0
    if identity != APPLICATION_ID and not empty:
        raise DatabaseError(f"{path} is the database of another program; move it away.")
    if version > len(UPGRADES):
        raise DatabaseError(
            f"The database {path} was written by a newer Tursi (schema {version}, this one "
            f"knows {len(UPGRADES)}); install that one again, or put a copy in its place."
        )
    # Opening doesn't notice a damaged page.
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise DatabaseError(
            f"The database {path} is damaged ({verdict.splitlines()[0]}); put a copy in its place."
        )
    return int(version)


def _create(path: Path) -> None:
    # SQLite gives its side files the mode of the main file.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    _sync_folder(path.parent)


def _copy(connection: sqlite3.Connection, path: Path, version: int) -> None:
    """Leave a copy of the file beside it, and the oldest of too many copies not."""
    kept = path.with_name(f"{path.name}.v{version}")
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    _create(part)  # VACUUM INTO takes an empty file, and keeps its mode
    try:
        connection.execute("VACUUM INTO ?", (str(part),))
        part.replace(kept)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)
    log.info("Before the upgrade the database was copied to {path}.", path=str(kept))
    name = re.compile(re.escape(path.name) + r"\.v(\d+)")
    copies = sorted(
        (int(found[1]), other)
        for other in path.parent.iterdir()
        if (found := name.fullmatch(other.name))
    )
    for _, other in copies[:-COPIES]:
        other.unlink()


def _upgrade(connection: sqlite3.Connection, number: int) -> None:
    upgrade = UPGRADES[number]
    # Never executescript: it would commit first. The version rolls back with
    # the tables, so a kill at any statement leaves one version or the other.
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in upgrade.statements:
            connection.execute(statement)
        connection.execute(
            "INSERT INTO schema_history (version, description, at)"
            " VALUES (?, ?, (julianday('now') - 2440587.5) * 86400.0)",
            (number + 1, upgrade.description),
        )
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={number + 1}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _sync_folder(folder: Path) -> None:
    """Make a new name in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
