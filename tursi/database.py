"""The database while no daemon runs: ``python -m tursi.database backup|check|look|restore``.

The command ``tursi db`` runs it where no daemon answers. It prints one JSON object, as
the HTTP API would answer, and takes the lock on the state folder, as a daemon would; only
``look`` takes nothing, and changes nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tursi import store
from tursi.errors import DatabaseError, TursiError
from tursi.lock import StateLock
from tursi.model import folders


def backup(database: Path, to: str) -> dict[str, Any]:
    """Write a copy to ``to``."""
    _exists(database)
    store.backup(database, Path(to), in_use=False)
    return {"file": to, "size": Path(to).stat().st_size}


def check(database: Path) -> dict[str, Any]:
    """Read all of it."""
    _exists(database)
    return asdict(store.report(database, in_use=False))


def look(database: Path) -> dict[str, Any]:
    """Read all of it, where nobody uses it, and tell how many upgrades wait."""
    _exists(database)
    found = asdict(store.report(database, in_use=False))
    return {**found, "waiting": store.NEWEST - found["schema"]}


def restore(database: Path, source: str) -> dict[str, Any]:
    """Put the copy ``source`` in its place."""
    uid = os.getuid()
    aside = store.restore(Path(source), database, by=f"uid {uid}", uid=uid, at=time.time())
    return {"file": str(database), "replaced": str(aside) if aside is not None else None}


def _exists(database: Path) -> None:
    if not database.exists():
        raise DatabaseError(f"There is no database {database}; name its folder with --state.")


def main(arguments: Sequence[str]) -> int:
    """The exit status; ``arguments`` are an action, the state folder, and what the action takes."""
    action, state, *rest = arguments
    database = folders({**os.environ, "TURSI_STATE_DIR": state}, os.getuid()).database
    actions: dict[str, Any] = {
        "backup": backup, "check": check, "look": look, "restore": restore,
    }  # fmt: skip
    lock = StateLock(database.parent)
    try:
        if not database.parent.is_dir():
            raise DatabaseError(f"There is no folder {database.parent}; name it with --state.")
        if action != "look":
            lock.acquire()
            store.give(database.parent / "tursi.lock")
        answer, status = actions[action](database, *rest), 0
    except TursiError as error:
        answer, status = {"error": {"message": error.message, "code": error.code}}, 1
    except OSError as error:
        message = f"The folder {database.parent} can't be used: {error.strerror}."
        answer, status = {"error": {"message": message, "code": DatabaseError.code}}, 1
    finally:
        lock.release()
    sys.stdout.write(json.dumps(answer) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
