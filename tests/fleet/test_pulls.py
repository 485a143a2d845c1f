"""Pulls on a real store, with a hub that does as it is told."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fakes import InlineConnectionPool, InlineReactor
from hypothesis import given
from hypothesis import strategies as st

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from tursi import store
from tursi.errors import (
    FetchInterrupted,
    HubUnreachable,
    InvalidRequest,
    PullNotFound,
    RepositoryNotFound,
)
from tursi.fleet.journal import Journal
from tursi.fleet.pulls import Pulls, Rate
from tursi.model import Progress, PullState, PullStatus, Reference, Resolution, Trust
from tursi.store import Store

T = TypeVar("T")
NOW = 1_800_000_000.0
NOTHING = Trust()
FOUND = Resolution("/cache/a", commit="a" * 40, files=("config.json",), size=400)


class FakeHub:
    """Downloads that a test ends."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Deferred[Resolution], Any]] = []
        self.cancelled: list[str] = []
        self.trust: list[Trust] = []

    def resolve(self, reference: Reference, progress: Any, trust: Trust) -> Deferred[Resolution]:
        self.trust.append(trust)
        waiting: Deferred[Resolution] = Deferred(lambda _: self.cancelled.append(str(reference)))
        self.asked.append((str(reference), waiting, progress))
        return waiting


class Bench:
    """Pulls with everything around them in the test's hands."""

    def __init__(self, path: Path, hub: FakeHub) -> None:
        self.reactor = InlineReactor()
        self.hub = hub
        self.store = Store(path, self.reactor, pool=InlineConnectionPool)
        self.store.start()
        self.pulls = Pulls(
            store=self.store,
            hub=hub,  # type: ignore[arg-type] # a fake
            journal=Journal(self.store, self.now, self.reactor),
            reactor=self.reactor,
            now=self.now,
        )
        self.do(self.pulls.open())

    def now(self) -> float:
        return NOW + self.reactor.seconds()

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        outcome: list[T | Failure] = []
        Deferred.fromCoroutine(coroutine).addBoth(outcome.append)
        [result] = outcome
        if isinstance(result, Failure):
            result.raiseException()
        return result

    def start(self, model: str = "org/a", trust: Trust = NOTHING) -> PullStatus:
        return self.do(self.pulls.start(model, trust, "uid 0"))

    def state(self, number: int = 1) -> PullState:
        return self.do(self.pulls.one(number)).state

    def kinds(self) -> list[str]:
        found: list[Any] = []
        self.store.events(None, 0, 100).addCallback(found.extend)
        return [event.kind for event in found]

    def close(self) -> None:
        self.pulls.close()
        assert not self.reactor.getDelayedCalls()
        self.store.stop()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tursi.sqlite"
    store.prepare(path)
    return path


@pytest.fixture
def bench(path: Path) -> Iterator[Bench]:
    one = Bench(path, FakeHub())
    yield one
    one.close()


def broken(_: PullStatus) -> None:
    raise ZeroDivisionError


def test_a_pull_tells_how_it_goes_and_is_done(bench: Bench) -> None:
    status = bench.start()
    assert (status.id, status.state, status.asked_by) == (1, PullState.RUNNING, "uid 0")
    seen: list[PullStatus] = []
    bench.pulls.watch(1, seen.append)
    bench.pulls.watch(1, broken)
    (_, waiting, progress) = bench.hub.asked[0]
    for done in (0.0, 100.0, 200.0):
        progress(Progress("download", done, 400.0))
        bench.reactor.advance(1)
    assert (seen[-1].rate, seen[-1].remaining_seconds) == (100.0, 2.0)
    assert bench.do(bench.pulls.newest())[0] == seen[-1]
    assert bench.do(bench.pulls.one(1)) == seen[-1]
    waiting.callback(FOUND)
    assert (seen[-1].state, seen[-1].commit, seen[-1].size) == (PullState.DONE, "a" * 40, 400)
    assert bench.do(bench.pulls.one(1)) == seen[-1]
    assert seen[-1].ended_at == NOW + 3
    assert bench.kinds() == ["pull", "pull.done"]


@pytest.fixture(autouse=True)
def _expected(logged_failures: Any) -> Iterator[None]:
    yield
    logged_failures.flush(ZeroDivisionError)


def test_the_same_again_joins_and_something_else_does_not(bench: Bench) -> None:
    assert bench.start().id == bench.start().id
    assert bench.start("org/a@v2").id != bench.start("org/b").id
    assert [model for model, _, _ in bench.hub.asked] == ["org/a", "org/a@v2", "org/b"]
    with pytest.raises(InvalidRequest, match="folder"):
        bench.start("/models/a")
    with pytest.raises(InvalidRequest):
        bench.start("../a")


def test_pausing_keeps_it_and_resuming_goes_on(bench: Bench) -> None:
    bench.start()
    assert bench.do(bench.pulls.pause(1, "uid 0")).state is PullState.PAUSED
    assert bench.hub.cancelled == ["org/a"]
    assert bench.do(bench.pulls.pause(1, "uid 0")).state is PullState.PAUSED
    assert bench.do(bench.pulls.resume(1, "uid 0")).state is PullState.RUNNING
    bench.do(bench.pulls.resume(1, "uid 0"))
    assert len(bench.hub.asked) == 2
    bench.do(bench.pulls.pause(1, "uid 0"))
    # Asking for the model again goes on too.
    assert bench.start().id == 1
    assert len(bench.hub.asked) == 3
    assert bench.kinds() == [
        "pull", "pull.paused", "pull.running", "pull.paused", "pull.running",
    ]  # fmt: skip


def test_a_cancelled_pull_has_ended(bench: Bench) -> None:
    bench.start()
    assert bench.pulls.using("org/a")
    assert bench.do(bench.pulls.cancel(1, "uid 0")).state is PullState.CANCELLED
    assert bench.hub.cancelled == ["org/a"]
    assert not bench.pulls.using("org/a")
    for act in (bench.pulls.pause, bench.pulls.resume, bench.pulls.cancel):
        assert bench.do(act(1, "uid 0")).state is PullState.CANCELLED
    assert bench.start().id == 2
    for act in (bench.pulls.pause, bench.pulls.resume, bench.pulls.cancel):
        with pytest.raises(PullNotFound, match="tursi pulls"):
            bench.do(act(9, "uid 0"))


def test_a_hub_that_can_not_be_reached_is_tried_again_when_it_says_so(bench: Bench) -> None:
    bench.start()
    bench.hub.asked[0][1].errback(FetchInterrupted("It rests."))
    status = bench.do(bench.pulls.one(1))
    assert (status.state, status.error) == (PullState.RUNNING, "It rests.")
    assert status.next_try_at == NOW + 5
    bench.reactor.advance(5)
    bench.hub.asked[1][1].errback(HubUnreachable("Too often.", retry_after=90))
    assert bench.do(bench.pulls.one(1)).next_try_at == NOW + 95
    bench.reactor.advance(89)
    assert len(bench.hub.asked) == 2
    bench.reactor.advance(1)
    bench.hub.asked[2][1].callback(FOUND)
    assert bench.do(bench.pulls.one(1)).error is None
    assert bench.state() is PullState.DONE


def test_a_download_that_gets_on_is_soon_tried_again_however_often_it_breaks(
    bench: Bench,
) -> None:
    bench.start()
    waits = []
    for done in (0.0, 0.0, 100.0, 200.0, 200.0):
        _, waiting, progress = bench.hub.asked[-1]
        progress(Progress("download", done, 400.0))
        waiting.errback(FetchInterrupted("It broke."))
        again = bench.do(bench.pulls.one(1)).next_try_at
        assert again is not None
        waits.append(again - bench.now())
        bench.reactor.advance(waits[-1])
    assert waits == [5, 10, 5, 5, 10]


def test_what_trying_again_does_not_mend_has_failed(bench: Bench) -> None:
    bench.start()
    bench.hub.asked[0][1].errback(RepositoryNotFound("No such model."))
    status = bench.do(bench.pulls.one(1))
    assert (status.state, status.error) == (PullState.FAILED, "No such model.")
    assert bench.kinds() == ["pull", "pull.failed"]


def test_the_next_daemon_goes_on_with_what_had_not_ended(path: Path) -> None:
    before = Bench(path, FakeHub())
    for model in ("org/going", "org/paused", "org/done"):
        before.start(model)
    before.do(before.pulls.pause(2, "uid 0"))
    before.hub.asked[2][1].callback(FOUND)
    before.close()
    after = Bench(path, FakeHub())
    assert [model for model, _, _ in after.hub.asked] == ["org/going"]
    assert [each.state.value for each in after.do(after.pulls.newest())] == [
        "done", "paused", "running",
    ]  # fmt: skip
    after.close()


def test_what_is_asked_for_at_the_very_end_is_left_to_the_next_daemon(path: Path) -> None:
    one = Bench(path, FakeHub())
    one.start("org/a")
    one.do(one.pulls.pause(1, "uid 0"))
    one.pulls.close()
    assert one.start("org/b").state is PullState.RUNNING
    assert one.do(one.pulls.resume(1, "uid 0")).state is PullState.RUNNING
    assert [name for name, *_ in one.hub.asked] == ["org/a"]
    one.close()
    two = Bench(path, FakeHub())
    assert sorted(name for name, *_ in two.hub.asked) == ["org/a", "org/b"]
    two.close()


def test_what_may_come_besides_data_is_kept(path: Path) -> None:
    before = Bench(path, FakeHub())
    risky = Trust(allow_pickle=True)
    assert not before.start().allow_pickle
    assert before.start(trust=risky).allow_pickle
    assert before.start(trust=risky).id == 2
    before.pulls.close()
    before.store.stop()
    after = Bench(path, FakeHub())
    # Newest first, as they are stored.
    assert sorted(after.hub.trust, key=str) == [Trust(), risky]
    seen: list[Any] = []
    after.store.events(None, 0, 9).addCallback(seen.extend)
    assert [event.message for event in seen] == [
        "uid 0 pulls org/a",
        "uid 0 pulls org/a, pickle files allowed",
    ]
    after.close()


def test_nothing_that_comes_is_no_speed(bench: Bench) -> None:
    bench.start()
    seen: list[PullStatus] = []
    bench.pulls.watch(1, seen.append)
    (_, _, progress) = bench.hub.asked[0]
    for done in (0.0, 100.0, 200.0):
        progress(Progress("download", done, 400.0))
        bench.reactor.advance(0.5)
    told = len(seen)
    rates = []
    for _ in range(20):
        bench.reactor.advance(1)
        rates.append(seen[-1].rate)
    falling = [rate for rate in rates if rate is not None]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] <= 200
    assert (seen[-1].rate, seen[-1].remaining_seconds) == (0.0, None)
    # And then nobody is told the same for ever.
    assert 5 < len(seen) - told < 15
    progress(Progress("download", 300.0, 400.0))
    assert seen[-1].rate
    assert seen[-1].remaining_seconds is not None


@given(st.lists(st.tuples(st.floats(0.01, 30), st.floats(0, 1e9)), max_size=40))
def test_the_rate_is_never_negative_and_lies_within_what_was_seen(
    steps: list[tuple[float, float]],
) -> None:
    rate, now, done, rates = Rate(), 0.0, 0.0, []
    for seconds, more in steps:
        now, done = now + seconds, done + more
        rate.add(now, done)
        rates.append(more / seconds)
    value = rate.value(now)
    if len(steps) < 2:
        assert value is None
    else:
        assert value is not None
        assert min(rates[1:]) * 0.999 - 1e-6 <= value <= max(rates[1:]) * 1.001 + 1e-6
