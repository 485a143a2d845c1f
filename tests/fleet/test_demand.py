"""Deployments that requests load: how long they stay, and for whom they come."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_fleet import NOW, Bench, FakeWorker

from tursi import wire
from tursi.config import Configuration, Memory, Requests
from tursi.errors import HubUnreachable, ModelLoading, QueueFull, TursiError
from tursi.fleet import Work
from tursi.loading import Loading
from tursi.model import Load, Phase, Progress, Request, Schedule, Usage
from tursi.supervision.link import Sink

GIB = 1024**3


class Client:
    """Who waits for an answer."""

    def __init__(self) -> None:
        self.error: TursiError | None = None
        self.served = False

    def head(self, head: wire.Head) -> None:
        pass

    def body(self, data: bytes) -> None:
        pass

    def end(self, end: wire.End) -> None:
        self.served = True

    def failed(self, error: TursiError) -> None:
        self.error = error


class Bank(Bench):
    """With workers that take requests, and models of 1 GiB of which two have room."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.memory: dict[str, Any] = {
            "limit_bytes": 4 * GIB,
            "reserve_bytes": 0,
            "keep_alive_seconds": 60.0,
            "min_residency_seconds": 5.0,
            "max_wait_seconds": 30.0,
        }
        self.held: list[tuple[FakeWorker, Sink]] = []

    def begin(self) -> None:
        self.fleet.configure(Configuration(memory=Memory(**self.memory)))
        self.open()

    def make(self, **given: Any) -> FakeWorker:
        worker = super().make(**given)

        def submit(ask: object, sink: Sink) -> int:
            if worker.phase is not Phase.READY:
                raise QueueFull
            self.held.append((worker, sink))
            worker.in_flight += 1
            return len(self.held)

        worker.submit = submit  # type: ignore[method-assign,assignment] # what the test needs
        return worker

    def answer(self) -> None:
        """The oldest request is answered."""
        worker, sink = self.held.pop(0)
        worker.in_flight -= 1
        sink.head(wire.Head(200, "application/json", {}))
        sink.end(wire.End(Usage(), ""))
        self.turn()

    def answer_of(self, name: str) -> None:
        """The oldest request that a model has is answered."""
        [oldest, *_] = [each for each in self.held if each[0].deployment == name]
        self.held.remove(oldest)
        self.held.insert(0, oldest)
        self.answer()

    def lazy(self, name: str, keep_alive: float | None = None) -> FakeWorker:
        """A deployment that is loaded on demand, and is."""
        schedule = Schedule(Load.ON_DEMAND, keep_alive)
        request = Request(f"/models/{name}")
        self.do(self.fleet.deploy(name, request, 1, "uid 0", schedule))
        self.found(size=GIB, folder=f"/models/{name}")
        worker = self.workers[-1]
        assert at(worker) is Phase.SPAWNING, worker.phase
        worker.become(Phase.READY)
        self.turn()
        return worker

    def ask(self, name: str, keep_alive: float | None = None, seconds: float = 600.0) -> Client:
        client = Client()
        work = Work("r", "i", "", b"", seconds, keep_alive)
        client.ticket = self.fleet.submit(name, work, client)  # type: ignore[attr-defined]
        self.turn()
        return client

    def unload(self, name: str) -> None:
        self.do(self.fleet.unload(name, "uid 0"))
        self.gone(name)

    def gone(self, name: str) -> None:
        for worker in self.workers:
            if worker.deployment == name and at(worker) is Phase.DRAINING:
                worker.phase = Phase.STOPPED
                worker.stopped.callback(None)
        self.turn()

    def wait(self, seconds: float) -> None:
        for _ in range(int(seconds * 10)):
            self.reactor.advance(0.1)
        self.turn()

    def told(self, name: str) -> list[tuple[str, str]]:
        events = self.do(self.fleet.records.events(name, 0, 100))
        return [(each.kind, each.cause or "") for each in events if each.kind in {"load", "unload"}]


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[Bank]:
    one = Bank(tmp_path)
    one.begin()
    yield one
    for call in one.reactor.getDelayedCalls():
        call.cancel()
    one.store.stop()


def test_every_request_that_says_how_long_rewrites_it(bank: Bank) -> None:
    worker = bank.lazy("a")
    bank.ask("a", 10.0)
    assert bank.fleet.deployment("a").unloads_at is None, "it is busy"
    bank.wait(20)
    bank.answer()
    assert bank.fleet.deployment("a").unloads_at == NOW + 10
    bank.wait(5)
    # It says nothing, so that what was said before holds, from its end on.
    bank.ask("a")
    bank.answer()
    bank.wait(9)
    assert at(worker) is Phase.READY
    bank.ask("a", 3.0)
    bank.answer()
    assert bank.fleet.deployment("a").unloads_at == NOW + 3
    bank.wait(4)
    assert at(worker) is Phase.DRAINING
    bank.gone("a")
    # Once it has gone, nobody remembers.
    bank.ask("a")
    bank.workers[-1].become(Phase.READY)
    bank.answer()
    assert bank.fleet.deployment("a").unloads_at == NOW + 60


def test_nought_unloads_it_when_the_last_request_has_ended(bank: Bank) -> None:
    worker = bank.lazy("a")
    first, second = bank.ask("a", 0.0), bank.ask("a")
    bank.answer()
    bank.wait(1)
    assert (first.served, second.served, at(worker)) == (True, False, Phase.READY)
    bank.answer()
    bank.wait(1)
    assert at(worker) is Phase.DRAINING
    assert bank.told("a") == [("unload", "nobody uses it")]


def test_nought_of_whoever_has_it_loaded_counts_too(bank: Bank) -> None:
    bank.lazy("a")
    bank.unload("a")
    client = bank.ask("a", 0.0)
    bank.workers[-1].become(Phase.READY)
    bank.wait(2)
    assert at(bank.workers[-1]) is Phase.READY
    bank.answer()
    bank.wait(1)
    assert client.served
    assert at(bank.workers[-1]) is Phase.DRAINING


def test_what_is_pinned_is_neither_unloaded_nor_evicted(bank: Bank) -> None:
    pinned, other = bank.lazy("pinned"), bank.lazy("other")
    for worker in (pinned, other):
        bank.ask(worker.deployment, -1.0 if worker is pinned else None)
        bank.answer()
    bank.wait(40)
    bank.do(bank.fleet.deploy("c", Request("/models/c"), 1, "uid 0", Schedule(Load.ON_DEMAND)))
    bank.found(size=GIB)
    bank.turn()
    # It was used as lately as the other.
    assert (at(pinned), at(other)) == (Phase.READY, Phase.DRAINING)
    [(_, cause)] = bank.told("other")
    assert re.fullmatch(r"c needs about 1.* GiB of memory; nobody has used it for 40 s", cause)
    bank.gone("other")
    bank.workers[-1].become(Phase.READY)
    bank.wait(1000)
    assert at(pinned) is Phase.READY
    status = bank.fleet.deployment("pinned")
    assert (status.pinned, status.unloads_at) == (True, None)
    # Until another request says otherwise.
    bank.ask("pinned", 5.0)
    bank.answer()
    bank.wait(6)
    assert at(pinned) is Phase.DRAINING


def test_a_deployment_may_be_pinned_but_the_default_pins_nothing(bank: Bank) -> None:
    memory = Memory(**{**bank.memory, "keep_alive_seconds": -1.0})
    bank.fleet.configure(Configuration(memory=memory))
    pinned, other = bank.lazy("pinned", -1.0), bank.lazy("other")
    bank.wait(1000)
    assert (at(pinned), at(other)) == (Phase.READY, Phase.READY)
    bank.do(bank.fleet.deploy("c", Request("/models/c"), 1, "uid 0", Schedule(Load.ON_DEMAND)))
    bank.found(size=GIB)
    assert (at(pinned), at(other)) == (Phase.READY, Phase.DRAINING)


def test_a_refused_request_changes_nothing(bank: Bank) -> None:
    worker = bank.lazy("a")
    worker.submit = lambda ask, sink: _full()  # type: ignore[method-assign] # it takes nothing
    bank.fleet.configure(
        Configuration(memory=Memory(**bank.memory), requests=Requests(max_queued=1))
    )
    waiting = bank.ask("a")
    with pytest.raises(QueueFull):
        bank.ask("a", 0.0)
    waiting.ticket.cancel()  # type: ignore[attr-defined]
    bank.turn()
    assert bank.fleet.deployment("a").unloads_at == NOW + 60


def at(worker: FakeWorker) -> Phase:
    """Its phase, which the type checker takes for what it was a moment ago."""
    return worker.phase


def _full() -> int:
    raise QueueFull


def test_for_whom_it_does_not_matter_it_is_ignored(bank: Bank) -> None:
    bank.do(bank.fleet.deploy("a", Request("/models/a"), 1, "uid 0"))
    bank.found(size=GIB)
    bank.workers[-1].become(Phase.READY)
    bank.ask("a", 0.0)
    bank.answer()
    bank.wait(5)
    assert at(bank.workers[-1]) is Phase.READY


def test_what_nobody_waits_for_any_more_is_not_loaded_and_evicts_nobody(bank: Bank) -> None:
    for name in ("a", "b"):
        bank.lazy(name)
    bank.unload("a")
    bank.lazy("c")
    # Both have come just now, so that a has to wait.
    client = bank.ask("a")
    assert bank.fleet.deployment("a").phase is Phase.QUEUED
    client.ticket.cancel()  # type: ignore[attr-defined]
    bank.turn()
    bank.gone("a")
    assert bank.fleet.deployment("a").phase is Phase.STOPPED
    bank.wait(40)
    assert [bank.fleet.deployment(name).ready for name in "abc"] == [0, 1, 1]
    assert bank.told("a")[-1] == ("unload", "nobody waits for it any more")
    # The next request begins afresh, and what is cheapest goes for it.
    again = bank.ask("a")
    for name in "bc":
        bank.gone(name)
    bank.workers[-1].become(Phase.READY)
    bank.turn()
    bank.answer()
    assert again.served


def test_a_load_under_way_may_finish(bank: Bank) -> None:
    bank.lazy("a")
    bank.unload("a")
    client = bank.ask("a", seconds=5.0)
    worker = bank.workers[-1]
    worker.become(Phase.LOADING)
    bank.wait(6)
    assert isinstance(client.error, ModelLoading)
    assert at(worker) is Phase.LOADING
    worker.become(Phase.READY)
    bank.wait(30)
    assert at(worker) is Phase.READY


def test_who_deploys_or_loads_it_needs_no_request(bank: Bank) -> None:
    for name in ("a", "b"):
        bank.lazy(name)
    bank.unload("a")
    bank.lazy("c")
    bank.do(bank.fleet.load("a", "uid 0"))
    client = bank.ask("a")
    client.ticket.cancel()  # type: ignore[attr-defined]
    bank.wait(2)
    assert bank.fleet.deployment("a").phase is Phase.QUEUED
    bank.wait(5)
    for name in "bc":
        bank.gone(name)
    assert bank.fleet.deployment("a").phase is Phase.SPAWNING


def test_what_is_used_all_the_time_makes_room_in_turns(bank: Bank) -> None:
    busy = bank.lazy("busy")
    bank.lazy("other")
    bank.unload("other")
    bank.lazy("pinned", -1.0)
    # Room for one more, and that is always in use: each request comes before the last has ended.
    last = bank.ask("busy")
    waiting = bank.ask("other")
    assert bank.do(bank.fleet.records.why("other")).sentences[-1] == (
        "What has the memory stays: busy has requests, pinned is pinned."
    )
    for _ in range(28):
        assert (at(busy), bank.fleet.deployment("busy").queued) == (Phase.READY, 0)
        last = bank.ask("busy")
        bank.answer_of("busy")
        bank.wait(1)
    bank.wait(3)
    # Who has waited for as long as that needn't wait for ever: nothing new comes to it,
    late = bank.ask("busy")
    assert bank.fleet.deployment("busy").queued == 1
    assert outlook(bank, "busy").stage == "memory"
    assert at(busy) is Phase.READY
    while busy.in_flight:
        bank.answer_of("busy")
    # and what it had is answered before it goes.
    assert (last.served, at(busy)) == (True, Phase.DRAINING)
    bank.gone("busy")
    [other] = [each for each in bank.workers if each.phase is Phase.SPAWNING]
    assert other.deployment == "other"
    other.become(Phase.READY)
    bank.turn()
    bank.answer_of("other")
    assert waiting.served
    # Whoever waited goes on waiting, and its turn comes.
    assert late.error is None
    bank.wait(10)
    bank.gone("other")
    [again] = [each for each in bank.workers if each.phase is Phase.SPAWNING]
    again.become(Phase.READY)
    bank.turn()
    bank.answer_of("busy")
    assert late.served


def test_an_answered_request_converges_nothing(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank.lazy("a")
    count = 0
    convergence = bank.fleet._convergence
    real = convergence._converge

    def converge() -> None:
        nonlocal count
        count += 1
        real()

    monkeypatch.setattr(convergence, "_converge", converge)
    for _ in range(100):
        bank.ask("a")
        bank.answer()
    assert count == 0
    bank.wait(61)
    assert at(bank.workers[0]) is Phase.DRAINING
    assert count < 10


# -- what those are told who wait in vain ------------------------------------------------


def outlook(bank: Bank, name: str) -> Loading:
    """What a request is told that gives up at once."""
    client = bank.ask(name, seconds=0.0)
    bank.reactor.advance(1)
    assert isinstance(client.error, ModelLoading), client.error
    assert client.error.loading is not None
    return client.error.loading


def test_a_download_tells_by_its_rate(bank: Bank) -> None:
    bank.do(bank.fleet.deploy("a", Request("org/a"), 1, "uid 0", Schedule(Load.ON_DEMAND)))
    assert outlook(bank, "a") == Loading("fetching", None, None, 1)
    [(_, _, advanced)] = bank.hub.asked
    for done in (0.0, 25.0, 50.0):
        advanced(Progress("download", done, 200.0))
        bank.reactor.advance(1)
    # 150 bytes at 25 a second, and a load of which nobody knows yet how long it takes.
    assert outlook(bank, "a") == Loading("fetching", 0.25, 16.0, 1)


def test_a_hub_that_can_not_be_reached_tells_nothing(bank: Bank) -> None:
    bank.do(bank.fleet.deploy("a", Request("org/a"), 1, "uid 0", Schedule(Load.ON_DEMAND)))
    bank.not_found(HubUnreachable("The hub can't be reached."))
    assert outlook(bank, "a") == Loading("backoff", None, None, 1)


def test_a_load_tells_by_the_last_one(bank: Bank) -> None:
    bank.lazy("a")
    bank.unload("a")
    waiting = bank.ask("a")
    worker = bank.workers[-1]
    assert outlook(bank, "a") == Loading("spawning", None, 10.0, 2)
    bank.fleet._members["a"].load_seconds = 4.0
    worker.become(Phase.LOADING)
    assert outlook(bank, "a") == Loading("loading", None, 3.0, 2)
    assert waiting.error is None


def test_who_waits_for_a_slot_or_for_memory_is_told_so(bank: Bank) -> None:
    for name in "abcd":
        bank.lazy(name)
        bank.unload(name)
    for name in "abcd":
        bank.fleet._members[name].load_seconds = 8.0
    for name in "abcd":
        bank.ask(name)
    # Two load, in the memory that there is, and the others have to wait until they may go.
    assert [outlook(bank, name).stage for name in "abcd"] == ["spawning"] * 2 + ["memory"] * 2
    told = outlook(bank, "c")
    assert (told.eta_seconds, told.position) == (None, 2), "whatever loads can't go"
    for worker in bank.workers[-4:-2]:
        worker.become(Phase.READY)
    bank.turn()
    while bank.held:
        bank.answer()
    bank.wait(1)
    # They stay for 5 s; then c comes.
    told = outlook(bank, "c")
    assert told.stage == "memory"
    assert told.eta_seconds == pytest.approx(4 + 8, abs=1.2)


def test_back_off_is_waited_for_too(bank: Bank) -> None:
    bank.lazy("a")
    bank.unload("a")
    bank.ask("a")
    worker = bank.workers[-1]
    worker.next_try_at = NOW + 7
    worker.become(Phase.BACKOFF, "it has crashed")
    assert outlook(bank, "a") == Loading("backoff", None, 17.0, 2)


def test_what_was_loaded_by_hand_is_there_again_after_a_restart(bank: Bank, tmp_path: Path) -> None:
    def deploy(name: str, load: Load) -> None:
        bank.do(
            bank.fleet.deploy(name, Request(f"/models/{name}"), 1, "uid 0", schedule=Schedule(load))
        )

    for name in ("kept", "unloaded", "loaded", "stopped", "asked"):
        deploy(name, Load.ON_DEMAND if name == "asked" else Load.MANUAL)
    for name in ("unloaded", "loaded", "stopped"):
        bank.do(bank.fleet.unload(name, "uid 0"))
    bank.do(bank.fleet.load("loaded", "uid 0"))
    bank.do(bank.fleet.stop("stopped", "uid 0"))
    bank.do(bank.fleet.start("stopped", "uid 0"))
    bank.do(bank.fleet.load("asked", "uid 0"))
    after = Bank(tmp_path)
    after.begin()
    wanted = {reference.folder for reference, _, _ in after.hub.asked}
    for call in after.reactor.getDelayedCalls():
        call.cancel()
    after.store.stop()
    assert wanted == {"/models/kept", "/models/loaded", "/models/stopped"}
