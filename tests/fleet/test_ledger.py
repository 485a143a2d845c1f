from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from twisted.internet.defer import Deferred, ensureDeferred, fail, succeed
from twisted.internet.task import Clock

from tursi.errors import DatabaseFull
from tursi.fleet.ledger import SAMPLE_SECONDS, Ledger
from tursi.model import Usage
from tursi.rollup import Observation, Period, Record, Rollup, StatisticsQuery, Summary


class FakeStore:
    """Takes what it is told unless there is ``trouble``."""

    def __init__(self) -> None:
        self.trouble: Exception | None = None
        self.written: list[Record] = []
        self.rolled_up: list[float] = []

    def _done(self) -> Deferred[None]:
        return succeed(None) if self.trouble is None else fail(self.trouble)

    def add_records(self, records: Sequence[Record]) -> Deferred[None]:
        if self.trouble is None:
            self.written += records
        return self._done()

    def roll_up(self, *, at: float) -> Deferred[None]:
        if self.trouble is None:
            self.rolled_up.append(at)
        return self._done()

    def statistics(self, query: StatisticsQuery) -> Deferred[Summary]:
        total = Rollup()
        for record in self.written:
            total.merge(record.rollup)
        return succeed(Summary(total))


class Bench:
    def __init__(self) -> None:
        self.store = FakeStore()
        self.clock = Clock()
        self.statuses: list[Any] = []
        store: Any = self.store
        self.ledger = Ledger(
            store=store,
            look=lambda: self.statuses,
            now=lambda: 600.0 + self.clock.seconds(),
            reactor=self.clock,
        )
        self.ledger.start()

    def run(self, seconds: float) -> None:
        self.clock.pump([0.5] * int(2 * seconds))

    def count(self, status: int = 200) -> None:
        self.ledger.count(Observation("one", 1, 0, status, "", 0.5, 0.2, None, Usage()))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_what_is_counted_is_written_within_a_second_and_rolled_up_each_minute(
    bench: Bench,
) -> None:
    bench.count()
    bench.count()
    bench.run(1)
    (record,) = bench.store.written
    assert (record.start, record.rollup.requests) == (600, 2)
    bench.run(200)
    # Who is idle doesn't write.
    assert len(bench.store.written) == 1
    assert [at // 60 for at in bench.store.rolled_up] == [10, 11, 12, 13]


def test_what_the_database_does_not_take_is_written_later(bench: Bench) -> None:
    bench.store.trouble = DatabaseFull()
    for _ in range(5):
        bench.count()
        bench.run(20)
    assert bench.store.rolled_up == []
    bench.store.trouble = None
    bench.run(1)
    assert {each.start: each.rollup.requests for each in bench.store.written} == {600: 3, 660: 2}
    assert len(bench.store.rolled_up) == 1


def test_who_asks_is_told_of_what_is_not_written_yet(bench: Bench) -> None:
    bench.count()
    told: list[Summary] = []
    query = StatisticsQuery(Period.MINUTE, 0.0)
    ensureDeferred(bench.ledger.tell(query)).addCallback(told.append)
    assert told[0].total.requests == 1
    bench.run(1)
    assert bench.ledger.recent(10.0)["one"].requests == 1
    assert bench.ledger.recent(0.1) == {}


def test_the_end_writes_what_is_left(bench: Bench) -> None:
    bench.count()
    ensureDeferred(bench.ledger.stop())
    assert len(bench.store.written) == 1
    assert bench.clock.getDelayedCalls() == []


def test_memory_is_that_of_all_workers_of_a_deployment(bench: Bench) -> None:
    def status(name: str, *workers: tuple[int | None, dict[str, int]]) -> Any:
        made = [SimpleNamespace(rss=rss, gpus=gpus) for rss, gpus in workers]
        return SimpleNamespace(name=name, workers=made)

    bench.statuses = [
        status("one", (1000, {"cuda:0": 100, "cuda:1": 5}), (500, {"cuda:0": 10})),
        status("two", (None, {})),
    ]
    bench.run(SAMPLE_SECONDS)
    assert bench.store.written == []
    bench.run(61)
    (record,) = bench.store.written
    assert record.deployment == "one"
    samples = record.rollup.samples
    assert samples == 5
    assert (record.rollup.rss_max, record.rollup.gpu_max) == (1500, 115)
    assert record.rollup.gpu == samples * 115
