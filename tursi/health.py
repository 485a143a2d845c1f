"""How the daemon is, part by part, and what that comes to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure

from tursi.errors import DatabaseBusy, DatabaseFull, TursiError
from tursi.fleet import Fleet, Part
from tursi.lag import Lag
from tursi.store import Store

SECONDS = 3.0
"""How long the database and the disks have to answer."""
FRESH = 1.0
"""Seconds for which an answer is given again: whoever asks often costs no more."""
LATE = 1.0
"""Lateness of the event loop within the last minute that isn't well any more."""
LEAST = 256 * 1024 * 1024
"""Bytes of a disk below which it isn't well."""

STUCK = 10.0
"""Seconds for which writes may wait for the disk, full or locked."""
REMEMBERED = 300.0
"""Seconds for which a loss isn't well."""

Health = tuple[str, list[Part]]


class Checks:
    """Looks at everything, at most once a second.

    ``folders`` are those whose disks matter, by what they are for; ``dropped`` counts
    what was lost for want of room or of a working disk, by what lost it.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        store: Store,
        lag: Lag,
        folders: Mapping[str, Path],
        reactor: Any,
        dropped: Mapping[str, Callable[[], int]],
    ) -> None:
        self._fleet = fleet
        self._store = store
        self._lag = lag
        self._folders = folders
        self._reactor = reactor
        self._dropped = dropped
        self._stuck_since: float | None = None
        self._losses = dict.fromkeys(dropped, (0, 0.0))
        self._answer: Health | None = None
        self._answered = 0.0
        self._waiting: list[Deferred[Health]] | None = None

    async def look(self) -> Health:
        """The word for all of it, and its parts."""
        if self._answer is not None and self._reactor.seconds() - self._answered < FRESH:
            return self._answer
        if self._waiting is not None:
            waiting: Deferred[Health] = Deferred()
            self._waiting.append(waiting)
            return await waiting
        self._waiting = []
        outcome: Any
        try:
            outcome = self._answer = await self._look()
            self._answered = self._reactor.seconds()
        except Exception:  # noqa: BLE001 - those who wait get it too
            outcome = Failure()
        waiters, self._waiting = self._waiting, None
        for each in waiters:
            each.callback(outcome)
        if isinstance(outcome, Failure):
            outcome.raiseException()
        return outcome  # type: ignore[no-any-return]  # a Health by now

    async def _look(self) -> Health:
        # Asked for together: neither waits for the other's deadline.
        database, disks = self._database(), self._disks()
        own = [await database, self._writes(), self._loop(), *await disks, *self._lossy()]
        _, parts = self._fleet.health()
        parts = own + parts
        return overall(parts), parts

    def _database(self) -> Deferred[Part]:
        def answered(_: object) -> Part:
            return Part("database", healthy=True, message="answers", kind="database")

        def silent(failure: Failure) -> Part:
            kind = "database"
            if failure.check(defer.TimeoutError):
                why, kind = f"has not answered within {SECONDS:g} s", "disk"
            elif isinstance(failure.value, DatabaseBusy | DatabaseFull):
                why, kind = f"takes nothing just now ({failure.value.code})", "disk"
            elif isinstance(failure.value, TursiError):
                why = f"can't be used ({failure.value.code})"
            else:
                why = "can't be used"
            return Part("database", healthy=False, message=why, kind=kind)

        # Through both threads, and to the file itself.
        found = self._store.ping().addCallback(lambda _: self._store.last_crash())
        return found.addTimeout(SECONDS, self._reactor).addCallbacks(answered, silent)

    def _writes(self) -> Part:
        waiting, now = self._fleet.records.storage().waiting, self._reactor.seconds()
        if not waiting:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = now
        stuck = self._stuck_since is not None and now - self._stuck_since > STUCK
        message = f"{waiting} wait for the disk" if waiting else "nothing waits"
        return Part("writes", healthy=not stuck, message=message, kind="disk")

    def _loop(self) -> Part:
        worst = self._lag.worst
        message = f"{self._lag.now * 1000:.0f} ms late, {worst * 1000:.0f} ms at worst in a minute"
        return Part("event loop", healthy=worst < LATE, message=message, kind="loop")

    def _disks(self) -> Deferred[list[Part]]:
        def silent(failure: Failure) -> list[Part]:
            failure.trap(defer.TimeoutError)
            message = f"has not answered within {SECONDS:g} s"
            return [Part(name, healthy=False, message=message, kind="disk") for name in folders]

        folders = dict(self._folders)
        pool = self._reactor.getThreadPool()
        found = deferToThreadPool(self._reactor, pool, _disks, folders)
        return found.addTimeout(SECONDS, self._reactor).addErrback(silent)

    def _lossy(self) -> Iterator[Part]:
        now = self._reactor.seconds()
        for name, count in self._dropped.items():
            lost, since = self._losses[name]
            if count() != lost:
                lost, since = self._losses[name] = count(), now
            healthy = not lost or now - since > REMEMBERED
            message = f"{lost} dropped" if lost else "nothing dropped"
            yield Part(name, healthy=healthy, message=message, kind="drops")


def overall(parts: list[Part]) -> str:
    """``unhealthy`` without a database, ``degraded`` while any part isn't well, or ``healthy``.

    A database that is locked or full comes back by itself, and models serve meanwhile: who
    restarts the daemon for it makes it worse.
    """
    if any(part.kind == "database" and not part.healthy for part in parts):
        return "unhealthy"
    return "healthy" if all(part.healthy for part in parts) else "degraded"


def _disks(folders: Mapping[str, Path]) -> list[Part]:
    parts = []
    for name, folder in folders.items():
        there = next((each for each in (folder, *folder.parents) if each.exists()), folder)
        try:
            free = shutil.disk_usage(there).free
        except OSError as error:
            message = f"can't be read ({error.strerror})"
            parts.append(Part(name, healthy=False, message=message, kind="disk"))
            continue
        message = f"{free / 2**30:.1f} GiB free"
        parts.append(Part(name, healthy=free >= LEAST, message=message, kind="disk"))
    return parts
