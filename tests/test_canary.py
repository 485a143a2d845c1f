"""The share of a canary, by its law."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tursi.canary import Share, Tally, worse


def deal(share: Share, count: int) -> list[bool]:
    """Which of so many requests the canary gets."""
    found = []
    for _ in range(count):
        found.append(share.turn)
        share.deal(canary=share.turn)
    return found


@given(st.integers(0, 100), st.integers(0, 2000), st.integers(0, 2**32))
def test_the_share_is_kept_all_the_while(weight: int, count: int, seed: int) -> None:
    given_ = 0
    for number, mine in enumerate(deal(Share(weight, random.Random(seed).random), count), 1):
        given_ += mine
        assert abs(given_ - number * weight / 100) <= 2


def test_the_places_are_not_foreseeable_and_all_are_possible() -> None:
    share = Share(10, random.Random(1).random)
    places = [number % 10 for number, mine in enumerate(deal(share, 3000)) if mine]
    assert len(places) == 300
    assert set(places) == set(range(10))


def test_what_the_canary_could_not_take_it_gets_later() -> None:
    share = Share(50, random.Random(1).random)
    for _ in range(10):
        share.deal(canary=False)
    assert sum(deal(share, 90)) in range(49, 52)


def test_nothing_and_everything() -> None:
    assert not any(deal(Share(0, random.random), 100))
    assert all(deal(Share(100, random.random), 100))


def test_only_what_is_far_worse_is_told_and_only_from_enough_requests() -> None:
    def told(canary: tuple[int, int, float], stable: tuple[int, int, float]) -> str | None:
        return worse(Tally(*canary), Tally(*stable))

    assert told((100, 1, 10.0), (1000, 1, 100.0)) is None
    assert told((19, 19, 1.0), (1000, 0, 100.0)) is None
    assert told((100, 10, 10.0), (1000, 50, 100.0)) is None
    failing = told((100, 20, 10.0), (1000, 50, 100.0))
    assert failing == "20 % of its requests fail, 5 % of the others."
    slow = told((100, 0, 25.0), (1000, 0, 100.0))
    assert slow == "Its requests take 0.25 s, the others 0.1 s."
    one = Tally()
    one.add(0.5, failed=True)
    assert (one.requests, one.errors, one.seconds) == (1, 1, 0.5)
