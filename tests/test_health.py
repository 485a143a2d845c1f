"""What the parts of the health come to, and how late the event loop is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from fakes import InlineReactor, InlineThreadPool
from patience import until
from zope.interface import implementer

from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher

from tursi import lag as lag_module
from tursi.errors import DatabaseBusy, DatabaseError, DatabaseFull, StartingUp
from tursi.fleet import Part
from tursi.health import LEAST, REMEMBERED, SECONDS, STUCK, Checks, overall
from tursi.lag import Lag
from tursi.model import StorageStatus


class Store:
    def __init__(self) -> None:
        self.answer: Deferred[None] = succeed(None)
        self.asked = 0

    def ping(self) -> Deferred[None]:
        self.asked += 1
        return self.answer

    def last_crash(self) -> Deferred[int]:
        return succeed(0)


class Fleet:
    def __init__(self) -> None:
        self.parts = [Part("mini", healthy=True, message="ready")]
        self.starting = False
        self.waiting = 0

    @property
    def records(self) -> Fleet:
        return self

    def storage(self) -> StorageStatus:
        return StorageStatus(waiting=self.waiting)

    def health(self) -> tuple[str, list[Part]]:
        if self.starting:
            raise StartingUp
        return "healthy", self.parts


class Bench:
    def __init__(self, folder: Path) -> None:
        self.reactor: Any = cast("Any", InlineReactor())
        self.reactor.getThreadPool = InlineThreadPool
        self.store, self.fleet = Store(), Fleet()
        self.lag = Lag(self.reactor)
        self.dropped = 0
        self.checks = Checks(
            fleet=cast("Any", self.fleet),
            store=cast("Any", self.store),
            lag=self.lag,
            folders={"state": folder, "cache": folder / "not" / "there"},
            reactor=self.reactor,
            dropped={"log": lambda: self.dropped},
        )

    def look(self) -> Deferred[tuple[str, list[Part]]]:
        self.reactor.advance(2)
        return Deferred.fromCoroutine(self.checks.look())

    def now(self) -> tuple[str, dict[str, Part]]:
        found: list[Any] = []
        self.look().addBoth(found.append)
        status, parts = found[0]
        return status, {part.name: part for part in parts}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_all_is_well(bench: Bench) -> None:
    status, parts = bench.now()
    assert status == "healthy"
    assert set(parts) == {"database", "writes", "event loop", "state", "cache", "log", "mini"}
    assert "GiB free" in parts["cache"].message


def test_a_database_that_does_not_answer_in_time(bench: Bench) -> None:
    bench.store.answer = Deferred()
    found: list[Any] = []
    bench.look().addBoth(found.append)
    assert found == []
    bench.reactor.advance(SECONDS)
    status, parts = found[0]
    # Models serve all the while: nobody should restart the daemon for it.
    assert status == "degraded"
    assert (parts[0].name, parts[0].healthy) == ("database", False)
    for passing in (DatabaseFull(), DatabaseBusy()):
        bench.store.answer = fail(passing)
        status, named = bench.now()
        assert status == "degraded"
        assert passing.code in named["database"].message


def test_a_database_that_is_broken(bench: Bench) -> None:
    for broken in (DatabaseError(), RuntimeError()):
        bench.store.answer = fail(broken)
        assert bench.now()[0] == "unhealthy"


def test_who_asks_often_costs_nothing_more(bench: Bench) -> None:
    bench.store.answer = Deferred()
    bench.reactor.advance(2)
    asked = [Deferred.fromCoroutine(bench.checks.look()) for _ in range(5)]
    bench.store.answer.callback(None)
    assert all(each.called for each in asked)
    assert Deferred.fromCoroutine(bench.checks.look()).called
    assert bench.store.asked == 1
    bench.now()
    assert bench.store.asked == 2


def test_an_error_reaches_all_who_wait_and_the_next_look_is_another(bench: Bench) -> None:
    bench.fleet.starting = True
    bench.store.answer = Deferred()
    bench.reactor.advance(2)
    asked = [Deferred.fromCoroutine(bench.checks.look()) for _ in range(2)]
    bench.store.answer.callback(None)
    failures: list[Any] = []
    for each in asked:
        each.addErrback(failures.append)
    assert [failure.type for failure in failures] == [StartingUp] * 2
    bench.fleet.starting = False
    bench.store.answer = succeed(None)
    assert bench.now()[0] == "healthy"


def test_what_degrades(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.fleet.parts = [Part("mini", healthy=False, message="failed")]
    assert bench.now()[0] == "degraded"
    bench.fleet.parts = []
    bench.dropped = 3
    status, parts = bench.now()
    assert (status, parts["log"].message) == ("degraded", "3 dropped")
    bench.reactor.advance(REMEMBERED)
    assert bench.now()[0] == "healthy"
    usage = type("Usage", (), {"free": LEAST - 1})
    monkeypatch.setattr("tursi.health.shutil.disk_usage", lambda _: usage)
    status, parts = bench.now()
    assert (status, parts["state"].healthy) == ("degraded", False)


def test_writes_that_wait_for_a_full_disk(bench: Bench) -> None:
    bench.fleet.waiting = 5
    assert bench.now()[0] == "healthy"
    bench.reactor.advance(STUCK)
    status, parts = bench.now()
    assert (status, parts["writes"].message) == ("degraded", "5 wait for the disk")
    bench.fleet.waiting = 0
    assert bench.now()[0] == "healthy"


def test_a_deployment_named_database_is_not_the_database() -> None:
    assert overall([Part("database", healthy=False, message="failed")]) == "degraded"


def test_lateness_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("tursi.lag.time.monotonic", lambda: now)
    reactor = InlineReactor()
    lag = Lag(reactor)
    lag.start()
    for late in (0.0, 0.03, 0.7):
        now += lag_module.EVERY + late
        reactor.advance(lag_module.EVERY)
    lag.stop()
    buckets, total = lag.buckets()
    counts = dict(buckets)
    assert (counts["0.001"], counts["0.05"], counts["1.0"], counts["+Inf"]) == (1, 2, 3, 3)
    assert total == pytest.approx(0.73)
    assert lag.worst == lag.now == pytest.approx(0.7)
    assert not reactor.getDelayedCalls()


def test_a_stall_is_told_with_the_stack() -> None:
    notes: list[str] = []

    @implementer(ILogObserver)
    def observe(noted: LogEvent) -> None:
        notes.append(formatEvent(noted))

    globalLogPublisher.addObserver(cast("ILogObserver", observe))
    lag = Lag(InlineReactor())
    lag.start()
    try:
        until(lambda: notes, "it is told", 30)
    finally:
        lag.stop()
        globalLogPublisher.removeObserver(cast("ILogObserver", observe))
    assert "has stood still" in notes[0]
    assert "test_a_stall_is_told_with_the_stack" in notes[0]
