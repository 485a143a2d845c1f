"""New generations step by step: proven, switched to, given up, and all that remembered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_fleet import Bench, FakeWorker

from tursi import wire
from tursi.errors import NoCanary, QueueFull, WorkerLost
from tursi.fleet import Work
from tursi.model import Fate, Load, Phase, Request, Schedule, Usage
from tursi.rollup import Observation
from tursi.supervision.link import Sink

END = wire.End(Usage(), "")


class Answering(FakeWorker):
    """One that keeps what it is asked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: list[tuple[wire.Ask, Sink]] = []
        self.cancelled: list[int] = []
        self.full = False

    def submit(self, ask: Any, sink: Any) -> int:
        if self.full:
            raise QueueFull("It is full.")
        self.asked.append((ask, sink))
        return len(self.asked)

    def cancel(self, id: int) -> None:  # noqa: A002 - the real one's name
        self.cancelled.append(id)

    def say(self, status: int = 200, body: bytes = b"{}", end: wire.End = END) -> None:
        """Answer the last question."""
        _, sink = self.asked[-1]
        sink.head(wire.Head(status, "application/json", {}))
        sink.body(body)
        sink.end(end)


class House(Bench):
    def make(self, **fields: Any) -> FakeWorker:
        worker = Answering(
            fields["name"],
            fields["key"],
            fields["order"],
            fields["limits"],
            fields["observer"],
            fields["place"],
        )
        self.workers.append(worker)
        return worker

    def worker(self, generation: int) -> Answering:
        """The newest of that generation."""
        found = [
            each for each in self.workers if (each.deployment, each.generation) == ("a", generation)
        ]
        assert isinstance(found[-1], Answering)
        return found[-1]

    def up(self, model: str, size: int = 5, **fields: Any) -> str:
        request = {"model": model, **{key: fields.pop(key) for key in ("dtype",) if key in fields}}
        replicas = fields.pop("replicas", 1)
        coroutine = self.fleet.deploy("a", Request(**request), replicas, "me", **fields)
        _, outcome = self.do(coroutine)
        if self.hub.asked:
            self.found(folder=model, size=size)
        return outcome

    def become(self, generation: int, phase: Phase, reason: str | None = None) -> Answering:
        worker = self.worker(generation)
        worker.become(phase, reason)
        self.turn()
        return worker

    def ready(self, generation: int) -> Answering:
        worker = self.become(generation, Phase.READY)
        if worker.asked:
            worker.say()
            self.turn()
        return worker

    def gone(self, generation: int) -> None:
        self.worker(generation).stopped.callback(None)
        self.turn()

    def fates(self) -> list[list[Fate]]:
        return [
            [turn.fate for turn in each.turns]
            for each in self.do(self.fleet.records.generations("a"))
        ]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    one = House(tmp_path)
    one.open()
    yield one
    for call in one.reactor.getDelayedCalls():
        call.cancel()
    one.store.stop()


def again(house: House, tmp_path: Path) -> Iterator[House]:
    """The next daemon on the same state."""
    for call in house.reactor.getDelayedCalls():
        call.cancel()
    after = House(tmp_path)
    after.open()
    yield after
    for call in after.reactor.getDelayedCalls():
        call.cancel()
    after.store.stop()


def ask(house: House) -> list[object]:
    """Ask something of it; what a client is told."""
    told: list[object] = []

    class Client:
        def __getattr__(self, name: str) -> Any:
            return told.append

    house.fleet.submit("a", Work("r", "i", "", b"{}", 50.0), Client())
    return told


def serving(house: House) -> None:
    """Generation 1 serves."""
    house.up("/models/a")
    house.ready(1)
    assert house.worker(1).asked == []


def test_a_new_generation_takes_over_when_it_has_answered(house: House) -> None:
    serving(house)
    assert house.up("/models/b") == "replaced"
    new = house.become(2, Phase.READY)
    status = house.fleet.deployment("a")
    assert (status.phase, status.stable, status.ready) == (Phase.WARMING, 1, 1)
    [(ask, _)] = new.asked
    assert (ask.route, ask.body) == ("huggingface", b'{"inputs": "One."}')
    assert ask.request_id == "smoke-a-2-0"
    house.turn()
    assert len(new.asked) == 1
    house.fleet.submit("a", Work("r", "i", "", b"{}", 9.0), None)  # type: ignore[arg-type] # never told
    assert len(house.worker(1).asked) == 1
    # What it can't make of these few words isn't its fault.
    new.say(400)
    house.turn()
    assert house.worker(1).phase is Phase.DRAINING
    status = house.fleet.deployment("a")
    assert (status.phase, status.stable, status.generation) == (Phase.READY, None, 2)
    assert house.fates() == [[Fate.SERVING, Fate.REPLACED], [Fate.SERVING]]


def test_what_is_replaced_finishes_what_it_is_at_however_long_that_takes(house: House) -> None:
    serving(house)
    old = house.worker(1)
    told = ask(house)
    old.in_flight = 1
    house.up("/models/b")
    new = house.ready(2)
    status = house.fleet.deployment("a")
    assert {each.generation: each.phase for each in status.workers} == {
        1: Phase.DRAINING,
        2: Phase.READY,
    }
    assert (status.ready, old.phase) == (1, Phase.READY)
    ask(house)
    assert (len(old.asked), len(new.asked)) == (1, 2)
    house.reactor.advance(400)
    house.turn()
    assert old.phase is Phase.READY
    old.in_flight = 0
    old.say()
    house.turn()
    assert told[-1] == END
    assert house.worker(1).phase is Phase.DRAINING
    house.gone(1)
    assert [each.generation for each in house.fleet.deployment("a").workers] == [2]


def test_a_replica_that_finishes_what_it_is_at_is_kept_or_ended_as_it_is_needed(
    house: House,
) -> None:
    def down_with_a_request() -> Answering:
        second = house.worker(1)
        second.become(Phase.READY)
        second.in_flight = 1
        house.do(house.fleet.scale("a", 1, "me"))
        house.turn()
        assert second.phase is Phase.READY
        return second

    house.up("/models/a", replicas=2)
    house.ready(1)
    second = down_with_a_request()
    house.do(house.fleet.scale("a", 2, "me"))
    house.turn()
    assert house.fleet.deployment("a").workers[1].phase is Phase.READY
    # Somebody waits for its memory.
    second = down_with_a_request()
    house.available = 10
    house.do(house.fleet.deploy("b", Request("/models/c"), 1, "me"))
    house.found(folder="/models/c", size=2**30)
    house.turn()
    assert second.phase is Phase.DRAINING
    house.available = None
    house.gone(1)
    house.do(house.fleet.scale("a", 2, "me"))
    house.turn()
    # Somebody wants nothing of it any more.
    second = down_with_a_request()
    house.do(house.fleet.stop("a", "me"))
    house.turn()
    assert second.phase is Phase.DRAINING


@pytest.mark.parametrize("how", ["status", "midway", "lost", "late", "full"])
def test_one_that_can_not_answer_does_not(house: House, how: str) -> None:
    serving(house)
    house.up("/models/b")
    house.worker(2).full = how == "full"
    new = house.become(2, Phase.READY)
    match how:
        case "status":
            new.say(500, b'{"error": {"message": "It is broken."}}')
        case "midway":
            new.say(200, b"", wire.End(Usage(), "internal_error"))
        case "lost":
            new.asked[0][1].failed(WorkerLost("It ended."))
        case "late":
            house.reactor.advance(200)
            assert new.cancelled == [1]
    house.turn()
    said = {
        "status": "It is broken.",
        "midway": "internal_error",
        "lost": "It ended.",
        "late": "within 120 s",
        "full": "It is full.",
    }
    status = house.fleet.deployment("a")
    assert status.phase is Phase.FAILED
    assert said[how] in (status.reason or "")
    assert "Generation 1 keeps serving." in (status.reason or "")
    assert new.phase is Phase.DRAINING
    assert house.worker(1).phase is Phase.READY
    assert house.fates()[1] == [Fate.FAILED]


def test_a_replica_that_goes_with_its_first_request_speaks_not_against_the_others(
    house: House,
) -> None:
    serving(house)
    house.do(house.fleet.scale("a", 2, "me"))
    house.up("/models/b", replicas=2)
    new = [worker for worker in house.workers if worker.generation == 2]
    assert [worker.replica for worker in new] == [0, 1]
    for worker in new:
        worker.become(Phase.READY)
    house.turn()
    house.do(house.fleet.scale("a", 1, "me"))
    first, second = new
    assert isinstance(second, Answering)
    second.asked[-1][1].failed(WorkerLost("It has been ended."))
    house.turn()
    assert house.fleet.deployment("a").phase is Phase.WARMING
    assert isinstance(first, Answering)
    first.say()
    house.turn()
    assert house.fates()[1] == [Fate.SERVING]


@pytest.mark.parametrize("phase", [Phase.FAILED, Phase.QUARANTINED])
def test_after_a_restart_what_had_served_does_and_what_failed_waits_to_be_asked_again(
    house: House, tmp_path: Path, phase: Phase
) -> None:
    serving(house)
    house.up("/models/b")
    house.become(2, phase, "The weights are damaged.")
    assert house.fleet.deployment("a").phase is Phase.FAILED
    # It tells why, and takes no room.
    assert house.worker(2).phase in {Phase.FAILED, Phase.DRAINING}
    for after in again(house, tmp_path):
        assert [each.generation for each in after.workers] == [1]
        after.ready(1)
        status = after.fleet.deployment("a")
        assert status.reason == "The weights are damaged. Generation 1 keeps serving."
        assert after.up("/models/b") == "retried"
        after.ready(2)
        assert after.fleet.deployment("a").phase is Phase.READY
        assert after.fates()[1] == [Fate.FAILED, Fate.RETRIED, Fate.SERVING]


def test_what_can_never_fit_is_given_up_and_in_no_ones_way(house: House, tmp_path: Path) -> None:
    serving(house)
    house.up("/models/b", size=2**50)
    status = house.fleet.deployment("a")
    assert status.phase is Phase.FAILED
    assert "more than" in (status.reason or "")
    for after in again(house, tmp_path):
        [worker] = after.workers
        assert (worker.generation, worker.phase) == (1, Phase.SPAWNING)
        after.ready(1)
        assert after.fleet.deployment("a").ready == 1
        # Its files stay, and it is found by either model's name.
        assert after.fleet.find("/models/a") == after.fleet.find("/models/b") == "a"


def test_on_demand_both_generations_of_a_canary_come_and_go(house: House) -> None:
    house.up("/models/a", schedule=Schedule(Load.ON_DEMAND, -1))
    house.ready(1)
    house.up("/models/b", canary=50)
    house.ready(2)
    house.do(house.fleet.unload("a", "me"))
    for number in (1, 2):
        assert house.worker(number).phase is Phase.DRAINING
        house.gone(number)
    assert house.fleet.deployment("a").workers == ()
    house.do(house.fleet.load("a", "me"))
    for number in (1, 2):
        assert house.ready(number).phase is Phase.READY
    canary = house.fleet.deployment("a").canary
    assert canary is not None
    assert (house.fleet.deployment("a").ready, canary.ready) == (1, 1)


def test_a_sleeping_canary_that_is_promoted_is_loaded_to_see_whether_it_can_be(
    house: House,
) -> None:
    house.up("/models/a", schedule=Schedule(Load.ON_DEMAND, -1))
    house.ready(1)
    house.up("/models/b", canary=50)
    house.ready(2)
    house.do(house.fleet.unload("a", "me"))
    house.gone(1)
    house.gone(2)
    house.do(house.fleet.promote("a", "me"))
    house.ready(2)
    assert house.fleet.deployment("a").phase is Phase.READY
    assert house.fates()[1][-1] is Fate.SERVING


def test_what_sleeps_looks_like_what_comes_back(house: House) -> None:
    house.up("/models/a", schedule=Schedule(Load.ON_DEMAND, 2))
    house.ready(1)
    house.up("/models/b")
    house.become(2, Phase.FAILED, "The weights are damaged.")
    house.do(house.fleet.unload("a", "me"))
    status = house.fleet.deployment("a")
    assert (status.generation, status.model) == (1, "/models/a")
    assert "Generation 2 could not take over" in (status.reason or "")


@pytest.mark.parametrize("canary", [None, 50])
def test_what_is_new_is_loaded_before_what_is_idle_goes(house: House, canary: int | None) -> None:
    house.up("/models/a", schedule=Schedule(Load.ON_DEMAND, 2))
    house.ready(1)
    house.reactor.advance(1.5)
    house.up("/models/b", canary=canary)
    house.reactor.advance(5)
    house.turn()
    assert house.worker(1).phase is Phase.READY
    assert house.fleet.deployment("a").unloads_at is None
    house.ready(2)
    assert house.worker(2).phase is Phase.READY
    house.reactor.advance(3)
    house.turn()
    assert house.worker(2).phase is Phase.DRAINING
    assert house.fates()[1] == ([] if canary else [Fate.SERVING])


def test_where_nothing_else_serves_the_first_failure_is_enough(
    house: House, tmp_path: Path
) -> None:
    serving(house)
    house.up("/models/b")
    for call in house.reactor.getDelayedCalls():
        call.cancel()
    # The daemon ended in the middle of it; there is room for the new one only.
    after = House(tmp_path)
    after.available = 10
    after.open()
    assert [(each.generation, each.phase) for each in after.workers] == [
        (1, Phase.QUEUED),
        (2, Phase.QUEUED),
    ]
    waiting = ask(after)
    after.become(2, Phase.BACKOFF, "it was killed")
    assert waiting == []
    assert after.fleet.deployment("a").reason == "it was killed. Generation 1 is loaded again."
    after.ready(1)
    # Who waited is served by what had served before.
    assert len(after.worker(1).asked) == 1
    assert after.fates()[1] == [Fate.FAILED]
    for call in after.reactor.getDelayedCalls():
        call.cancel()
    after.store.stop()


@pytest.mark.parametrize("phase", [Phase.FAILED, Phase.QUARANTINED])
def test_a_canary_is_promoted_or_given_up(house: House, phase: Phase) -> None:
    serving(house)
    with pytest.raises(NoCanary):
        house.do(house.fleet.promote("a", "me"))
    assert house.up("/models/b", canary=10) == "replaced"
    house.ready(2)
    status = house.fleet.deployment("a")
    assert (status.generation, status.model, status.ready) == (1, "/models/a", 1)
    assert status.canary is not None
    assert (status.canary.generation, status.canary.ready, status.canary.weight) == (2, 1, 10)
    # One failure is no reason yet.
    house.become(2, Phase.BACKOFF, "it was killed")
    status = house.do(house.fleet.weigh("a", 50, "me"))
    assert status.canary is not None
    assert (status.canary.weight, status.canary.reason) == (50, "it was killed")
    house.become(2, phase, "it was killed again")
    status = house.fleet.deployment("a")
    assert (status.canary, status.generation, status.stable) == (None, 1, None)
    assert house.worker(2).phase is Phase.DRAINING
    assert house.fates() == [[Fate.SERVING], [Fate.FAILED]]
    house.gone(2)
    house.up("/models/c", canary=10)
    house.ready(3)
    house.do(house.fleet.promote("a", "me"))
    assert house.worker(1).phase is Phase.DRAINING
    assert house.fleet.deployment("a").generation == 3
    assert house.fates()[2] == [Fate.SERVING]


def test_both_generations_follow_the_scale_and_a_canary_that_crashed_is_told_of(
    house: House,
) -> None:
    serving(house)
    house.up("/models/b", canary=10)
    house.ready(2)
    house.do(house.fleet.scale("a", 2, "me"))
    assert sorted(each.generation for each in house.workers) == [1, 1, 2, 2]
    [told] = [line for line in house.do(house.fleet.records.why("a")).sentences if "canary" in line]
    assert "10 % of the requests" in told
    for _ in range(30):
        house.fleet.count(Observation("a", 1, 0, 200, "", 0.1, 0.0, None, Usage()))
        house.fleet.count(Observation("a", 2, 0, 500, "internal_error", 0.1, 0.0, None, Usage()))
        house.fleet.count(Observation("a", 2, 0, 499, "request_cancelled", 0.1, 0.0, None, Usage()))
    canary = house.fleet.deployment("a").canary
    assert canary is not None
    assert (canary.requests, canary.errors) == (60, 30)
    assert canary.reason == "50 % of its requests fail, 0 % of the others."


def test_the_number_of_replicas_follows_the_waiting(house: House) -> None:
    house.up("/models/a", max_replicas=3)
    house.ready(1)

    def wait(seconds: int, waited: float) -> int:
        for _ in range(seconds):
            house.fleet.count(Observation("a", 1, 0, 200, "", 1.0, waited, None, Usage()))
            house.reactor.advance(1)
            house.turn()
        return house.fleet.deployment("a").replicas

    assert wait(3, 0.1) == 1
    assert wait(3, 2.0) == 2
    # Until that one is there, nothing more.
    assert wait(5, 2.0) == 2
    house.ready(1)
    assert wait(4, 2.0) == 3
    house.ready(1)
    assert wait(70, 0.0) == 2
    told = [event.message for event in house.do(house.fleet.records.events("a", 0, 100))]
    assert "a goes from 1 to 2 of 1-3 replicas" in told
    assert house.do(house.fleet.scale("a", 1, "me")).replicas == 1


def test_a_new_generation_goes_on_with_as_many_as_have_room(house: House) -> None:
    house.up("/models/a", max_replicas=3)
    house.ready(1)
    for number in (2, 3):
        for _ in range(5):
            house.fleet.count(Observation("a", 1, 0, 200, "", 1.0, 2.0, None, Usage()))
            house.reactor.advance(1)
        house.turn()
        assert house.fleet.deployment("a").replicas == number
        house.ready(1)
    gib = 2**30
    house.available = 4 * gib
    house.up("/models/b", size=2 * gib, max_replicas=3)
    first = next(each for each in house.workers if each.generation == 2)
    assert isinstance(first, Answering)
    house.available = 2 * gib
    first.become(Phase.READY)
    house.turn()
    first.say()
    house.turn()
    assert house.fleet.deployment("a").stable == 1
    for _ in range(4):
        house.reactor.advance(1)
        house.turn()
    status = house.fleet.deployment("a")
    assert (status.generation, status.stable, status.replicas) == (2, None, 1)


def test_what_there_is_no_room_for_is_not_asked_for_all_the_time(house: House) -> None:
    house.up("/models/a", max_replicas=8)
    house.ready(1)
    house.available = 2**20
    for _ in range(30):
        house.fleet.count(Observation("a", 1, 0, 200, "", 1.0, 2.0, None, Usage()))
        house.reactor.advance(1)
    assert house.fleet.deployment("a").replicas == 1
    held = [
        event
        for event in house.do(house.fleet.records.events("a", 0, 100))
        if event.kind.endswith("held")
    ]
    assert len(held) == 1
    assert "of memory" in (held[0].cause or "")
