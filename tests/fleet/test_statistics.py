from __future__ import annotations

import pytest

from tursi.errors import by_code
from tursi.faces.route import STATUS
from tursi.fleet import statistics as statistics_module
from tursi.fleet.recent import Recent
from tursi.fleet.statistics import Statistics, error_class
from tursi.model import Usage
from tursi.rollup import ErrorClass, Observation, Rollup

USAGE = Usage(7, 11, 4, 0.1, 0.1)


class Bench:
    """Statistics with a clock that a test sets."""

    def __init__(self) -> None:
        self.now = 600.0
        self.statistics = Statistics(lambda: self.now)

    def count(
        self, deployment: str = "one", generation: int = 1, key: int = 0, status: int = 200
    ) -> None:
        self.statistics.count(
            Observation(deployment, generation, key, status, "", 0.5, 0.2, None, USAGE)
        )


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (200, "", ""),
        (429, "queue_full", "overload"),
        (429, "rate_limited", "overload"),
        (503, "model_loading", "overload"),
        (503, "deployment_unavailable", "overload"),
        (400, "context_length_exceeded", "client"),
        (200, "context_length_exceeded", "client"),
        (404, "model_not_found", "client"),
        (422, "poison_request", "client"),
        (502, "worker_lost", "lost"),
        (504, "deadline_exceeded", "timeout"),
        (499, "request_cancelled", "cancelled"),
        (499, "slow_reader", "cancelled"),
        (500, "internal_error", "internal"),
        (200, "out_of_memory", "internal"),
        (500, "", "internal"),
    ],
)
def test_errors_have_a_class(status: int, code: str, expected: str) -> None:
    assert error_class(status, code) == expected


@pytest.mark.parametrize("code", [code for code in by_code() if code in STATUS])
def test_every_error_has_one(code: str) -> None:
    assert error_class(STATUS[code], code) in set(ErrorClass) - {ErrorClass.UNKNOWN}


def test_it_is_counted_by_minute_deployment_and_key(bench: Bench) -> None:
    bench.count()
    bench.count(key=3)
    bench.now = 659.9
    bench.count(generation=2)
    bench.count("two", status=503)
    bench.now = 660.0
    bench.count()
    records = bench.statistics.take()
    assert [(each.start, each.deployment, each.key) for each in records] == [
        (600, "one", 0), (600, "one", 3), (600, "two", 0), (660, "one", 0),
    ]  # fmt: skip
    assert [each.rollup.requests for each in records] == [2, 1, 1, 1]
    assert records[2].rollup.errors == {"overload": 1}
    first = records[0].rollup
    assert first.queue_seconds == pytest.approx(0.6)
    assert (first.prompt_tokens, first.batch_max) == (14, 4)
    assert bench.statistics.take() == []


def test_a_clock_that_is_set_back_counts_where_it_is(bench: Bench) -> None:
    bench.count()
    bench.now = 10.0
    bench.count()
    assert [each.start for each in bench.statistics.take()] == [600, 0]


def test_memory_is_told_once_a_minute(bench: Bench) -> None:
    for second in (0, 10, 20):
        bench.now = 600.0 + second
        bench.statistics.sample("one", 100 * second, second)
    assert bench.statistics.take() == []
    bench.now = 660.0
    (record,) = bench.statistics.take()
    assert (record.start, record.deployment, record.key) == (600, "one", 0)
    rollup = record.rollup
    assert (rollup.samples, rollup.rss, rollup.rss_max, rollup.gpu_max) == (3, 3000, 2000, 20)
    assert rollup.requests == 0


def test_what_could_not_be_stored_is_kept_and_adds_up(bench: Bench) -> None:
    bench.count()
    bench.statistics.put_back(bench.statistics.take())
    bench.count()
    (record,) = bench.statistics.take()
    assert record.rollup.requests == 2


def test_what_waits_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_module, "MAX_HELD", 3)
    for minute in range(5):
        bench.now = minute * 60.0
        bench.count()
        bench.statistics.put_back(bench.statistics.take())
    assert [each.start for each in bench.statistics.take()] == [120, 180, 240]
    assert bench.statistics.dropped == 2


def one(requests: int = 1) -> Rollup:
    made = Rollup()
    for _ in range(requests):
        made.count("", True, 0.1, 0.0, None, 0, 0, 0)
    return made


def test_what_was_of_late_is_known_by_generation() -> None:
    recent = Recent()
    for second in range(400):
        recent.add(
            float(second), {("one", 1, 0): one(), ("one", 2, 0): one(2), ("two", 1, 5): one()}
        )
    assert {number: each.requests for number, each in recent.of("one", 399.0, 10.0).items()} == {
        1: 10, 2: 20,
    }  # fmt: skip
    assert recent.of("one", 399.0, 1.0)[1].latency.count == 1
    assert recent.of("none", 399.0, 300.0) == {}
    # In steps of ten seconds, for five minutes.
    assert 290 <= recent.of("two", 399.0, 1e9)[1].requests <= 310
    assert 110 <= recent.of("two", 399.0, 120.0)[1].requests <= 130
    assert {name: each.requests for name, each in recent.all(399.0, 10.0).items()} == {
        "one": 30, "two": 10,
    }  # fmt: skip


def test_what_is_stored_is_not_changed_by_what_is_remembered(bench: Bench) -> None:
    bench.count(generation=1)
    bench.count(generation=2)
    (record,) = bench.statistics.take(1.0)
    recent = bench.statistics.recent
    assert [each.requests for each in recent.of("one", 1.0, 10.0).values()] == [1, 1]
    bench.count()
    bench.statistics.take(30.0)
    assert record.rollup.requests == 2
