"""The number of replicas, by example and by its laws."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tursi.scaling import Rules, Scaler

RULES = Rules(target=0.5, up=2.0, down=60.0, held=60.0)


def run(scaler: Scaler, seconds: range, waited: float, replicas: int, most: int = 4) -> int:
    """Look once a second, each replica being ready at once."""
    for now in seconds:
        replicas = scaler.decide(
            float(now), waited=waited, replicas=replicas, ready=replicas, least=1, most=most
        )
    return replicas


def test_waiting_brings_more_quickly_and_calm_brings_fewer_slowly() -> None:
    scaler = Scaler(RULES)
    assert run(scaler, range(2), 1.0, 1) == 1
    assert run(scaler, range(2, 3), 1.0, 1) == 2
    assert run(scaler, range(3, 20), 1.0, 2) == 4
    assert run(scaler, range(20, 60), 0.0, 4) == 4
    assert run(scaler, range(60, 90), 0.0, 4) == 3
    assert run(scaler, range(90, 400), 0.0, 3) == 1


def test_a_moment_of_waiting_and_what_is_still_loading_change_nothing() -> None:
    scaler = Scaler(RULES)
    for now in range(100):
        waited = 1.0 if now % 2 else 0.2
        assert run(scaler, range(now, now + 1), waited, 1) == 1
    for now in range(100, 200):
        number = scaler.decide(float(now), waited=9.0, replicas=2, ready=1, least=1, most=4)
        assert number == 2


def test_what_had_no_room_is_asked_for_again_after_a_while() -> None:
    scaler = Scaler(RULES)
    assert run(scaler, range(3), 1.0, 1) == 2
    scaler.hold(3.0)
    assert run(scaler, range(3, 62), 1.0, 1) == 1
    assert run(scaler, range(62, 66), 1.0, 1) == 2


def test_another_range_holds_at_once() -> None:
    decide = Scaler(RULES).decide
    assert decide(0.0, waited=0.0, replicas=5, ready=5, least=1, most=3) == 3
    assert decide(0.0, waited=9.0, replicas=1, ready=1, least=2, most=3) == 2


moments = st.lists(
    st.tuples(st.floats(0.1, 30), st.floats(0, 10), st.integers(0, 8), st.booleans()), max_size=200
)


@given(moments, st.integers(1, 8), st.integers(0, 8))
def test_it_is_never_outside_its_range(
    observed: list[tuple[float, float, int, bool]], least: int, more: int
) -> None:
    scaler, now, number = Scaler(RULES), 0.0, least
    for seconds, waited, ready, held in observed:
        now += seconds
        after = scaler.decide(
            now, waited=waited, replicas=number, ready=ready, least=least, most=least + more
        )
        assert least <= after <= least + more
        assert abs(after - number) <= 1
        number = after
        if held:
            scaler.hold(now)


@given(st.integers(1, 8), st.floats(0.6, 20), st.floats(0, 0.12))
def test_a_steady_load_doesnt_make_it_swing(needed: int, waited: float, calm: float) -> None:
    # With fewer than are needed requests wait, with as many they don't.
    scaler, number, changes = Scaler(RULES), 1, []
    for now in range(24 * 3600):
        after = scaler.decide(
            float(now),
            waited=waited if number < needed else calm,
            replicas=number,
            ready=number,
            least=1,
            most=8,
        )
        if after != number:
            changes.append(now)
        number = after
    # Up at once; then a try with one less ever more seldom, in the end once an hour.
    assert len([now for now in changes if now < 60]) == needed - 1
    assert len([now for now in changes if now > 7200]) <= 2 * 24
