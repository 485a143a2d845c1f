"""What a download tells of the bytes that have arrived."""

from __future__ import annotations

from collections.abc import Callable

from tursi.fetcher.meter import Meter
from tursi.model import Progress


class Bench:
    def __init__(self) -> None:
        self.now = 0.0
        self.told: list[float | None] = []
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.meter = Meter(
            100,
            lambda progress: self.told.append(progress.done),
            lambda: self.now,
            later=lambda seconds, call: self.later.append((self.now + seconds, call)),
        )

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [each for each in self.later if each[0] <= self.now]
        self.later = [each for each in self.later if each not in due]
        for _, call in due:
            call()


def test_the_last_bytes_before_a_stall_are_told_of() -> None:
    bench = Bench()
    bench.meter.add(10)
    assert bench.told == [10]
    bench.advance(0.1)
    bench.meter.add(5)
    bench.meter.add(5)
    assert bench.told == [10]
    bench.advance(0.25)
    assert bench.told == [10, 20]
    bench.advance(10)
    assert bench.told == [10, 20]
    assert bench.later == []


def test_it_is_told_of_no_more_often_than_that() -> None:
    bench = Bench()
    for _ in range(99):
        bench.meter.add(1)
        bench.advance(0.02)
    assert 7 <= len(bench.told) <= 9
    bench.meter.finish()
    bench.advance(1)
    assert bench.told[-1] == 100
    assert bench.told == sorted(set(bench.told), key=lambda each: each or 0)


def test_progress_has_its_stage() -> None:
    told: list[Progress] = []
    Meter(4, told.append, lambda: 0.0, "verify").finish()
    assert told == [Progress("verify", 4.0, 4.0)]
