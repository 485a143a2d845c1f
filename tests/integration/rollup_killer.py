"""Rolls up the statistics in a database, and dies at a statement of that.

``python rollup_killer.py FILE STATEMENT``; statement 0 is the BEGIN.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys

from tursi.store import connection, statistics


def main() -> None:
    """Do it, or as much of it as there is time for."""
    left = int(sys.argv[2])

    def count(text: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    file = sqlite3.connect(sys.argv[1], isolation_level=None)
    connection.for_writing(file)
    file.set_trace_callback(count)
    cursor = file.cursor()
    cursor.execute("BEGIN IMMEDIATE")
    statistics.roll_up(cursor, 1e6)
    cursor.execute("COMMIT")


if __name__ == "__main__":
    main()
