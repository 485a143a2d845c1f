"""Writes to a store without end and says on stdout what has been acknowledged."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, ensureDeferred

from tursi.model import Minute, Request
from tursi.store import Store, prepare

reactor: Any = _reactor


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
        await store.add_minutes([Minute(writer, 1, requests=1)])
        say(f"count {writer} 1")


def say(line: str) -> None:
    """One line in one write, which a kill can't cut in two."""
    os.write(1, f"{line}\n".encode())


def main() -> None:
    """Three writers at once."""
    path = Path(sys.argv[1])
    prepare(path)
    store = Store(path, reactor)
    store.start()
    writers: list[Deferred[None]] = []

    def begin() -> None:
        writers.extend(ensureDeferred(write(store, name)) for name in ("a", "b", "c"))

    reactor.callWhenRunning(begin)
    reactor.run()


if __name__ == "__main__":
    main()
