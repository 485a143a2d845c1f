"""Connections to the file: their settings, and what SQLite's errors mean to a user."""

from __future__ import annotations

import errno
import shlex
import sqlite3
from pathlib import Path

from tursi.errors import DatabaseBusy, DatabaseError, DatabaseFull, TursiError
from tursi.store import place, statistics

BUSY_MILLISECONDS = 1000
"""How long SQLite itself waits for another process's lock, per attempt."""
_BROKEN = "The database can't be used; the daemon's log says why."

_NO_ROOM = frozenset({sqlite3.SQLITE_IOERR_SHMSIZE})
"""Further codes of SQLite that mean a full disk."""


def for_writing(connection: sqlite3.Connection) -> None:
    """Set up the one connection that writes."""
    # Most pragmas belong to the connection, and some do nothing within a transaction.
    _apply(connection, "foreign_keys=ON", "synchronous=FULL")
    statistics.prepare(connection)


def for_reading(connection: sqlite3.Connection) -> None:
    """Set up a connection that only reads."""
    # Checkpoints are the writer's: two connections that checkpoint at the same
    # time can corrupt the file before SQLite 3.51.3.
    _apply(connection, "query_only=ON", "wal_autocheckpoint=0")


def _apply(connection: sqlite3.Connection, *pragmas: str) -> None:
    try:
        for pragma in (f"busy_timeout={BUSY_MILLISECONDS}", *pragmas):
            connection.execute(f"PRAGMA {pragma}").close()
    except BaseException:
        # adbapi forgets a connection whose set-up failed.
        connection.close()
        raise


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another process held the file, so that trying again may help."""
    return _primary(error) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def is_corrupt(error: sqlite3.Error) -> bool:
    """Whether the file isn't whole."""
    return _primary(error) == sqlite3.SQLITE_CORRUPT


def meaning(error: sqlite3.Error, path: Path, hint: str | None = None) -> TursiError:
    """What ``error`` from the file at ``path`` says to a user; ``hint`` ends its sentence."""
    code = _primary(error)
    if is_busy(error):
        return DatabaseBusy(
            f"Another process holds the database {path}; try again shortly.",
            retry_after=5,
            public=DatabaseBusy.__doc__,
        )
    if code == sqlite3.SQLITE_FULL or getattr(error, "sqlite_errorcode", 0) in _NO_ROOM:
        return DatabaseFull()
    hint = advice(path) if hint is None else hint
    if code == sqlite3.SQLITE_NOTADB:
        return DatabaseError(f"{path} isn't a database{hint}.", public=_BROKEN)
    if is_corrupt(error):
        return DatabaseError(f"The database {path} is damaged ({error}){hint}.", public=_BROKEN)
    return DatabaseError(f"The database {path} can't be used: {error}.", public=_BROKEN)


def unusable(error: OSError, path: Path) -> TursiError:
    """What the operating system's ``error`` with the file at ``path`` says to a user."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DatabaseFull()
    return DatabaseError(f"The database {path} can't be used: {error.strerror}.")


def advice(path: Path) -> str:
    """The end of a sentence that refuses the file: which copy to put in its place."""
    try:
        newest = place.copies(path)[-1:]
    except OSError:
        newest = []
    copy = shlex.quote(str(newest[0])) if newest else "FILE"
    return f"; move it away, or put a backup in its place with `tursi db restore {copy}`"


def _primary(error: sqlite3.Error) -> int:
    # Errors that Python itself raises (a closed connection) carry no code.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
