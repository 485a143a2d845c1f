"""What happened, written to the store without holding anybody up, and told to who watches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi.errors import DatabaseBusy, DatabaseFull
from tursi.model import AuditEntry, Dossier, Event, WorkerLife
from tursi.store import Store

log = Logger()

MAX_WAITING = 1000
"""Notes that wait for a full disk or a busy database; more are counted and dropped, but for
the lives of workers and their crashes."""
RETRY_SECONDS = 2.0

Write = Callable[[], Deferred[Any]]


class Journal:
    """Events and other notes; ``now`` gives UTC epoch seconds, ``clock`` monotonic timers.

    What the database can't take just now waits in its order until it can.
    """

    def __init__(self, store: Store, now: Callable[[], float], clock: Any) -> None:
        self._store = store
        self._now = now
        self._clock = clock
        self._pending: set[Deferred[Any]] = set()
        self._waiting: deque[Write] = deque()
        self._retry: Any = None
        self._draining = False
        self.dropped = 0
        """Notes that are lost."""

    @property
    def waiting(self) -> int:
        """How many notes wait for the database."""
        return len(self._waiting)

    def note(
        self,
        kind: str,
        message: str,
        *,
        deployment: str | None = None,
        worker: str | None = None,
        cause: str | None = None,
    ) -> None:
        """Append an event; ``cause`` is what it happened because of."""
        at = self._now()
        self.hold(
            lambda: self._store.record(
                at, kind, message, deployment=deployment, worker=worker, cause=cause
            )
        )

    def life(self, life: WorkerLife) -> Deferred[None]:
        """Keep a worker life's record as it is now; fires when it is written, or has to wait."""
        return self.hold(lambda: self._store.put_life(life), must=True)

    def crash(self, dossier: Dossier, keep: int) -> None:
        """Keep a crash, whose life has been told before."""
        self.hold(lambda: self._store.add_crash(dossier, keep=keep), must=True)

    def audit(self, entry: AuditEntry) -> Deferred[None]:
        """Keep who did what; fires when that is on the disk, or has to wait."""
        return self.hold(lambda: self._store.add_audit(entry))

    def watch(
        self, deployment: str | None, callback: Callable[[Event], None]
    ) -> Callable[[], None]:
        """Call back with each new event until the returned function is called."""

        def tell(event: Event) -> None:
            if deployment is None or deployment == event.deployment:
                callback(event)

        return self._store.watch(tell)

    def hold(self, write: Write, *, must: bool = False) -> Deferred[None]:
        """Let a write go on by itself, but not past ``close`` and not unheard.

        What ``must`` be written is never dropped. Fires, with nothing, when it is
        done or has to wait.
        """
        if self._waiting:
            self._keep(write, must=must)
            return succeed(None)

        def tried(done: bool) -> None:
            if not done:
                self._keep(write, must=must)

        return self._try(write).addCallback(tried)

    async def written(self) -> None:
        """Wait until what has been noted so far can be read, or has to wait."""
        # Each waits on a Deferred of its own: others wait for the same writes.
        waiting: list[Deferred[None]] = []
        for pending in self._pending:
            done: Deferred[None] = Deferred()
            pending.addBoth(_tell, done)
            waiting.append(done)
        await DeferredList(waiting)

    async def close(self) -> None:
        """Wait until everything is written that the database takes."""
        while self._pending:
            await DeferredList(list(self._pending), consumeErrors=True)
        if self._retry is not None and self._retry.active():
            self._retry.cancel()
        await self._drain()
        if self._retry is not None and self._retry.active():
            self._retry.cancel()
        if self._waiting:
            log.error("{count} notes are lost, for lack of room", count=len(self._waiting))
            self.dropped += len(self._waiting)
            self._waiting.clear()

    def _try(self, write: Write) -> Deferred[bool]:
        """Whether it need not be tried again."""
        writing = write()
        self._pending.add(writing)
        tried: Deferred[bool] = Deferred()

        def done(outcome: object) -> None:
            self._pending.discard(writing)
            passing = False
            if isinstance(outcome, Failure):
                passing = outcome.check(DatabaseBusy, DatabaseFull) is not None
                if not passing:
                    self.dropped += 1
                    log.error("the database refused a note: {error}", error=outcome.value)
            tried.callback(not passing)

        writing.addBoth(done)
        return tried

    def _keep(self, write: Write, *, must: bool) -> None:
        if len(self._waiting) >= MAX_WAITING and not must:
            if not self.dropped:
                log.error("the database takes nothing; notes are lost from now on")
            self.dropped += 1
            return
        if not self._waiting:
            log.warn("the database takes nothing just now; notes wait for it")
        self._waiting.append(write)
        if not self._draining:
            self._try_later()

    def _try_later(self) -> None:
        if self._retry is None or not self._retry.active():
            self._retry = self._clock.callLater(RETRY_SECONDS, self._again)

    def _again(self) -> None:
        Deferred.fromCoroutine(self._drain()).addErrback(
            lambda failure: log.failure("waiting notes could not be written", failure)
        )

    async def _drain(self) -> None:
        """Write what waits, in its order, as far as the database takes it."""
        if not self._waiting or self._draining:
            return
        self._draining = True
        try:
            while self._waiting:
                if not await self._try(self._waiting[0]):
                    self._try_later()
                    return
                self._waiting.popleft()
        finally:
            self._draining = False
        log.info("the database takes notes again")


def _tell(outcome: object, done: Deferred[None]) -> object:
    done.callback(None)
    return outcome
