from __future__ import annotations

from twisted.internet.task import Clock

from tursi.supervision.watch import MemoryWatch


class Bench:
    def __init__(self, limit: int = 1000) -> None:
        self.clock = Clock()
        self.used = 0
        self.told: list[tuple[str, int]] = []
        self.watch = MemoryWatch(
            clock=self.clock,
            limit=limit,
            read=lambda: self.used,
            near=lambda used: self.told.append(("near", used)),
            over=lambda used: self.told.append(("over", used)),
        )
        self.watch.start()

    def use(self, used: int) -> None:
        self.used = used
        self.clock.advance(1)


def test_it_tells_once_when_the_limit_is_near_and_when_it_is_passed() -> None:
    bench = Bench()
    for used in (100, 900, 901, 950, 400, 999, 1000):
        bench.use(used)
    assert bench.told == [("near", 901)]
    bench.use(1001)
    assert bench.told == [("near", 901), ("over", 1001)]
    assert bench.watch.peak == 1001
    assert not bench.clock.getDelayedCalls()


def test_a_leap_past_the_limit_is_told_at_once() -> None:
    bench = Bench()
    bench.use(5000)
    assert bench.told == [("over", 5000)]


def test_stopped_it_looks_no_more() -> None:
    bench = Bench()
    bench.watch.stop()
    assert not bench.clock.getDelayedCalls()
    bench.use(5000)
    assert bench.told == []


def test_who_is_told_may_stop_it() -> None:
    bench = Bench()
    bench.watch._near = lambda _: bench.watch.stop()
    bench.use(950)
    assert not bench.clock.getDelayedCalls()
