"""Which models are in memory, by example and by the rules' laws."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tursi.residency import (
    USE_SECONDS,
    Decision,
    Resident,
    Rules,
    Uses,
    Waiting,
    decide,
    next_change,
    room_in,
)

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from swaps import Fifo, Ours, simulate, trace

NOW = 1000.0


def waits(name: str, size: int = 10, *, since: float = NOW - 1, count: int = 1) -> Waiting:
    return Waiting(name, size, since, count, 5.0)


def there(
    name: str,
    size: int = 10,
    *,
    uses: float = 1.0,
    since: float = 0.0,
    held: bool = False,
    busy: bool = False,
) -> Resident:
    return Resident(name, size, since, uses, 5.0, held, busy)


def test_what_fits_is_loaded_and_nothing_goes() -> None:
    assert decide([waits("a")], [there("b")], room=10, now=NOW) == Decision("a")
    assert decide([], [there("b")], room=10, now=NOW) == Decision()


def test_the_least_useful_makes_room() -> None:
    resident = [there("often", uses=9), there("rarely", uses=1), there("busy", uses=0, busy=True)]
    assert decide([waits("a")], resident, room=0, now=NOW) == Decision("a", ("rarely",))
    # The small one would not have sufficed, and isn't needed beside the large one.
    resident = [there("small", 2, uses=0), there("large", 10, uses=5)]
    assert decide([waits("a")], resident, room=0, now=NOW) == Decision("a", ("large",))
    assert decide([waits("a", 12)], resident, room=0, now=NOW).evict == ("small", "large")


def test_who_is_waited_for_by_many_comes_first_but_nobody_waits_for_ever() -> None:
    one, many = waits("one", since=NOW - 5), waits("many", since=NOW - 2, count=20)
    assert decide([one, many], [], room=10, now=NOW).load == "many"
    late = waits("late", since=NOW - 31)
    assert decide([one, many, late], [], room=10, now=NOW).load == "late"


def test_what_is_used_all_the_time_takes_nothing_new_when_others_have_waited_for_too_long() -> None:
    late, early = waits("late", since=NOW - 31), waits("early", since=NOW - 29)
    used, new = there("used", busy=True, since=NOW - 31), there("new", busy=True, since=NOW - 29)
    pinned = there("pinned", held=True)
    assert decide([early], [used], room=0, now=NOW) == Decision()
    assert decide([late], [new, pinned], room=0, now=NOW) == Decision()
    assert decide([late], [used, new, pinned], room=0, now=NOW) == Decision(pause=("used",))
    # Whoever can go at once makes that needless, and goes for others meanwhile.
    assert decide([late], [used, there("idle")], room=0, now=NOW) == Decision("late", ("idle",))
    large = waits("large", 15, since=NOW - 31)
    assert decide([large, early], [used, there("idle")], room=0, now=NOW) == Decision(
        "early", ("idle",), ("used",)
    )
    # Once its requests have been answered it goes.
    assert decide([late], [there("used")], room=0, now=NOW) == Decision("late", ("used",))


def test_when_time_alone_makes_room() -> None:
    resident = [there("new", since=NOW - 4), there("busy", busy=True), there("held", held=True)]
    candidate = waits("a", since=NOW - 1)

    def seconds(candidate: Waiting, resident: list[Resident]) -> float | None:
        return room_in(candidate, resident, room=0, now=NOW, rules=Rules(30.0, 10.0))

    assert seconds(candidate, resident) == 6.0
    assert seconds(candidate, resident[1:]) is None
    assert seconds(waits("a", since=NOW - 28), [there("new", since=NOW)]) == 2.0
    assert seconds(waits("a", since=NOW - 50), [there("new", since=NOW)]) == 0.0


def test_what_has_just_come_stays_for_a_while() -> None:
    resident = [there("young", since=NOW - 3)]
    assert decide([waits("a")], resident, room=0, now=NOW) == Decision()
    assert next_change([waits("a")], resident, NOW, Rules()) == 7.0
    assert decide([waits("a")], resident, room=0, now=NOW + 7) == Decision("a", ("young",))
    # Whoever has waited too long doesn't care.
    assert decide([waits("a", since=NOW - 30)], resident, room=0, now=NOW).evict == ("young",)
    assert next_change([], resident, NOW, Rules()) is None


def test_a_use_fades() -> None:
    uses = Uses()
    uses.add(NOW)
    uses.add(NOW)
    assert uses.value(NOW) == 2
    assert 0.7 < uses.value(NOW + USE_SECONDS) < 0.75


NAMES = st.sampled_from("abcdefgh")
WAITING = st.lists(
    st.builds(
        Waiting, NAMES, st.integers(1, 50), st.floats(0, NOW), st.integers(1, 99), st.floats(0, 99)
    ),
    max_size=6,
)
RESIDENT = st.lists(
    st.builds(
        Resident,
        NAMES.map(str.upper),
        st.integers(1, 50),
        st.floats(0, NOW),
        st.floats(0, 1e6),
        st.floats(0, 99),
        st.booleans(),
    ),
    max_size=6,
    unique_by=lambda each: each.name,
)


@given(WAITING, RESIDENT, st.integers(0, 100))
def test_room_is_made_by_none_that_is_held_and_by_none_too_many(
    waiting: list[Waiting], resident: list[Resident], room: int
) -> None:
    decision = decide(waiting, resident, room=room, now=NOW)
    by_name = {each.name: each for each in resident}
    going = [by_name[name] for name in decision.evict]
    assert not any(each.held for each in going)
    if decision.load is None:
        assert not going
        return
    size = min(each.size for each in waiting if each.name == decision.load)
    freed = sum(each.size for each in going)
    assert room + freed >= size
    most = max(each.size for each in waiting if each.name == decision.load)
    for each in going:
        assert room + freed - each.size < most, "nothing goes that needn't"


@given(WAITING, RESIDENT, st.integers(0, 100))
def test_when_all_have_waited_too_long_whatever_can_be_loaded_is(
    waiting: list[Waiting], resident: list[Resident], room: int
) -> None:
    later = NOW + 100
    can = room + sum(each.size for each in resident if not each.held)
    decision = decide(waiting, resident, room=room, now=later)
    assert (decision.load is not None) == any(each.size <= can for each in waiting)


def test_under_overload_there_are_at_most_half_the_swaps_of_fifo_and_shorter_waits() -> None:
    arrivals = trace(2000, 200, seed=1, rate=4.0)
    ours, fifo = simulate(arrivals, Ours()), simulate(arrivals, Fifo())
    assert ours.swaps <= 0.5 * fifo.swaps
    assert ours.percentile(0.95) <= fifo.percentile(0.95)
