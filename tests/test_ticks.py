from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tursi.supervision import ticks

PERIODS = st.sampled_from((0.1, 1.0, 2.5, 5.0))


@given(st.floats(0, 1e8), PERIODS)
def test_a_look_comes_about_a_period_later(now: float, period: float) -> None:
    assert 0.94 * period < ticks.until(now, period) < 1.06 * period


@given(st.floats(0, 1e5), st.floats(0, 0.2))
def test_who_began_a_moment_apart_is_looked_at_together(now: float, apart: float) -> None:
    first, second = now + ticks.until(now, 2.5), now + apart + ticks.until(now + apart, 2.5)
    assert abs(first - second) < 1e-6 or abs(abs(first - second) - 0.25) < 1e-6


def test_a_regular_look_stays_on_its_tick() -> None:
    now = 0.1
    seen = []
    for _ in range(1000):
        now += ticks.until(now, 2.5)
        seen.append(now)
    assert seen == [2.5 * number for number in range(1, 1001)]
