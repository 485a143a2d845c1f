from __future__ import annotations

import itertools

from twisted.internet.task import Clock

from tursi.supervision.procfs import Usage
from tursi.supervision.usage import LOADING_SECONDS, MAX_SAMPLES, SERVING_SECONDS, Curve


class World:
    def __init__(self) -> None:
        self.clock = Clock()
        self.usage: Usage | None = Usage(1000, 0.123)
        self.serves = False
        self.curve = Curve(
            clock=self.clock,
            now=lambda: 1_000_000 + self.clock.seconds(),
            read=lambda: self.usage,
            serves=lambda: self.serves,
        )

    def times(self) -> list[float]:
        return [each.at - 1_000_000 for each in self.curve.samples]


def test_samples_are_denser_while_it_loads_and_end_when_told() -> None:
    world = World()
    world.curve.start()
    world.clock.pump([LOADING_SECONDS] * 2)
    world.serves = True
    world.clock.pump([LOADING_SECONDS, SERVING_SECONDS])
    assert world.times() == [0, 1, 2, 3, 8]
    world.curve.stop()
    world.curve.stop()
    assert world.clock.getDelayedCalls() == []


def test_what_is_gone_leaves_no_sample() -> None:
    world = World()
    world.usage = None
    world.curve.start()
    world.usage = Usage(0, 1.0)
    world.clock.pump([LOADING_SECONDS])
    assert world.curve.samples == ()


def test_a_long_life_is_thinned_towards_its_beginning() -> None:
    world = World()
    world.serves = True
    world.curve.start()
    for _ in range(2000):
        world.clock.advance(SERVING_SECONDS)
        assert len(world.curve.samples) <= MAX_SAMPLES
    times = world.times()
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0
    assert times[-1] == 2000 * SERVING_SECONDS
    assert gaps[-MAX_SAMPLES // 2 :] == [SERVING_SECONDS] * (MAX_SAMPLES // 2)
    assert max(gaps[:30]) > max(gaps[30:60]) >= SERVING_SECONDS
