from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tursi.rollup import ErrorClass, Rollup

requests = st.tuples(
    st.sampled_from(("", *ErrorClass)),
    st.booleans(),
    st.integers(0, 400).map(lambda number: number / 128),
    st.integers(0, 100).map(lambda number: number / 128),
    st.none() | st.integers(0, 100).map(lambda number: number / 128),
    st.integers(0, 9),
    st.integers(0, 999),
    st.integers(0, 999),
)
samples = st.tuples(st.integers(0, 10**10), st.integers(0, 10**10))
parts = st.lists(requests | samples, max_size=12)


def rollup(*parts: list[tuple[object, ...]]) -> Rollup:
    made = Rollup()
    for part in parts:
        for each in part:
            add: Any = made.sample if len(each) == 2 else made.count
            add(*each)
    return made


def merged(*rollups: Rollup) -> Rollup:
    made = Rollup()
    for each in rollups:
        made.merge(each)
    return made


@given(parts, parts, parts)
def test_parts_add_up_to_the_whole_in_any_order(
    a: list[tuple[object, ...]], b: list[tuple[object, ...]], c: list[tuple[object, ...]]
) -> None:
    x, y, z = map(rollup, (a, b, c))
    whole = rollup(a, b, c)
    assert merged(x, y, z) == merged(z, x, y) == merged(merged(x, z), y) == whole
    # None of them has changed by it.
    assert (x, y, z) == tuple(map(rollup, (a, b, c)))


def test_refused_requests_count_but_were_not_fast() -> None:
    made = Rollup()
    made.count("", True, 2.0, 1.0, None, 4, 10, 0)
    for _ in range(99):
        made.count("overload", False, 0.0001, 0.0, None, 0, 0, 0)
    assert (made.requests, made.served, made.failed, made.faults) == (100, 1, 99, 0)
    assert 1.98 < made.latency.quantiles(0.5)[0] < 2.02
    assert made.queue.count == 1


def test_faults_are_errors_that_are_not_the_clients() -> None:
    made = Rollup()
    for each in ErrorClass:
        made.count(each.value, True, 0.1, 0.0, None, 0, 0, 0)
    assert (made.failed, made.faults) == (7, 3)
