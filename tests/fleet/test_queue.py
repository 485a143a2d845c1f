"""Routing and queueing, with replicas and a clock in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from twisted.internet.task import Clock

from tursi import wire
from tursi.config import Requests
from tursi.errors import (
    DeadlineExceeded,
    DeploymentUnavailable,
    ModelLoading,
    QueueFull,
    TursiError,
    WorkerLost,
)
from tursi.fleet.queue import RequestQueue, Work, shutting_down
from tursi.model import Crash, Phase, Usage
from tursi.supervision.link import Sink


@dataclass
class Recorder:
    """A sink that remembers what it was told."""

    said: list[object] = field(default_factory=list)

    def head(self, head: wire.Head) -> None:
        self.said.append(head)

    def body(self, data: bytes) -> None:
        self.said.append(data)

    def end(self, end: wire.End) -> None:
        self.said.append(end)

    def failed(self, error: TursiError) -> None:
        self.said.append(error)


@dataclass
class FakeReplica:
    """A worker that takes ``room`` requests and answers when told to."""

    room: int = 1
    phase: Phase = Phase.READY
    generation: int = 1
    asked: bool = False
    held: dict[int, tuple[wire.Ask, Sink]] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    count: int = 0

    @property
    def in_flight(self) -> int:
        return len(self.held)

    def submit(self, ask: wire.Ask, sink: Sink) -> int:
        if len(self.held) >= self.room:
            raise QueueFull
        self.count += 1
        self.held[self.count] = (ask, sink)
        return self.count

    def cancel(self, id: int) -> None:  # noqa: A002 - the real one's name
        del self.held[id]
        self.cancelled.append(id)

    def answer(self, id: int) -> None:  # noqa: A002 - the real one's name
        _, sink = self.held.pop(id)
        sink.head(wire.Head(200, "application/json", {}))
        sink.body(b"{}")
        sink.end(wire.End(Usage(prompt_tokens=3), ""))


class Bench:
    """A queue on fake replicas, with what it told the statistics."""

    def __init__(self, *replicas: FakeReplica, max_queued: int = 2) -> None:
        self.clock = Clock()
        self.replicas = list(replicas)
        self.refusal: TursiError | None = None
        self.finished: list[tuple[int, float]] = []
        self.crash: Crash | None = None
        self.poisoned: list[str] = []
        self.queue = RequestQueue(
            name="mini",
            clock=self.clock,
            settings=Requests(max_queued=max_queued, load_wait_seconds=60.0),
            workers=lambda: self.replicas,
            unavailable=lambda: self.refusal,
            stage=lambda: "loading, 40 %",
            crash=lambda: self.crash,
            finished=lambda status, seconds, end: self.finished.append((status, seconds)),
            poisoned=self.poisoned.append,
        )

    def submit(self, seconds: float = 600.0) -> Recorder:
        recorder = Recorder()
        self.queue.submit(work(seconds), recorder)
        return recorder


def work(seconds: float = 600.0) -> Work:
    return Work("openai.embeddings", "id", "application/json", b"{}", seconds)


def test_a_request_goes_straight_to_a_ready_replica_and_is_counted() -> None:
    replica = FakeReplica()
    bench = Bench(replica)
    recorder = bench.submit()
    ask, _ = replica.held[1]
    assert (ask.route, ask.body, ask.seconds) == ("openai.embeddings", b"{}", 600.0)
    bench.clock.advance(2)
    replica.answer(1)
    assert recorder.said[1:] == [b"{}", wire.End(Usage(prompt_tokens=3), "")]
    assert bench.finished == [(200, 2.0)]


def test_the_least_busy_replica_of_the_newest_ready_generation_is_chosen() -> None:
    old = FakeReplica(room=9, generation=1)
    busy, idle = FakeReplica(room=9, generation=2), FakeReplica(room=9, generation=2)
    loading = FakeReplica(room=9, generation=3, phase=Phase.LOADING)
    bench = Bench(old, busy, idle, loading)
    bench.submit()
    bench.submit()
    bench.submit()
    assert [one.in_flight for one in (old, busy, idle, loading)] == [0, 2, 1, 0]


def test_requests_wait_in_order_for_room_and_a_full_queue_refuses_with_retry_after() -> None:
    replica = FakeReplica(room=1)
    bench = Bench(replica, max_queued=2)
    bench.submit()
    second, third = bench.submit(), bench.submit()
    with pytest.raises(QueueFull) as refused:
        bench.submit()
    assert refused.value.retry_after == 1
    replica.answer(1)
    assert (replica.in_flight, bench.queue.waiting) == (1, 1)
    replica.answer(2)
    assert len(second.said) == 3
    assert third.said == []


def test_a_request_waits_for_a_load_and_is_then_dispatched() -> None:
    replica = FakeReplica(phase=Phase.LOADING)
    bench = Bench(replica)
    bench.submit()
    assert bench.queue.waiting == 1
    bench.clock.advance(20)
    replica.phase = Phase.READY
    bench.queue.pump()
    ask, _ = replica.held[1]
    assert ask.seconds == 580.0
    assert bench.clock.getDelayedCalls() == []


def test_a_load_that_takes_too_long_answers_503_with_its_stage() -> None:
    bench = Bench(FakeReplica(phase=Phase.LOADING))
    recorder = bench.submit()
    bench.clock.advance(60)
    [error] = recorder.said
    assert isinstance(error, ModelLoading)
    assert "loading, 40 %" in error.message
    assert error.retry_after == 5
    assert bench.queue.waiting == 0


def test_a_load_that_ends_late_leaves_the_request_its_whole_time() -> None:
    replica = FakeReplica(room=0, phase=Phase.LOADING)
    bench = Bench(replica)
    recorder = bench.submit(seconds=100)
    bench.clock.advance(59)
    replica.phase = Phase.READY
    bench.clock.advance(1)
    assert recorder.said == []
    bench.clock.advance(40)
    assert isinstance(recorder.said[0], DeadlineExceeded)


def test_waiting_is_refused_where_nothing_is_coming() -> None:
    replica = FakeReplica(phase=Phase.LOADING)
    bench = Bench(replica)
    waiting = bench.submit()
    bench.refusal = DeploymentUnavailable("broken")
    replica.phase = Phase.FAILED
    bench.queue.pump()
    assert waiting.said == [bench.refusal]
    with pytest.raises(DeploymentUnavailable):
        bench.submit()


def test_a_client_that_leaves_the_queue_frees_its_place() -> None:
    bench = Bench(FakeReplica(phase=Phase.LOADING))
    recorder = Recorder()
    bench.queue.submit(work(), recorder).cancel()
    assert bench.queue.waiting == 0
    assert bench.clock.getDelayedCalls() == []
    assert recorder.said == []


def test_a_client_that_leaves_mid_request_cancels_it_and_the_next_one_gets_its_place() -> None:
    replica = FakeReplica(room=1)
    bench = Bench(replica)
    first = bench.queue.submit(work(), Recorder())
    bench.submit()
    first.cancel()
    assert replica.cancelled == [1]
    assert list(replica.held) == [2]
    first.cancel()
    assert replica.cancelled == [1]


def test_closing_fails_what_waits_and_refuses_from_then_on() -> None:
    bench = Bench(FakeReplica(phase=Phase.LOADING))
    recorder = bench.submit()
    bench.queue.close(shutting_down())
    assert len(recorder.said) == 1
    for _ in range(2):
        with pytest.raises(TursiError) as refused:
            bench.submit()
        assert refused.value.retry_after == 5
