from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tursi.fleet.governor import MAX_DEATHS, PAUSE_SECONDS, WINDOW_SECONDS, Governor


class World:
    def __init__(self) -> None:
        self.now = 1000.0
        self.governor = Governor(lambda: self.now)

    def die(self, times: int, every: float = 1.0) -> list[bool]:
        said = []
        for _ in range(times):
            said.append(self.governor.died())
            self.now += every
        return said


def test_twenty_deaths_in_a_minute_are_bad_luck_and_one_more_is_a_storm() -> None:
    world = World()
    assert not any(world.die(MAX_DEATHS))
    assert (world.governor.slots(2), world.governor.trouble) == (2, None)
    assert world.die(1, every=0) == [True]
    assert world.governor.slots(2) == 0
    assert world.governor.paused_seconds == PAUSE_SECONDS
    assert world.governor.trouble == (
        "More than 20 workers died within 60 s: nothing is started for another 60 s."
    )


def test_deaths_far_apart_never_pause() -> None:
    assert not any(World().die(1000, every=WINDOW_SECONDS / MAX_DEATHS + 0.01))


def test_more_deaths_do_not_prolong_the_pause() -> None:
    world = World()
    world.die(MAX_DEATHS + 1, every=0)
    assert not any(world.die(59))
    world.now += 1
    assert world.governor.slots(2) == 1
    assert world.governor.trouble == (
        "More than 20 workers died within 60 s: workers are started one at a time until one serves."
    )


def test_after_the_pause_one_that_serves_ends_it_and_one_that_dies_begins_it_again() -> None:
    world = World()
    world.die(MAX_DEATHS + 1, every=0)
    world.governor.served()
    assert world.governor.slots(2) == 0
    world.now += PAUSE_SECONDS
    assert world.governor.slots(2) == 1
    assert world.die(1, every=0) == [True]
    assert world.governor.slots(2) == 0
    world.now += PAUSE_SECONDS
    world.governor.served()
    assert (world.governor.slots(2), world.governor.trouble) == (2, None)
    assert not any(world.die(MAX_DEATHS, every=0))


def test_after_the_pause_a_quiet_minute_ends_it_too() -> None:
    world = World()
    world.die(MAX_DEATHS + 1, every=0)
    world.now += PAUSE_SECONDS + WINDOW_SECONDS
    assert world.governor.slots(2) == 2


@given(st.lists(st.tuples(st.sampled_from(["died", "served"]), st.floats(0, 100)), max_size=200))
def test_it_never_holds_starts_back_for_longer_than_a_pause(
    history: list[tuple[str, float]],
) -> None:
    world = World()
    for what, seconds in history:
        getattr(world.governor, what)()
        world.now += seconds
        assert world.governor.slots(2) in {0, 1, 2}
        assert world.governor.paused_seconds <= PAUSE_SECONDS
        assert (world.governor.slots(2) == 2) is (world.governor.trouble is None)
    world.now += PAUSE_SECONDS
    assert world.governor.slots(2) >= 1
