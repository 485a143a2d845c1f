"""Keeps the statistics in the store, second by second, and tells what is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from tursi.errors import TursiError
from tursi.fleet.statistics import Statistics
from tursi.model import DeploymentStatus
from tursi.rollup import Period, Rollup, StatisticsQuery, Summary
from tursi.store import Store

log = Logger()

WRITE_SECONDS = 1.0
SAMPLE_SECONDS = 10.0


class Ledger:
    """Counts requests and looks at memory; ``look`` tells how the deployments are.

    ``now`` gives UTC epoch seconds, ``reactor`` monotonic timers.
    """

    def __init__(
        self,
        *,
        store: Store,
        look: Callable[[], Iterable[DeploymentStatus]],
        now: Callable[[], float],
        reactor: Any,
    ) -> None:
        self._store = store
        self._look = look
        self._now = now
        self._reactor = reactor
        self._statistics = Statistics(now)
        self.count = self._statistics.count
        self._writing = LoopingCall(self._write_soon)
        self._sampling = LoopingCall(self.sample)
        self._writing.clock = self._sampling.clock = reactor
        self._rolled_up = 0
        """The minute in which that was done last."""
        self._waits = False
        """Whether the database didn't take the last of them."""

    def start(self) -> None:
        """Begin to write."""
        self._writing.start(WRITE_SECONDS, now=False)
        self._sampling.start(SAMPLE_SECONDS, now=False)

    async def stop(self) -> None:
        """Write for the last time."""
        for loop in (self._writing, self._sampling):
            if loop.running:
                loop.stop()
        await self._write()

    @property
    def dropped(self) -> int:
        """Records that are lost."""
        return self._statistics.dropped

    def recent(self, seconds: float) -> Mapping[str, Rollup]:
        """What each deployment did in the last ``seconds``."""
        return self._statistics.recent.all(self._reactor.seconds(), seconds)

    def recent_of(self, deployment: str, seconds: float) -> Mapping[int, Rollup]:
        """What each of its generations did in the last ``seconds``, up to some minutes."""
        return self._statistics.recent.of(deployment, self._reactor.seconds(), seconds)

    async def tell(self, query: StatisticsQuery) -> Summary:
        """What was done; ``InvalidRequest`` where that is too much at once."""
        await self._write()
        return await self._store.statistics(query)

    def sample(self) -> None:
        """Look at what memory every deployment has."""
        for status in self._look():
            rss = sum(worker.rss or 0 for worker in status.workers)
            if rss:
                gpu = sum(sum(worker.gpus.values()) for worker in status.workers)
                self._statistics.sample(status.name, rss, gpu)

    def _write_soon(self) -> Deferred[None]:
        # A failure would end the loop.
        return Deferred.fromCoroutine(self._write()).addErrback(
            lambda failure: log.failure("Statistics could not be written", failure=failure)
        )

    async def _write(self) -> None:
        records = self._statistics.take(self._reactor.seconds())
        minute = int(self._now() // Period.MINUTE)
        try:
            if records:
                await self._store.add_records(records)
                records = []
            if minute != self._rolled_up:
                await self._store.roll_up(at=self._now())
                self._rolled_up = minute
        except TursiError as error:
            self._statistics.put_back(records)
            if not self._waits:
                # Not each second anew.
                log.warn("statistics wait for the database: {message}", message=error.message)
            self._waits = True
        else:
            self._waits = False
