"""Copies on request: made, looked through, and put back."""

from __future__ import annotations

from pathlib import Path

from tursi.errors import DatabaseError
from tursi.model import AuditEntry, DatabaseReport
from tursi.store import audit, place
from tursi.store import connection as connections
from tursi.store.file import (
    check,
    connected,
    copy,
    explained,
    finish_restore,
    give,
    identify,
    problems,
    sync,
    sync_folder,
    untouched,
    upgrade,
)

LISTED = 20
"""Problems that a report lists at most."""
_IN_USE = "mode=ro"


def backup(path: Path, to: Path, *, in_use: bool) -> None:
    """Write a consistent copy of the file at ``path`` to ``to``, which must not exist.

    ``in_use`` says that others may be at it; they aren't held up.
    """
    with explained(path):
        if to.exists():
            raise DatabaseError(f"{to} exists already; name another file.")
        with connected(path, _IN_USE if in_use else untouched(path)) as connection:
            check(connection, path)
            copy(connection, to)


def report(path: Path, *, in_use: bool) -> DatabaseReport:
    """Read all of the file at ``path``, and tell how it is; ``DatabaseError`` if it isn't ours."""
    with explained(path):
        with connected(path, _IN_USE if in_use else untouched(path)) as connection:
            version = identify(connection, path)
            found = problems(connection, LISTED, thorough=True)
        return DatabaseReport(
            path=str(path),
            size=path.stat().st_size,
            schema=version,
            problems=tuple(found),
            copies=tuple(str(each) for each in place.copies(path)),
        )


def restore(source: Path, path: Path, *, by: str, uid: int, at: float) -> Path | None:
    """Put a copy of ``source`` in the place of the file at ``path``; where that one went.

    Call it only while holding the lock on the state folder. ``source`` is read through
    before anything changes; then it's all or nothing, whenever it is cut off.
    """
    hint = "; choose another backup"
    making = place.beside(path, "restoring")
    if source.absolute() == path.absolute():
        raise DatabaseError(f"{source} is the database itself{hint}.")
    with explained(source, hint):
        if not source.is_file():
            raise DatabaseError(f"There is no file {source}{hint}.")
        with connected(source, untouched(source)) as connection:
            if check(connection, source, thorough=True, hint=hint) == 0:
                raise DatabaseError(f"{source} is empty{hint}.")
            with explained(path):
                copy(connection, making)
    with explained(path):
        with connected(making, "mode=rw") as connection:
            connections.for_writing(connection)
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            upgrade(connection, version)
            audit.add(
                connection,
                AuditEntry(0, at, by, "database.restore", str(source.absolute()), uid=uid),
            )
        give(making)
        sync(making)
        # From here on it is done, if not by us, then by the next start.
        making.rename(place.beside(path, "restored"))
        sync_folder(path.parent)
        return finish_restore(path)
