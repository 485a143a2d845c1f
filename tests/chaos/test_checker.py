"""The checker of chaos runs finds what it is there for, and blames nobody else."""

from __future__ import annotations

import pytest
from checker import (
    Ask,
    Change,
    Fault,
    History,
    Judgement,
    Outcome,
    Role,
    Sample,
    Turn,
    Wanted,
    Window,
    flat,
    floor,
    judge,
    lost_changes,
    lost_turns,
    slope,
    slowest,
    table,
    violations,
)

OK, NOT_FOUND, UNKNOWN = Outcome.ACKNOWLEDGED, Outcome.NOT_FOUND, Outcome.UNKNOWN


def put(model: str, replicas: int = 1, outcome: Outcome = OK) -> Change:
    return Change("one", "put", outcome, model, replicas)


def scale(replicas: int, outcome: Outcome = OK) -> Change:
    return Change("one", "scale", outcome, replicas=replicas)


def back(model: str) -> Change:
    return Change("one", "rollback", OK, model)


def other(action: str, outcome: Outcome = OK) -> Change:
    return Change("one", action, outcome)


def read(seen: Wanted | None) -> Change:
    return Change("one", "read", OK, seen=seen)


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ([put("a"), read(Wanted("a", 1, running=True))], 0),
        ([put("a"), read(None)], 1),
        ([put("a"), put("b"), back("a"), read(Wanted("a", 1, running=True))], 0),
        ([put("a"), put("b"), back("a"), read(Wanted("b", 1, running=True))], 1),
        ([put("a"), scale(2), other("stop"), read(Wanted("a", 2, running=False))], 0),
        ([put("a"), scale(2), other("stop"), read(Wanted("a", 2, running=True))], 1),
        ([put("a"), other("delete"), read(Wanted("a", 1, running=True))], 1),
        # What wasn't acknowledged may have been made, or not.
        ([put("a"), scale(2, UNKNOWN), read(Wanted("a", 1, running=True))], 0),
        ([put("a"), scale(2, UNKNOWN), read(Wanted("a", 2, running=True))], 0),
        ([put("a"), scale(2, UNKNOWN), read(Wanted("a", 3, running=True))], 1),
        # But not both in turn.
        ([put("a"), scale(2, UNKNOWN), read(Wanted("a", 2, running=True)), scale(1, UNKNOWN),
          read(Wanted("a", 2, running=True)), read(Wanted("a", 1, running=True))], 1),
        # An answer tells as much as a read does.
        ([put("a"), other("delete", UNKNOWN), other("stop", NOT_FOUND), read(None)], 0),
        ([put("a"), other("delete", UNKNOWN), other("stop"),
          read(Wanted("a", 1, running=False))], 0),
        ([put("a"), other("start", NOT_FOUND)], 1),
        ([other("delete", NOT_FOUND), read(None)], 0),
    ],
)  # fmt: skip
def test_changes_that_were_acknowledged_are_there(changes: list[Change], lost: int) -> None:
    assert len(lost_changes(changes)) == lost


def turn(action: str, state: str, outcome: Outcome = OK) -> Turn:
    return Turn(1, action, outcome, state)


@pytest.mark.parametrize(
    ("turns", "lost"),
    [
        ([("start", "running"), ("read", "running"), ("read", "done")], 0),
        ([("start", "running"), ("read", "failed")], 1),
        ([("start", "running"), ("pause", "paused"), ("read", "running")], 1),
        ([("start", "running"), ("pause", "done"), ("resume", "done")], 0),
        ([("start", "running"), ("pause", "paused"), ("resume", "running"), ("read", "done")], 0),
        ([("start", "running"), ("cancel", "cancelled"), ("resume", "cancelled")], 0),
        ([("start", "running"), ("cancel", "cancelled"), ("read", "done")], 1),
        ([("start", "running"), ("pause", ""), ("read", "paused")], 0),
        ([("start", "running"), ("pause", ""), ("read", "running")], 0),
        ([("start", "running"), ("pause", ""), ("read", "cancelled")], 1),
    ],
)
def test_pulls_are_what_was_made_of_them(turns: list[tuple[str, str]], lost: int) -> None:
    made = [turn(action, state, OK if state else UNKNOWN) for action, state in turns]
    assert len(lost_turns(made)) == lost


KILL = Fault("kill", "one", at=10.0, until=11.0)
AGAIN = Fault("kill", "one", at=12.0, until=13.0)
FLOOD = Fault("flood", "one", at=12.0, until=13.0, deadly=False)
ANSWERED, EXCUSED, LOST = Judgement.ANSWERED, Judgement.EXCUSED, Judgement.LOST


@pytest.mark.parametrize(
    ("ask", "role", "faults", "windows", "fate"),
    [
        (Ask("one", 9, 10, 200), Role.CALM, [], [], ANSWERED),
        (Ask("one", 9, 10, 200, right=False), Role.CALM, [], [], LOST),
        (Ask("one", 9, 10, 503), Role.CALM, [], [], LOST),
        (Ask("one", 9, 10, 0), Role.CALM, [], [Window(9.5, 12)], EXCUSED),
        (Ask("one", 9, 10, 0), Role.CALM, [], [Window(10.5, 12)], LOST),
        # One death costs nobody an answer, two may.
        (Ask("one", 9, 13, 502), Role.HIT, [KILL], [], LOST),
        (Ask("one", 9, 13, 502), Role.HIT, [KILL, FLOOD], [], LOST),
        (Ask("one", 9, 13, 502), Role.HIT, [KILL, AGAIN], [], EXCUSED),
        (Ask("one", 9, 13, 503), Role.HIT, [KILL, AGAIN], [], LOST),
        (Ask("one", 9, 11, 502), Role.HIT, [KILL, AGAIN], [], LOST),
        (Ask("one", 9, 13, 502, stream=True), Role.HIT, [KILL], [], EXCUSED),
        (Ask("one", 9, 13, 502, stream=True), Role.HIT, [FLOOD], [], LOST),
        # An answer that stops in its midst and tells of no error.
        (Ask("one", 9, 13, 200, "cut", right=False, stream=True), Role.HIT, [KILL], [], LOST),
        (
            Ask("one", 9, 13, 200, "cut", right=False, stream=True),
            Role.CALM,
            [],
            [Window(10, 11)],
            EXCUSED,
        ),
        (Ask("one", 9, 13, 200, right=False), Role.CALM, [], [Window(10, 11)], LOST),
        (Ask("one", 9, 10, 503, "model_loading", again=True), Role.LAZY, [], [], EXCUSED),
        (Ask("one", 9, 10, 503, "model_loading"), Role.LAZY, [], [], LOST),
        (Ask("one", 9, 13, 502, again=True), Role.LAZY, [KILL], [], LOST),
        (Ask("one", 9, 13, 502), Role.LAZY, [KILL, AGAIN], [], EXCUSED),
        (Ask("one", 9, 10, 404), Role.CHURN, [], [], EXCUSED),
        (Ask("one", 9, 10, 503, "internal_error"), Role.CHURN, [], [], LOST),
        (Ask("one", 9, 10, 500), Role.CHURN, [], [], LOST),
        (Ask("one", 9, 10, 0), Role.CHURN, [], [], LOST),
    ],
)
def test_who_asks_gets_an_answer(
    ask: Ask, role: Role, faults: list[Fault], windows: list[Window], fate: Judgement
) -> None:
    assert judge(ask, role, faults, windows) is fate


def samples(daemon: int, seconds: int, *, descriptors: float = 0, rss: float = 0) -> list[Sample]:
    return [
        Sample(daemon, at, 100 + int(descriptors * at), 10**8 + int(rss * at))
        for at in range(seconds)
    ]


def test_what_grows_is_found_in_the_daemon_that_lived_longest() -> None:
    assert slope([(0.0, 1.0), (60.0, 3.0)]).per_minute == pytest.approx(2.0)
    assert flat([])[2] == []
    assert flat(samples(1, 100))[2] == []
    assert flat(samples(1, 20, descriptors=5) + samples(2, 100))[2] == []
    (found,) = flat(samples(1, 100, descriptors=1))[2]
    assert found == "descriptors grow by 60.0 a minute"
    (found,) = flat(samples(1, 100, rss=2**20))[2]
    assert found == "RSS grows by 60.0 MiB a minute"
    # A few seconds say nothing.
    assert flat(samples(1, 60, rss=2**20))[2] == []


def test_what_comes_and_goes_does_not_grow() -> None:
    busy = [(float(at), 100.0 + 30 * (at > 60 and at % 7 > 2)) for at in range(120)]
    assert slope(busy).per_minute > 5
    assert slope(floor(busy)).per_minute == pytest.approx(0.0)
    assert floor([]) == []
    assert floor([(1.0, 2.0)]) == [(1.0, 2.0)]


def test_all_of_it_is_told() -> None:
    history = History({"one": Role.HIT, "two": Role.CALM}, {"one": 2, "two": 1})
    history.asks = [Ask("one", 9, 11, 502, "worker_lost"), Ask("two", 9, 10, 200)]
    history.faults = [KILL]
    history.changes = [put("a"), read(None)]
    history.violations = ["an orphan"]
    found = violations(history)
    assert len(found) == 3
    assert found[0] == "an orphan"
    assert "one (hit): a request of 2.00 s got 502 worker_lost [kill at +1.00 s]" in found[1]
    assert "read found None" in found[2]
    text = "\n".join(table(history))
    assert "1 x kill" in text
    assert slowest(history) == ["slow: two took 1.00 s [no fault near]"]
    assert "1 acknowledged, 0 not found, 0 unknown; 1 reads; 1 lost" in text
