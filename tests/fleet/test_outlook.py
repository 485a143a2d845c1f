"""When a model will be there, as well as can be told."""

from __future__ import annotations

import pytest

from tursi.fleet.outlook import left, share, wait
from tursi.model import Progress


@pytest.mark.parametrize(
    ("measured", "elapsed", "done", "seconds"),
    [
        (8.0, 3.0, None, 5.0),
        # What was measured counts for more than the pace,
        (8.0, 3.0, 0.9, 5.0),
        # until it has turned out to be wrong.
        (8.0, 9.0, 0.75, 3.0),
        (8.0, 9.0, None, None),
        (None, 3.0, 0.25, 9.0),
        (None, 3.0, 0.01, 7.0),
        (None, 3.0, None, 7.0),
        (None, 30.0, None, None),
        (None, 3.0, 1.0, 0.0),
    ],
)
def test_what_is_left_of_a_load(
    measured: float | None, elapsed: float, done: float | None, seconds: float | None
) -> None:
    assert left(measured, elapsed, done) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("slots", "loads", "before", "seconds"),
    [
        (2, [], [], 0.0),
        (2, [5.0], [], 0.0),
        (2, [5.0, 3.0], [], 3.0),
        (2, [5.0, 3.0], [10.0], 5.0),
        (2, [5.0, 3.0], [10.0, 10.0], 13.0),
        (1, [5.0, 3.0], [], 5.0),
    ],
)
def test_the_wait_for_a_slot(
    slots: int, loads: list[float], before: list[float], seconds: float
) -> None:
    assert wait(slots, loads, before) == seconds


def test_the_share_of_a_step() -> None:
    assert share(None) is None
    assert share(Progress("load")) is None
    assert share(Progress("load", 3.0, 0.0)) is None
    assert share(Progress("load", 3.0, 4.0)) == 0.75
    assert share(Progress("load", 5.0, 4.0)) == 1.0
