"""Writes to a store without end and says on stdout what has been acknowledged.

For each line on stdin it begins anew, in a process that is there to be killed: it
says that process's ``pid``, and ``end`` when that is no more.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from twisted.internet.defer import Deferred, ensureDeferred

from tursi.model import Request
from tursi.rollup import Record, Rollup
from tursi.store import Store, prepare


async def write(store: Store, writer: str) -> None:
    """Change a deployment of its own, and count; a line per acknowledged change."""
    number = 0
    while True:
        number += 1
        request = Request("/models/m", dtype=f"{os.getpid()}-{number}")
        deployment, _ = await store.save(writer, request, 1, by="test", at=float(number))
        say(f"generation {writer} {deployment.generation.number}")
        event = await store.record(float(number), "note", f"{os.getpid()}-{writer}-{number}")
        say(f"event {event.id} {event.message}")
        rollup = Rollup()
        rollup.count("", True, number / 1000, 0.0, None, 1, 1, 1)
        await store.add_records([Record(number % 7 * 1200, writer, number % 3, rollup)])
        say(f"count {writer} 1")
        if number % 4 == 0:
            await store.roll_up(at=1e6)


def say(line: str) -> None:
    """One line in one write, which a kill can't cut in two."""
    os.write(1, f"{line}\n".encode())


def run(path: Path) -> None:
    """Three writers at once."""
    # Not before the fork: its descriptors would be shared.
    from twisted.internet import reactor

    prepare(path)
    store = Store(path, reactor)
    store.start()
    writers: list[Deferred[None]] = []

    def begin() -> None:
        writers.extend(ensureDeferred(write(store, name)) for name in ("a", "b", "c"))

    reactor.callWhenRunning(begin)
    reactor.run()


def main() -> None:
    """A process after the other; what takes time to import is imported once."""
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            say(f"pid {os.getpid()}")
            run(Path(sys.argv[1]))
        os.waitpid(child, 0)
        say("end")


if __name__ == "__main__":
    main()
