"""The plan, by example and by its laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tursi.admission import Free
from tursi.model import Phase
from tursi.plan import Action, Admit, Create, Keep, Key, Resolve, Retire, Seen, Wanted, decide


def worker(
    name: str, generation: int, replica: int, phase: Phase, *, retiring: bool = False
) -> Seen:
    return Seen(Key(name, generation, replica), phase, retiring)


def test_a_new_deployment_is_resolved_before_it_is_created() -> None:
    assert decide([Wanted("a", 1, 2, resolved=False)], []) == [Resolve("a", 1)]
    assert decide([Wanted("a", 1, 2, resolved=True)], []) == [
        Create(Key("a", 1, 0)),
        Create(Key("a", 1, 1)),
    ]


def test_queued_workers_are_admitted_up_to_the_load_slots() -> None:
    seen = [worker("a", 1, replica, Phase.QUEUED) for replica in range(3)]
    seen.append(worker("b", 1, 0, Phase.LOADING))
    wanted = [Wanted("a", 1, 3, resolved=True), Wanted("b", 1, 1, resolved=True)]
    assert decide(wanted, seen, slots=2) == [Admit(Key("a", 1, 0))]


def test_the_old_generation_serves_until_every_replica_of_the_new_one_is_ready() -> None:
    old = [worker("a", 1, 0, Phase.READY), worker("a", 1, 1, Phase.READY)]
    want = [Wanted("a", 2, 2, resolved=True)]
    half = [worker("a", 2, 0, Phase.READY), worker("a", 2, 1, Phase.LOADING)]
    assert decide(want, old + half) == []
    whole = [replace(new, phase=Phase.READY) for new in half]
    assert decide(want, old + whole) == [Retire(Key("a", 1, 0)), Retire(Key("a", 1, 1))]


def test_a_new_revision_of_a_generation_takes_over_like_a_new_generation() -> None:
    old = [worker("a", 1, 0, Phase.READY)]
    want = [Wanted("a", 1, 1, resolved=True, revision=1)]
    [create] = decide(want, old)
    assert create == Create(Key("a", 1, 0, 1))
    new = Seen(Key("a", 1, 0, 1), Phase.LOADING, retiring=False)
    assert decide(want, [*old, new]) == []
    assert decide(want, [*old, replace(new, phase=Phase.READY)]) == [Retire(Key("a", 1, 0))]
    # Each replica by itself, one after the other where there is no room beside them.
    want = [replace(want[0], replicas=2)]
    old.append(worker("a", 1, 1, Phase.READY))
    half = [replace(new, phase=Phase.READY), replace(new, key=Key("a", 1, 1, 1))]
    assert decide(want, [*old, *half]) == [Retire(Key("a", 1, 0))]
    in_place = [replace(want[0], in_place=True)]
    half = [replace(each, phase=Phase.QUEUED) for each in half]
    assert decide(in_place, [*old, *half], slots=0) == [Retire(Key("a", 1, 0))]
    leaving = replace(old[0], phase=Phase.DRAINING, retiring=True)
    assert decide(in_place, [leaving, old[1], *half], slots=0) == []
    half[0] = replace(half[0], phase=Phase.LOADING)
    assert decide(in_place, [old[1], *half], slots=1) == []


def test_a_failed_new_generation_leaves_the_old_one_serving() -> None:
    seen = [worker("a", 1, 0, Phase.READY), worker("a", 2, 0, Phase.FAILED)]
    assert decide([Wanted("a", 2, 1, resolved=True)], seen) == []


def test_an_old_worker_that_does_not_serve_is_not_kept() -> None:
    seen = [worker("a", 1, 0, Phase.BACKOFF), worker("a", 2, 0, Phase.LOADING)]
    assert decide([Wanted("a", 2, 1, resolved=True)], seen) == [Retire(Key("a", 1, 0))]


def test_scaling_down_retires_the_highest_replicas() -> None:
    seen = [worker("a", 1, replica, Phase.READY) for replica in range(3)]
    assert decide([Wanted("a", 1, 1, resolved=True)], seen) == [
        Retire(Key("a", 1, 1)),
        Retire(Key("a", 1, 2)),
    ]


def test_a_stopped_or_removed_deployment_is_retired() -> None:
    seen = [worker("a", 1, 0, Phase.READY), worker("b", 1, 0, Phase.BACKOFF)]
    actions = decide([Wanted("a", 1, 0, resolved=True)], seen)
    assert sorted(action.key for action in actions if isinstance(action, Retire)) == [
        Key("a", 1, 0),
        Key("b", 1, 0),
    ]


def test_a_retiring_worker_blocks_its_successor() -> None:
    seen = [worker("a", 1, 0, Phase.DRAINING, retiring=True)]
    assert decide([Wanted("a", 1, 1, resolved=True)], seen) == []


def test_a_canary_and_what_it_is_tried_beside_are_both_kept() -> None:
    want = Wanted("a", 3, 1, resolved=True, stable=1, split=True)
    assert decide([want], []) == [Create(Key("a", 1, 0)), Create(Key("a", 3, 0))]
    both = [worker("a", 1, 0, Phase.BACKOFF), worker("a", 3, 0, Phase.READY)]
    # One that was tried before goes.
    assert decide([want], [*both, worker("a", 2, 0, Phase.READY)]) == [Retire(Key("a", 2, 0))]
    # Before its files are there, what serves is kept going all the same.
    unknown = replace(want, resolved=False)
    assert decide([unknown], []) == [Resolve("a", 3), Create(Key("a", 1, 0))]


def test_a_generation_that_failed_gives_way_to_the_one_before() -> None:
    want = Wanted("a", 2, 2, resolved=True, stable=1, failed=True)
    seen = [worker("a", 2, 0, Phase.FAILED), worker("a", 2, 1, Phase.LOADING)]
    assert decide([want], seen) == [
        Create(Key("a", 1, 0)),
        Create(Key("a", 1, 1)),
        Retire(Key("a", 2, 1)),
    ]
    # That it isn't known which files it means doesn't matter either.
    assert decide([replace(want, resolved=False)], seen)[:2] == [
        Create(Key("a", 1, 0)),
        Create(Key("a", 1, 1)),
    ]


def test_what_has_no_room_beside_the_old_one_waits_until_that_has_gone() -> None:
    want = Wanted("a", 2, 1, resolved=True, stable=1)
    old, new = worker("a", 1, 0, Phase.READY), worker("a", 2, 0, Phase.QUEUED)
    new = replace(new, memory=10)
    assert decide([want], [old, new], free=Free(5)) == []
    in_place = replace(want, in_place=True)
    assert decide([in_place], [old, new], free=Free(5)) == [Retire(Key("a", 1, 0))]
    leaving = replace(old, phase=Phase.DRAINING, retiring=True)
    assert decide([in_place], [leaving, new], free=Free(5)) == []
    assert decide([in_place], [new], free=Free(10)) == [Admit(Key("a", 2, 0))]


def test_what_served_is_kept_through_its_own_trouble_until_the_other_is_ready() -> None:
    want = Wanted("a", 2, 1, resolved=True, stable=1)
    seen = [worker("a", 1, 0, Phase.BACKOFF), worker("a", 2, 0, Phase.LOADING)]
    assert decide([want], seen) == []


def test_what_served_comes_back_with_a_daemon_that_ended_before_the_other_was_ready() -> None:
    want = Wanted("a", 2, 1, resolved=True, stable=1)
    assert decide([want], []) == [Create(Key("a", 1, 0)), Create(Key("a", 2, 0))]
    # It serves while the other's files are fetched, too.
    unknown = replace(want, resolved=False)
    assert decide([unknown], []) == [Resolve("a", 2), Create(Key("a", 1, 0))]
    assert decide([replace(want, in_place=True)], []) == [Create(Key("a", 2, 0))]
    # What is ready waits for nothing.
    assert decide([want], [worker("a", 2, 0, Phase.READY)]) == []


def test_what_only_finishes_is_kept_when_it_is_wanted_again() -> None:
    ending = worker("a", 1, 0, Phase.DRAINING, retiring=True)
    finishing = Seen(Key("a", 1, 1), Phase.DRAINING, retiring=True, finishing=True)
    want = Wanted("a", 1, 2, resolved=True)
    assert decide([want], [ending, finishing]) == [Keep(Key("a", 1, 1))]
    assert decide([replace(want, replicas=1)], [ending, finishing]) == []


wanted_lists = st.lists(
    st.builds(
        Wanted,
        deployment=st.sampled_from("abc"),
        generation=st.integers(1, 3),
        replicas=st.integers(0, 3),
        resolved=st.booleans(),
        stable=st.none() | st.just(4),
        split=st.booleans(),
        failed=st.booleans(),
        in_place=st.booleans(),
    ).map(lambda want: want if want.stable else replace(want, failed=False)),
    unique_by=lambda want: want.deployment,
)
seen_lists = st.lists(
    st.builds(
        Seen,
        key=st.builds(Key, st.sampled_from("abcd"), st.integers(1, 4), st.integers(0, 3)),
        phase=st.sampled_from(Phase),
        retiring=st.booleans(),
        finishing=st.booleans(),
    ).map(lambda one: replace(one, finishing=one.finishing and one.retiring)),
    unique_by=lambda worker: worker.key,
)


def generations(want: Wanted) -> set[int]:
    """Those that are there in the end."""
    if want.stable is not None and want.failed:
        return {want.stable}
    if want.stable is not None and want.split:
        return {want.stable, want.generation}
    return {want.generation}


def act(
    wanted: Sequence[Wanted], seen: Sequence[Seen], actions: Sequence[Action]
) -> tuple[list[Wanted], list[Seen]]:
    """What would be there if every action had its effect at once."""
    wants = {want.deployment: want for want in wanted}
    workers = {one.key: one for one in seen}
    for action in actions:
        match action:
            case Resolve(name, _):
                wants[name] = replace(wants[name], resolved=True)
            case Create(key):
                assert key not in workers, "a replica would exist twice"
                workers[key] = Seen(key, Phase.QUEUED, retiring=False)
            case Admit(key):
                assert workers[key].phase is Phase.QUEUED
                workers[key] = replace(workers[key], phase=Phase.READY)
            case Retire(key):
                assert not workers[key].retiring
                del workers[key]
            case Keep(key):
                assert workers[key].finishing
                workers[key] = replace(workers[key], retiring=False, finishing=False)
    left = [one for one in workers.values() if not one.retiring]
    return list(wants.values()), left


@given(wanted_lists, seen_lists)
def test_loading_never_exceeds_the_slots(wanted: list[Wanted], seen: list[Seen]) -> None:
    loading = sum(one.phase in {Phase.SPAWNING, Phase.LOADING, Phase.WARMING} for one in seen)
    admitted = [action for action in decide(wanted, seen) if isinstance(action, Admit)]
    assert not admitted or loading + len(admitted) <= 2


@given(wanted_lists, seen_lists)
def test_no_worker_gets_two_actions(wanted: list[Wanted], seen: list[Seen]) -> None:
    keys = [action.key for action in decide(wanted, seen) if not isinstance(action, Resolve)]
    assert len(keys) == len(set(keys))


@given(wanted_lists, seen_lists)
def test_acting_again_and_again_comes_to_rest_at_what_is_wanted(
    wanted: list[Wanted], seen: list[Seen]
) -> None:
    # Whatever can become ready becomes so.
    seen = [one if one.phase is Phase.QUEUED else replace(one, phase=Phase.READY) for one in seen]
    for _ in range(12):
        actions = decide(wanted, seen)
        if not actions:
            break
        wanted, seen = act(wanted, seen, actions)
    assert decide(wanted, seen) == []
    expected = {
        Key(want.deployment, number, replica)
        for want in wanted
        for number in generations(want)
        for replica in range(want.replicas)
    }
    assert {one.key for one in seen if not one.retiring} == expected
