"""What happened, written to the store without holding anybody up, and told to who watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, DeferredList
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi.model import Event, WorkerLife
from tursi.store import Store

log = Logger()


class Journal:
    """Events and other notes; ``now`` gives UTC epoch seconds."""

    def __init__(self, store: Store, now: Callable[[], float]) -> None:
        self._store = store
        self._now = now
        self._pending: set[Deferred[Any]] = set()

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
        self.hold(
            self._store.record(
                self._now(), kind, message, deployment=deployment, worker=worker, cause=cause
            )
        )

    def life(self, life: WorkerLife) -> None:
        """Keep a worker life's record as it is now."""
        self.hold(self._store.put_life(life))

    def watch(
        self, deployment: str | None, callback: Callable[[Event], None]
    ) -> Callable[[], None]:
        """Call back with each new event until the returned function is called."""

        def tell(event: Event) -> None:
            if deployment is None or deployment == event.deployment:
                callback(event)

        return self._store.watch(tell)

    def hold(self, deferred: Deferred[Any]) -> None:
        """Let a write go on by itself, but not past ``close`` and not unheard."""
        self._pending.add(deferred)

        def done(outcome: object) -> None:
            self._pending.discard(deferred)
            if isinstance(outcome, Failure):
                log.error("the database refused a note: {error}", error=outcome.value)

        deferred.addBoth(done)

    async def written(self) -> None:
        """Wait until what has been noted so far can be read."""
        # Each waits on a Deferred of its own: others wait for the same writes.
        waiting: list[Deferred[None]] = []
        for pending in self._pending:
            done: Deferred[None] = Deferred()
            pending.addBoth(_tell, done)
            waiting.append(done)
        await DeferredList(waiting)

    async def close(self) -> None:
        """Wait until everything is written."""
        while self._pending:
            await DeferredList(list(self._pending), consumeErrors=True)


def _tell(outcome: object, done: Deferred[None]) -> object:
    done.callback(None)
    return outcome
