"""Kills an upgrade of the database at each of its statements, and says what was left.

``python upgrade_killer.py FILE`` prints a JSON line for each kill: at which statement,
and which version the file was at before and after.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from tursi.store import file, prepare
from tursi.store.schema import UPGRADES, Upgrade

NEXT = Upgrade(
    "the next",
    (
        "CREATE TABLE next (x TEXT) STRICT",
        "ALTER TABLE deployments ADD COLUMN next TEXT",
        "UPDATE deployments SET next = name",
        "DROP INDEX rollups_start",
    ),
)


def version(path: Path) -> int:
    """At which it is."""
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def tables(path: Path) -> list[str]:
    """What the schema consists of."""
    with closing(sqlite3.connect(path)) as connection:
        return [str(row) for row in connection.execute("SELECT name, sql FROM sqlite_schema")]


def killed(path: Path, statement: int) -> bool:
    """Upgrade it in a process that dies at its ``statement``-th statement; whether it did."""
    child = os.fork()
    if not child:
        left = statement

        def count(text: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        connect = sqlite3.connect

        def traced(*args: object, **keywords: object) -> sqlite3.Connection:
            connection = connect(*args, **keywords)  # type: ignore[call-overload]
            connection.set_trace_callback(count)
            return connection  # type: ignore[no-any-return]

        sqlite3.connect = traced  # type: ignore[assignment]
        try:
            prepare(path)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def main() -> None:
    """From nothing, and from each version that was ever there, to one that is yet to come."""
    path = Path(sys.argv[1])
    steps = (*UPGRADES, NEXT)
    module: Any = file
    schemas: dict[int, list[str]] = {0: []}
    for known in range(1, len(steps) + 1):
        module.UPGRADES = steps[:known]
        prepare(path)
        shutil.copy(path, f"{path}.at{known}")
        schemas[known] = tables(path)
    for before in (0, *range(1, len(steps))):
        statement, more = 0, True
        while more:
            for each in path.parent.glob(f"{path.name}*"):
                if ".at" not in each.name:
                    each.unlink()
            if before:
                shutil.copy(f"{path}.at{before}", path)
            more = killed(path, statement)
            after = version(path) if path.exists() else 0
            whole = after in schemas and (not path.exists() or tables(path) == schemas[after])
            prepare(path)
            done = version(path) == len(steps) and tables(path) == schemas[len(steps)]
            line = {"before": before, "after": after, "whole": whole, "done": done, "killed": more}
            sys.stdout.write(json.dumps(line) + "\n")
            statement += 1


if __name__ == "__main__":
    main()
