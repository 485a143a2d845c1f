from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fakes import InlineConnectionPool, InlineReactor, result

from tursi.config import Storage
from tursi.errors import InvalidRequest
from tursi.rollup import Period, Record, Rollup, StatisticsQuery, Summary
from tursi.store import Store, file, prepare, schema
from tursi.store import statistics as statistics_module

DAY = 86400
NOON = 20_000 * DAY + DAY // 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tursi.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    prepare(path)
    store = Store(path, InlineReactor(), InlineConnectionPool)
    store.start()
    yield store
    result(store.stop())


def rollup(*seconds: float, error: str = "") -> Rollup:
    made = Rollup()
    for each in seconds:
        made.count(error, True, each, each / 2, each / 4, 3, 10, 20)
    return made


def merged(*rollups: Rollup) -> Rollup:
    made = Rollup()
    for each in rollups:
        made.merge(each)
    return made


def ask(store: Store, by: Period, since: float = 0.0, **more: Any) -> Summary:
    return result(store.statistics(StatisticsQuery(by, since, **more)))


def test_what_is_added_comes_back_whole_and_adds_up(store: Store) -> None:
    one, other = rollup(0.1, 0.2, error="lost"), rollup(3.0)
    one.sample(1000, 500)
    for each in (one, other):
        result(store.add_records([Record(NOON, "e5", 0, each)]))
    found = ask(store, Period.MINUTE)
    assert found.total == merged(one, other)
    assert found.periods == {NOON: found.total}


@pytest.mark.parametrize("rolled_up", [True, False])
def test_it_is_told_by_period_by_deployment_and_by_key(store: Store, rolled_up: bool) -> None:
    a, b, c, d = rollup(0.1), rollup(0.2, 0.2), rollup(0.4), rollup(0.8)
    records = [
        Record(NOON - DAY, "e5", 0, a),
        Record(NOON, "e5", 7, b),
        Record(NOON + 60, "e5", 7, c),
        Record(NOON + 3660, "bge", 0, d),
    ]
    result(store.add_records(records))
    if rolled_up:
        result(store.roll_up(at=NOON + DAY))
    found = ask(store, Period.HOUR)
    assert found.total == merged(a, b, c, d)
    assert found.periods == {NOON - DAY: a, NOON: merged(b, c), NOON + 3600: d}
    assert found.deployments == {"bge": d, "e5": merged(a, b, c)}
    assert found.keys == {0: merged(a, d), 7: merged(b, c)}
    assert ask(store, Period.DAY).periods == {
        NOON - DAY * 3 // 2: a,
        NOON - DAY // 2: merged(b, c, d),
    }
    assert list(ask(store, Period.MINUTE).periods) == [NOON - DAY, NOON, NOON + 60, NOON + 3660]
    # A period counts whole that has begun before.
    assert ask(store, Period.HOUR, NOON + 59.0).total == merged(b, c, d)
    assert ask(store, Period.MINUTE, NOON + 61.0).total == merged(c, d)
    assert ask(store, Period.HOUR, deployment="e5", key=0).total == a
    assert ask(store, Period.HOUR, key=9).total == Rollup()


def test_rolling_up_again_or_late_changes_nothing(store: Store) -> None:
    result(store.add_records([Record(NOON, "e5", 0, rollup(0.1))]))
    for _ in range(3):
        # The minute isn't over.
        result(store.roll_up(at=NOON + 59.9))
        result(store.roll_up(at=NOON + 60))
        assert ask(store, Period.DAY).total.requests == 1
    # What had to wait for the database comes later than the rest of its minute.
    result(store.add_records([Record(NOON, "e5", 0, rollup(0.2))]))
    for rolled_up in (False, True):
        if rolled_up:
            result(store.roll_up(at=NOON + 7200))
        for period in Period:
            assert ask(store, period).total == rollup(0.1, 0.2)


def test_sketches_stay_short_while_they_are_added_to(store: Store, path: Path) -> None:
    for number in range(500):
        result(store.add_records([Record(NOON, "e5", 0, rollup(0.1, 0.1 + number / 1000))]))
    with closing(sqlite3.connect(path)) as other:
        (size,) = other.execute("SELECT length(latency) FROM rollups").fetchone()
    assert size <= 1500
    assert ask(store, Period.MINUTE).total.latency.count == 1000


def test_each_period_goes_back_as_far_as_it_is_to(store: Store) -> None:
    starts = [NOON - days * DAY for days in range(10)]
    result(store.add_records([Record(start, "e5", 0, rollup(0.1)) for start in starts]))
    result(store.roll_up(at=NOON + 60))
    limits = Storage(statistics_minutes=24 * 60, statistics_hours=3 * 24, statistics_days=5)
    for _ in range(2):
        result(store.prune(limits, at=NOON + 60))
        assert len(ask(store, Period.MINUTE).periods) == 1
        assert len(ask(store, Period.HOUR).periods) == 4
        assert len(ask(store, Period.DAY).periods) == 6


def test_too_much_at_once_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_module, "MAX_ROWS", 3)
    records = [Record(NOON + 60 * number, "e5", 0, rollup(0.1)) for number in range(4)]
    result(store.add_records(records))
    with pytest.raises(InvalidRequest, match="too much"):
        ask(store, Period.MINUTE)
    assert ask(store, Period.MINUTE, NOON + 60).total.requests == 3


def test_a_sketch_that_is_no_sketch_costs_its_percentiles_only(store: Store, path: Path) -> None:
    result(store.add_records([Record(NOON, "e5", 0, rollup(0.1))]))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE rollups SET latency = x'ff'")
    result(store.add_records([Record(NOON, "e5", 0, rollup(0.1))]))
    result(store.roll_up(at=NOON + 60))
    found = ask(store, Period.HOUR).total
    assert (found.requests, found.queue.count) == (2, 2)


def test_what_an_older_version_has_counted_is_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = next(
        number for number, each in enumerate(schema.UPGRADES) if "statistics" in each.description
    )
    with monkeypatch.context() as older:
        older.setattr(file, "UPGRADES", schema.UPGRADES[:number])
        prepare(path)
    minute = NOON // 60
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.executemany(
            "INSERT INTO statistics VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                ("e5", minute, 4, 1, 10, 20, 2.0, 0.5),
                ("e5", minute + 1, 2, 0, 1, 2, 1.0, 0.25),
                ("e5", minute - 60, 1, 0, 1, 2, 0.5, 0.0),
                ("bge", minute, 7, 7, 0, 0, 0.0, 0.0),
            ],
        )
    prepare(path)
    store = Store(path, InlineReactor(), InlineConnectionPool)
    store.start()
    hours = ask(store, Period.HOUR, deployment="e5")
    assert [each.requests for each in hours.periods.values()] == [1, 6]
    assert len(ask(store, Period.MINUTE).periods) == 3
    for period in Period:
        total = ask(store, period, deployment="e5").total
        assert (total.requests, total.errors) == (7, {"unknown": 1})
        assert (total.prompt_tokens, total.completion_tokens) == (12, 24)
        assert (total.seconds, total.queue_seconds) == (3.5, 0.75)
        assert total.latency.count == 0
        assert ask(store, period).total.requests == 14
    result(store.stop())
