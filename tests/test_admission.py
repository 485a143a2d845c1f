"""Who may load, by example and by the laws of it."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tursi.admission import Candidate, Free, admit, place, shared
from tursi.footprint import CONTEXT

GIB = 2**30


def test_what_fits_is_let_in_and_what_is_smaller_passes() -> None:
    queued = [Candidate("big", 6), Candidate("small", 3), Candidate("tiny", 1)]
    assert admit(queued, Free(5), 3) == [("small", "auto"), ("tiny", "auto")]
    assert admit(queued, Free(5), 1) == [("small", "auto")]
    assert [key for key, _ in admit(queued, Free(), 3)] == ["big", "small", "tiny"]


def test_who_has_waited_long_keeps_what_gets_free_but_not_for_ever() -> None:
    def passing(waited: float) -> list[str]:
        queued = [Candidate("big", 6, waited=waited), Candidate("small", 3)]
        return [key for key, _ in admit(queued, Free(5), 2, patience=30)]

    assert passing(29) == ["small"]
    assert passing(31) == passing(59) == []
    assert passing(61) == ["small"]
    # Whom waiting doesn't help, it doesn't help to let the others wait.
    queued = [Candidate("big", 6, waited=31, hopes=False), Candidate("small", 3)]
    assert admit(queued, Free(5), 2) == [("small", "auto")]
    queued = [Candidate("small", 3), Candidate("big", 6, waited=31)]
    assert admit(queued, Free(6), 2) == [("big", "auto")]


def test_who_others_make_room_for_gets_it() -> None:
    queued = [Candidate("small", 3), Candidate("big", 6, first=True)]
    assert admit(queued, Free(5), 2) == []
    assert admit(queued, Free(9), 2) == [("big", "auto"), ("small", "auto")]


def test_the_gpu_with_the_least_to_spare_is_chosen() -> None:
    free = {"cuda:0": 40, "cuda:1": 10, "cuda:2": 5}
    assert place(Candidate("a", 1, 7, "auto"), free) == "cuda:1"
    assert place(Candidate("a", 1, 7, "cuda:0"), free) == "cuda:0"
    assert place(Candidate("a", 1, 7, "cuda:2"), free) is None
    assert place(Candidate("a", 1, 0, "cpu"), {}) == "cpu"
    assert place(Candidate("a", 1, 7, "auto"), {}) is None


def test_several_gpus_share_what_fits_on_none_alone() -> None:
    free = {"cuda:0": 30 * GIB, "cuda:1": 20 * GIB, "cuda:10": 25 * GIB}
    assert place(Candidate("a", 1, 40 * GIB, "cuda"), free) == "cuda:0,cuda:10"
    assert place(Candidate("a", 1, 60 * GIB, "auto"), free) == "cuda:0,cuda:1,cuda:10"
    assert place(Candidate("a", 1, 75 * GIB, "auto"), free) is None
    assert place(Candidate("a", 1, 30 * GIB, "cuda:0,cuda:1"), free) == "cuda:0,cuda:1"


def test_one_loads_on_each_gpu() -> None:
    queued = [Candidate(name, 1, 5, "auto") for name in "abc"]
    free = Free(100, {"cuda:0": 50, "cuda:1": 20})
    assert admit(queued, free, 3) == [("a", "cuda:1"), ("b", "cuda:0")]
    assert admit(queued, free, 3, loading={"cuda:1"}) == [("a", "cuda:0")]
    # The processor's don't wait for them.
    assert admit([Candidate("d", 1)], free, 3, loading={"cuda:0", "cuda:1"}) == [("d", "auto")]


def test_a_suspect_gpu_is_only_chosen_where_there_is_no_other() -> None:
    queued = [Candidate("a", 1, 5, "auto")]
    gpus = {"cuda:0": 5, "cuda:1": 50}
    assert admit(queued, Free(9, gpus, {"cuda:0"}), 1) == [("a", "cuda:1")]
    assert admit(queued, Free(9, gpus, {"cuda:0", "cuda:1"}), 1) == [("a", "cuda:0")]
    assert admit([replace(queued[0], device="cuda:0")], Free(9, gpus, {"cuda:0"}), 1) == [
        ("a", "cuda:0")
    ]


def test_who_waits_for_a_gpu_keeps_only_that_one() -> None:
    queued = [
        Candidate("big", 1, 60, "cuda:0", waited=40),
        Candidate("other", 1, 5, "cuda:0"),
        Candidate("elsewhere", 1, 5, "auto"),
    ]
    free = Free(100, {"cuda:0": 50, "cuda:1": 20})
    assert admit(queued, free, 3) == [("elsewhere", "cuda:1")]


sizes = st.integers(0, 100)
candidates = st.lists(
    st.builds(
        Candidate,
        st.integers(0, 10**6),
        sizes,
        st.just(0) | sizes,
        st.sampled_from(("auto", "cuda", "cuda:0", "cuda:1", "cuda:0,cuda:1")),
        st.floats(0, 1000),
        st.booleans(),
    ),
    unique_by=lambda one: one.key,
    max_size=8,
)
frees = st.builds(
    Free,
    st.none() | sizes,
    st.dictionaries(st.sampled_from(("cuda:0", "cuda:1", "cuda:2")), sizes),
    st.sets(st.sampled_from(("cuda:0", "cuda:1"))),
)


@given(candidates, frees, st.integers(0, 4), st.sets(st.sampled_from(("cuda:0", "cuda:2"))))
def test_nobody_gets_more_than_there_is(
    queued: list[Candidate[int]], free: Free, slots: int, loading: set[str]
) -> None:
    admitted = admit(queued, free, slots, loading)
    by_key = {one.key: one for one in queued}
    assert len(admitted) <= slots
    if free.host is not None:
        assert sum(by_key[key].host for key, _ in admitted) <= free.host
    used = [name for key, device in admitted if by_key[key].gpu for name in device.split(",")]
    assert len(used) == len(set(used))
    assert not loading.intersection(used)
    for key, device in admitted:
        names = device.split(",")
        if by_key[key].gpu:
            assert shared(by_key[key].gpu, len(names)) <= sum(free.gpus[name] for name in names)
        else:
            assert device == by_key[key].device


@given(sizes.filter(bool), st.lists(sizes, max_size=30))
def test_the_large_one_gets_its_turn_whatever_comes(need: int, others: list[int]) -> None:
    """Small ones come and go without end; within two patiences the large one is in."""
    total, patience, residents, waited = 100, 30.0, [60, 30], 0.0
    arriving = iter(others + [30] * 1000)
    while True:
        queued = [Candidate("large", need, waited=waited)]
        queued += [Candidate("small", next(arriving)) for _ in range(2)]
        admitted = [key for key, _ in admit(queued, Free(total - sum(residents)), 2)]
        if "large" in admitted:
            break
        residents += [one.host for one in queued if one.key in admitted][: len(admitted)]
        # Each stays for a while.
        residents = residents[1:] if residents else residents
        waited += 5.0
        assert waited <= 3 * patience


def test_sharing_costs_a_context_for_each_gpu() -> None:
    assert shared(10, 1) == 10
    assert shared(100 * CONTEXT, 3) == 112 * CONTEXT
