"""The file itself: told apart, checked, copied and upgraded before anything uses it.

All of this is synchronous and runs before the pools open: what is wrong with the
file must fail the start, and leave the file as it was to the byte.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from twisted.logger import Logger

from tursi.errors import DatabaseError
from tursi.store import connection as connections
from tursi.store import place
from tursi.store.schema import APPLICATION_ID, UPGRADES

COPIES = 3
"""How many copies from before an upgrade are kept."""

log = Logger()


def inspect(path: Path) -> None:
    """Raise ``DatabaseError`` if the daemon couldn't use the file; change nothing.

    A missing file is fine, since ``prepare`` makes one. Call it while nobody uses
    the file.
    """
    with explained(path):
        # Root may be about to become another user.
        place.check(path, owner=os.geteuid() or None)
        _look(path)


def prepare(path: Path) -> None:
    """Bring the file to the newest schema, making it if it is missing.

    Call it only while holding the lock on the state folder. Raises
    ``DatabaseError``, ``DatabaseBusy`` or ``DatabaseFull``; the file is then as
    it was, or at a version between, whole.
    """
    with explained(path):
        finish_restore(path)
        place.check(path, owner=os.geteuid())
        _look(path)
        if not path.exists():
            create(path)
        with connected(path, "mode=rw") as connection:
            version = check(connection, path)
            connections.for_writing(connection)
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
            if mode != "wal":
                raise DatabaseError(
                    f"The database {path} is on a file system that SQLite can't share between "
                    "connections; put the state folder on a local disk."
                )
            if 0 < version < len(UPGRADES):
                _copy(connection, path, version)
            upgrade(connection, version)


def check(
    connection: sqlite3.Connection, path: Path, *, thorough: bool = False, hint: str | None = None
) -> int:
    """The file's version, if it is ours, whole and not from the future.

    ``thorough`` also compares the indexes with their tables and follows references.
    ``hint`` ends the sentence that refuses it, instead of the way to restore it.
    """
    hint = connections.advice(path) if hint is None else hint
    version = identify(connection, path, hint=hint)
    # Opening doesn't notice a damaged page.
    found = problems(connection, 1, thorough=thorough)
    if found:
        raise DatabaseError(f"The database {path} is damaged ({found[0]}){hint}.")
    return version


def identify(connection: sqlite3.Connection, path: Path, *, hint: str | None = None) -> int:
    """The file's version, if it is ours and not from the future; ``hint`` as of ``check``."""
    (identity,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    empty = identity == 0 and version == 0 and objects == 0
    hint = connections.advice(path) if hint is None else hint
    if identity != APPLICATION_ID and not empty:
        raise DatabaseError(f"{path} is the database of another program{hint}.")
    if version > len(UPGRADES):
        raise DatabaseError(
            f"The database {path} was written by a newer Tursi (schema {version}, this one knows "
            f"{len(UPGRADES)}){hint}."
        )
    return int(version)


def problems(connection: sqlite3.Connection, limit: int, *, thorough: bool) -> list[str]:
    """What isn't whole, ``limit`` of it at most."""
    pragma = "integrity_check" if thorough else "quick_check"
    try:
        rows = connection.execute(f"PRAGMA {pragma}({limit})").fetchall()
    except sqlite3.DatabaseError as error:
        if not connections.is_corrupt(error):
            raise
        return [str(error)]
    lines = [line for (text,) in rows if text != "ok" for line in text.splitlines()]
    # Of some tables it says first which database they are in, of which there is one.
    found = [line for line in lines if not line.startswith("***")] or lines
    if thorough and not found:
        broken = connection.execute("PRAGMA foreign_key_check").fetchmany(limit)
        found = [f"row {row[1]} of {row[0]} refers to nothing in {row[2]}" for row in broken]
    return found[:limit]


def upgrade(connection: sqlite3.Connection, version: int) -> None:
    """Bring the file from ``version`` to the newest, one transaction a step."""
    for number in range(version, len(UPGRADES)):
        _upgrade(connection, number)


@contextmanager
def explained(path: Path, hint: str | None = None) -> Iterator[None]:
    """Say in a user's words what goes wrong with the file at ``path``."""
    try:
        yield
    except sqlite3.Error as error:
        raise connections.meaning(error, path, hint) from error
    except OSError as error:
        raise connections.unusable(error, path) from error


@contextmanager
def connected(path: Path, parameters: str) -> Iterator[sqlite3.Connection]:
    """A connection in autocommit mode; ``parameters`` are those of SQLite's URIs."""
    uri = f"{path.absolute().as_uri()}?{parameters}"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA busy_timeout={connections.BUSY_MILLISECONDS}")
        yield connection


def create(path: Path) -> None:
    """Make an empty file, which is the owner's alone."""
    # SQLite gives its side files the mode of the main file.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    sync_folder(path.parent)


def copy(connection: sqlite3.Connection, to: Path) -> None:
    """Write what ``connection`` reads to ``to``, compacted, on the disk when this returns."""
    part = place.beside(to, "part")
    part.unlink(missing_ok=True)
    create(part)  # VACUUM INTO takes an empty file, and keeps its mode
    try:
        connection.execute("VACUUM INTO ?", (str(part),))
        # It leaves this to us.
        sync(part)
        part.replace(to)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(to.parent)


def give(path: Path) -> None:
    """Where root has made the file, let it be whose the folder is."""
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def finish_restore(path: Path) -> Path | None:
    """Put a file that waits to be restored in its place; where the one before it went.

    Every step can be the last one before a power cut: the next call goes on.
    """
    waiting = place.beside(path, "restored")
    if not waiting.exists():
        return None
    # Of the waiting file, so that who goes on finds the same name.
    seconds, rest = divmod(waiting.stat().st_mtime_ns, 1_000_000_000)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
    aside = place.beside(path, f"replaced-{stamp}.{rest:09}")
    # A log beside a file that it doesn't belong to would be played into it.
    for suffix in ("", "-wal", "-journal"):
        old = path.with_name(path.name + suffix)
        if old.exists() or old.is_symlink():
            old.rename(aside.with_name(aside.name + suffix))
    path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
    sync_folder(path.parent)
    waiting.rename(path)
    sync_folder(path.parent)
    return aside if aside.exists() or aside.is_symlink() else None


def sync_folder(folder: Path) -> None:
    """Make a new name in ``folder`` survive a power cut."""
    sync(folder, os.O_DIRECTORY)


def _look(path: Path) -> None:
    """Check the file without a change to it or to its side files."""
    waiting = place.beside(path, "restored")
    chosen = waiting if waiting.exists() else path
    if not chosen.exists() or _size(chosen, "-journal"):
        # Only a connection that may write can look behind a rollback journal.
        return
    with connected(chosen, untouched(chosen)) as connection:
        try:
            check(connection, chosen)
        except sqlite3.OperationalError as error:
            # Nor behind what a killed writer has left of the write-ahead log, now and then.
            if error.sqlite_errorcode != sqlite3.SQLITE_PROTOCOL:
                raise


def untouched(path: Path) -> str:
    """Parameters of a connection that reads all of the file and writes nothing.

    Only while nobody uses the file.
    """
    if not _size(path, "-wal"):
        return "mode=ro&immutable=1"
    shared = path.with_name(f"{path.name}-shm")
    return "mode=ro&readonly_shm=1" if shared.exists() else "mode=ro"


def _size(path: Path, suffix: str) -> int:
    try:
        return path.with_name(path.name + suffix).stat().st_size
    except FileNotFoundError:
        return 0


def _copy(connection: sqlite3.Connection, path: Path, version: int) -> None:
    """Leave a copy of the file beside it, and the oldest of too many copies not."""
    kept = place.beside(path, f"v{version}")
    copy(connection, kept)
    log.info("Before the upgrade the database was copied to {path}.", path=str(kept))
    for other in place.copies(path)[:-COPIES]:
        other.unlink()


def _upgrade(connection: sqlite3.Connection, number: int) -> None:
    step = UPGRADES[number]
    # Never executescript: it would commit first. The version rolls back with
    # the tables, so a kill at any statement leaves one version or the other.
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in step.statements:
            connection.execute(statement)
        connection.execute(
            "INSERT INTO schema_history (version, description, at)"
            " VALUES (?, ?, (julianday('now') - 2440587.5) * 86400.0)",
            (number + 1, step.description),
        )
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={number + 1}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def sync(path: Path, how: int = 0) -> None:
    """Wait until what was written to ``path`` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | how)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
