from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tursi.sketch import ACCURACY, LAST, LEAST, MOST, Sketch, bin_of

durations = st.floats(0, 2 * MOST)
some = st.lists(durations, max_size=60)
shares = st.sampled_from((0.0, 0.5, 0.95, 0.99, 1.0)) | st.floats(0, 1)


def sketch(values: Sequence[float]) -> Sketch:
    made = Sketch()
    for value in values:
        made.add(value)
    return made


def merged(*sketches: Sketch) -> Sketch:
    made = Sketch()
    for each in sketches:
        made.merge(each)
    return made


@given(st.lists(st.floats(LEAST, MOST), min_size=1, max_size=200), shares)
def test_a_quantile_is_right_within_the_bound(values: list[float], share: float) -> None:
    right = sorted(values)[max(ceil(share * len(values)), 1) - 1]
    (found,) = sketch(values).quantiles(share)
    assert found == pytest.approx(right, rel=ACCURACY * 1.0001)


@given(st.lists(some, max_size=4), shares)
def test_a_quantile_of_a_sum_is_that_of_all_values(parts: list[list[float]], share: float) -> None:
    whole = sketch([value for part in parts for value in part])
    assert merged(*map(sketch, parts)) == whole
    assert merged(*map(sketch, parts)).quantiles(share) == whole.quantiles(share)


@given(some, some, some)
def test_sums_are_associative_and_commutative(
    a: list[float], b: list[float], c: list[float]
) -> None:
    x, y, z = map(sketch, (a, b, c))
    assert merged(x, y) == merged(y, x)
    assert merged(merged(x, y), z) == merged(x, merged(y, z))
    assert merged(x, Sketch()) == x


@given(some, some)
def test_what_is_encoded_comes_back_and_adds_up(a: list[float], b: list[float]) -> None:
    x, y = sketch(a), sketch(b)
    assert Sketch.decode(x.encode()) == x
    assert Sketch.decode(x.encode() + y.encode()) == merged(x, y)


@given(st.binary(max_size=40))
def test_other_bytes_are_refused_or_a_sketch(data: bytes) -> None:
    try:
        found = Sketch.decode(data)
    except ValueError:
        return
    assert all(0 <= number <= LAST and count > 0 for number, count in found.items())


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_sketch_that_is_cut_off_is_refused(cut: int) -> None:
    data = sketch([0.001] * 300 + [0.5]).encode()
    with pytest.raises(ValueError, match="sketch"):
        Sketch.decode(data[:-cut])


def test_its_size_is_bounded() -> None:
    everything = sketch([LEAST * 1.001**step for step in range(25_000)])
    everything.merge(sketch([0.0, 1e9]))
    assert len(everything) == LAST + 1
    everything.merge(dict.fromkeys(everything, 10**9))
    # A row for a minute of one deployment has rather a few hundred bytes.
    assert len(everything.encode()) < 8000


def test_an_empty_one_has_no_quantiles() -> None:
    assert Sketch().quantiles(0.5, 0.99) == [0.0, 0.0]
    assert Sketch.decode(b"") == Sketch()
    assert Sketch().count == 0
    assert sketch([0.0, 0.0, 1.0]).count == 3


def test_what_is_out_of_range_counts_as_its_end() -> None:
    assert bin_of(0) == bin_of(-1) == 0
    assert bin_of(MOST * 10) == LAST
    assert sketch([0.0]).quantiles(0.5) == [0.0]
