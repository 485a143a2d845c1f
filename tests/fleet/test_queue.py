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
    PoisonRequest,
    QueueFull,
    TursiError,
    WorkerLost,
)
from tursi.fleet.passage import Work
from tursi.fleet.queue import CAUSE_SECONDS, RequestQueue, shutting_down
from tursi.fleet.routing import Routing
from tursi.loading import Loading
from tursi.model import (
    Caller,
    Crash,
    Deployment,
    Desired,
    FailureClass,
    Generation,
    Phase,
    Request,
    Usage,
)
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

    def die(self, life: str) -> None:
        """End with everything that it holds."""
        self.phase = Phase.STOPPING
        lost = list(self.held.values())
        self.held.clear()
        for _, sink in lost:
            sink.failed(WorkerLost("gone", reference=life))

    def answer(self, id: int) -> None:  # noqa: A002 - the real one's name
        _, sink = self.held.pop(id)
        sink.head(wire.Head(200, "application/json", {}))
        sink.body(b"{}")
        sink.end(wire.End(Usage(prompt_tokens=3), ""))


def deployment(number: int, *, stable: int | None = None, canary: int | None = None) -> Deployment:
    def generation(number: int) -> Generation:
        return Generation(number, Request("/models/mini"), 0.0, "me")

    return Deployment(
        "mini",
        Desired.RUNNING,
        1,
        generation(number),
        0.0,
        0.0,
        stable=None if stable is None else generation(stable),
        canary=canary,
    )


class Bench:
    """A queue on fake replicas, with when it told of ends."""

    def __init__(self, *replicas: FakeReplica, max_queued: int = 2) -> None:
        self.clock = Clock()
        self.replicas = list(replicas)
        self.refusal: TursiError | None = None
        self.finished: list[float] = []
        self.crash: Crash | None = None
        self.eta: float | None = None
        self.poisoned: list[str] = []
        self.routing = Routing(deployment(1), lambda: 0.5)
        self.queue = RequestQueue(
            name="mini",
            clock=self.clock,
            settings=Requests(max_queued=max_queued, load_wait_seconds=60.0),
            workers=lambda: self.replicas,
            routing=self.routing,
            unavailable=lambda: self.refusal,
            stage=lambda: "loading, 40 %",
            outlook=lambda position: Loading("loading", 0.4, self.eta, position),
            crash=lambda: self.crash,
            finished=lambda: self.finished.append(self.clock.seconds()),
            poisoned=self.poisoned.append,
        )

    def submit(
        self, seconds: float = 600.0, body: bytes = b"{}", key: int | None = None
    ) -> Recorder:
        recorder = Recorder()
        self.queue.submit(work(seconds, body, key), recorder)
        return recorder

    def come_up(self, *replicas: FakeReplica) -> None:
        for replica in replicas:
            replica.phase = Phase.READY
        self.queue.pump()

    def identify(self, life: str, number: int) -> None:
        """It has been found out why that life ended."""
        self.queue.crashed(crash(life, number))


def crash(life: str, number: int) -> Crash:
    return Crash(
        id=number,
        deployment="mini",
        generation=1,
        replica=0,
        worker=life,
        at=0.0,
        failure=FailureClass.CRASH,
        reason="crashed with signal 11 (SIGSEGV)",
        phase=Phase.READY,
        spawned_at=0.0,
    )


def work(seconds: float = 600.0, body: bytes = b"{}", key: int | None = None) -> Work:
    caller = Caller(key=key)
    return Work("openai.embeddings", "id", "application/json", body, seconds, caller=caller)


def bodies(replica: FakeReplica) -> list[bytes]:
    return [ask.body for ask, _ in replica.held.values()]


def test_nobody_waits_for_what_is_tried_again_only_later() -> None:
    bench = Bench(FakeReplica(phase=Phase.BACKOFF))
    bench.eta = 60.0
    waits = [bench.submit(), bench.submit()]
    bench.eta = 300.0
    # Nor does whoever waits lose the place to one that doesn't.
    with pytest.raises(ModelLoading) as refused:
        bench.submit(key=1)
    assert (refused.value.retry_after, bench.queue.waiting) == (300, 2)
    assert [each.said for each in waits] == [[], []]


def test_who_waits_in_vain_is_told_how_far_the_model_is_and_when_to_come_again() -> None:
    bench = Bench(FakeReplica(phase=Phase.LOADING))
    first, second = bench.submit(seconds=70.0), bench.submit(seconds=10.0)
    bench.eta = 17.2
    with pytest.raises(QueueFull) as refused:
        bench.submit()
    assert refused.value.loading == Loading("loading", 0.4, 17.2, 3)
    assert refused.value.retry_after == 18
    bench.clock.advance(10)
    [late] = second.said
    assert isinstance(late, ModelLoading)
    assert (late.loading, late.retry_after) == (Loading("loading", 0.4, 17.2, 2), 18)
    bench.eta = None
    bench.clock.advance(50)
    [late] = first.said
    assert isinstance(late, ModelLoading)
    assert (late.loading, late.retry_after) == (Loading("loading", 0.4, None, 1), 5)


def test_a_full_queue_of_a_model_that_is_there_tells_of_no_load() -> None:
    bench = Bench(FakeReplica(room=0), max_queued=1)
    bench.submit()
    with pytest.raises(QueueFull) as refused:
        bench.submit()
    assert (refused.value.loading, refused.value.retry_after) == (None, 1)


def test_a_request_goes_straight_to_a_ready_replica_and_is_counted() -> None:
    replica = FakeReplica()
    bench = Bench(replica)
    recorder = bench.submit()
    ask, _ = replica.held[1]
    assert (ask.route, ask.body, ask.seconds) == ("openai.embeddings", b"{}", 600.0)
    bench.clock.advance(2)
    replica.answer(1)
    assert recorder.said[1:] == [b"{}", wire.End(Usage(prompt_tokens=3), "")]
    assert bench.finished == [2.0]


def test_a_request_knows_how_long_it_waited_and_whose_it_became() -> None:
    replica = FakeReplica(generation=3, phase=Phase.LOADING)
    bench = Bench(replica)
    passage = bench.queue.submit(work(), Recorder())
    bench.clock.advance(4)
    assert (passage.waited, passage.generation) == (0.0, 0)
    bench.come_up(replica)
    bench.clock.advance(2)
    replica.answer(1)
    assert (passage.waited, passage.generation) == (4.0, 3)


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


def test_a_key_that_floods_the_queue_takes_no_turn_and_no_place_from_another() -> None:
    replica = FakeReplica(room=1, phase=Phase.LOADING)
    bench = Bench(replica, max_queued=4)
    flood = [bench.submit(body=b"%d" % number, key=1) for number in range(4)]
    with pytest.raises(QueueFull):
        bench.submit(key=1)
    other = bench.submit(body=b"other", key=2)
    [refused] = flood[3].said
    assert isinstance(refused, QueueFull)
    assert bench.queue.waiting == 4
    bench.come_up(replica)
    assert bodies(replica) == [b"0"]
    replica.answer(1)
    assert bodies(replica) == [b"other"]
    replica.answer(2)
    [head, *_] = other.said
    assert isinstance(head, wire.Head)
    assert head.headers == {"X-Queue-Position": "2"}, "the place that it had when it came"


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


# -- generations -------------------------------------------------------------------------


def test_what_has_served_gets_everything_until_the_new_one_has_taken_over() -> None:
    old, new = FakeReplica(room=9), FakeReplica(room=9, generation=2)
    bench = Bench(old, new)
    bench.routing.adopt(deployment(2, stable=1))
    for _ in range(3):
        bench.submit()
    assert (old.in_flight, new.in_flight) == (3, 0)
    bench.routing.adopt(deployment(2))
    bench.submit()
    assert (old.in_flight, new.in_flight) == (3, 1)


def test_a_canary_gets_its_share_only_while_both_are_ready() -> None:
    old, new = FakeReplica(room=1000), FakeReplica(room=1000, generation=2)
    bench = Bench(old, new)
    bench.routing.adopt(deployment(2, stable=1, canary=20))
    new.phase = Phase.LOADING
    for _ in range(50):
        bench.submit()
    assert (old.in_flight, new.in_flight) == (50, 0)
    new.phase = Phase.READY
    for _ in range(50):
        bench.submit()
    assert (old.in_flight, new.in_flight) == (90, 10)
    old.phase = Phase.BACKOFF
    bench.submit()
    assert new.in_flight == 11
    bench.routing.adopt(deployment(2, stable=1, canary=0))
    bench.submit()
    assert (new.in_flight, bench.queue.waiting) == (11, 1)


def test_a_full_canary_leaves_its_turn_to_the_others() -> None:
    old, new = FakeReplica(room=1000), FakeReplica(room=3, generation=2)
    bench = Bench(old, new)
    bench.routing.adopt(deployment(2, stable=1, canary=50))
    for _ in range(20):
        bench.submit()
    assert (old.in_flight, new.in_flight) == (17, 3)


def test_what_a_canary_dies_of_goes_to_what_has_served_and_says_so() -> None:
    old, new = FakeReplica(room=9), FakeReplica(room=9, generation=2)
    bench = Bench(old, new)
    bench.routing.adopt(deployment(2, stable=1, canary=100))
    recorder = bench.submit()
    assert new.in_flight == 1
    new.die("life")
    new.phase = Phase.READY
    [id_] = old.held
    old.answer(id_)
    head, *_ = recorder.said
    assert isinstance(head, wire.Head)
    assert head.headers == {"x-tursi-generation": "1"}


# -- lost workers ------------------------------------------------------------------------


def test_a_lost_request_goes_to_another_replica_at_once() -> None:
    first, second = FakeReplica(), FakeReplica()
    bench = Bench(first, second)
    recorder = bench.submit()
    bench.clock.advance(1)
    first.die("a")
    assert recorder.said == []
    ask, _ = second.held[1]
    assert (ask.body, ask.seconds) == (b"{}", 599.0)
    second.answer(1)
    assert len(recorder.said) == 3
    assert bench.finished == [1.0]


def test_a_lost_request_waits_for_the_restart_before_all_others_and_within_its_time() -> None:
    replica = FakeReplica(room=1)
    bench = Bench(replica, max_queued=1)
    lost = bench.submit(seconds=30)
    later = bench.submit(body=b"[]")
    bench.clock.advance(10)
    replica.die("a")
    # It takes nobody's place in the queue.
    assert bench.queue.waiting == 2
    bench.clock.advance(5)
    bench.come_up(replica)
    assert bodies(replica) == [b"{}"]
    replica.answer(2)
    assert len(lost.said) == 3
    assert bodies(replica) == [b"[]"]
    assert later.said == []
    waits = bench.submit(seconds=30)
    replica.die("b")
    bench.clock.advance(30)
    assert isinstance(waits.said[0], ModelLoading)


def test_who_waits_after_a_crash_is_told_of_it() -> None:
    replica = FakeReplica()
    bench = Bench(replica)
    recorder = bench.submit()
    replica.die("a")
    bench.crash = crash("a", 4)
    bench.clock.advance(60)
    [error] = recorder.said
    assert isinstance(error, ModelLoading)
    assert error.reference == "4"
    assert "crashed with signal 11 (SIGSEGV), crash 4" in error.message


def test_a_second_death_is_told_with_its_cause_once_that_is_known() -> None:
    first, second = FakeReplica(), FakeReplica()
    bench = Bench(first, second)
    recorder = bench.submit()
    first.die("a")
    second.die("b")
    assert recorder.said == []
    bench.identify("a", 1)
    assert recorder.said == []
    bench.identify("b", 2)
    [error] = recorder.said
    assert isinstance(error, WorkerLost)
    assert "crashed with signal 11 (SIGSEGV) (crash 2, `tursi crashes mini 2`" in error.message
    assert "refused for an hour" in error.message
    assert error.reference == "2"
    assert bench.finished == [0.0]
    assert bench.clock.getDelayedCalls() == []


def test_the_cause_isnt_waited_for_longer_than_it_is_worth() -> None:
    replica = FakeReplica()
    bench = Bench(replica)
    recorder = bench.submit()
    _, sink = replica.held[1]
    sink.head(wire.Head(200, "text/event-stream", {}))
    sink.body(b"data: 1")
    replica.die("a")
    bench.clock.advance(CAUSE_SECONDS)
    assert isinstance(recorder.said[2], WorkerLost)
    assert recorder.said[2].reference is None
    bench.identify("a", 1)
    assert len(recorder.said) == 3


def test_an_answer_of_which_no_byte_has_left_begins_afresh() -> None:
    first, second = FakeReplica(), FakeReplica()
    bench = Bench(first, second)
    recorder = bench.submit()
    _, sink = first.held[1]
    sink.head(wire.Head(200, "text/event-stream", {}))
    first.die("a")
    second.answer(1)
    assert [type(one) for one in recorder.said] == [wire.Head, bytes, wire.End]


def test_a_client_that_leaves_while_the_cause_is_looked_for_is_counted_once() -> None:
    first, second = FakeReplica(), FakeReplica()
    bench = Bench(first, second)
    recorder = Recorder()
    passage = bench.queue.submit(work(), recorder)
    first.die("a")
    second.die("b")
    passage.cancel()
    bench.identify("b", 1)
    assert recorder.said == []
    assert bench.finished == [0.0]
    assert bench.clock.getDelayedCalls() == []


def test_who_was_asked_to_end_throws_no_suspicion_and_the_request_is_sent_again() -> None:
    first, second = FakeReplica(asked=True), FakeReplica(asked=True)
    bench = Bench(first, second)
    recorder = bench.submit()
    first.die("a")
    assert second.in_flight == 1
    second.die("b")
    assert isinstance(recorder.said[0], WorkerLost)
    third = FakeReplica()
    bench.replicas.append(third)
    bench.submit()
    assert third.in_flight == 1


def test_a_closed_queue_sends_nothing_again() -> None:
    first, second = FakeReplica(), FakeReplica()
    bench = Bench(first, second)
    recorder, begun = bench.submit(), bench.submit(body=b"[]")
    _, sink = second.held[1]
    sink.body(b"data: 1")
    second.die("b")
    bench.queue.close(shutting_down())
    assert isinstance(begun.said[1], WorkerLost)
    first.die("a")
    assert isinstance(recorder.said[0], WorkerLost)
    assert bench.clock.getDelayedCalls() == []


# -- poison ------------------------------------------------------------------------------


def test_suspects_are_alone_one_after_the_other_while_others_are_served_elsewhere() -> None:
    first, second = FakeReplica(room=9), FakeReplica(room=9)
    bench = Bench(first, second, max_queued=9)
    recorders = [bench.submit(body=body) for body in (b"1", b"2", b"3", b"4")]
    assert (bodies(first), bodies(second)) == ([b"1", b"3"], [b"2", b"4"])
    first.die("a")
    # The second one gets nothing new until it is idle.
    bench.submit(body=b"5")
    assert bodies(second) == [b"2", b"4"]
    second.answer(1)
    second.answer(2)
    assert bodies(second) == [b"1"]
    first.phase = Phase.READY
    bench.queue.pump()
    assert bodies(first) == [b"5"]
    bench.submit(body=b"6")
    assert (bodies(first), bodies(second)) == ([b"5", b"6"], [b"1"])
    second.answer(3)
    assert bodies(second) == [b"3"]
    second.answer(4)
    bench.submit(body=b"7")
    assert bodies(second) == [b"7"]
    assert [len(one.said) for one in recorders] == [3] * 4


def test_poison_is_refused_and_those_beside_it_are_answered() -> None:
    replica = FakeReplica(room=9)
    bench = Bench(replica, max_queued=9)
    innocent = bench.submit(body=b"innocent")
    poison = bench.submit(body=b"poison!!")
    other = bench.submit(body=b"another!")
    replica.die("a")
    bench.identify("a", 1)
    bench.come_up(replica)
    replica.answer(4)
    assert bodies(replica) == [b"poison!!"]
    twin = bench.submit(body=b"poison!!")
    assert bench.poisoned == []
    replica.die("b")
    assert bench.poisoned == ["id"]
    bench.identify("b", 2)
    assert isinstance(poison.said[0], WorkerLost)
    bench.come_up(replica)
    assert isinstance(twin.said[0], PoisonRequest)
    assert bodies(replica) == [b"another!"]
    replica.answer(6)
    assert [len(one.said) for one in (innocent, other)] == [3, 3]
    with pytest.raises(PoisonRequest) as refused:
        bench.submit(body=b"poison!!")
    assert refused.value.reference == "2"
    assert "(crashes 1 and 2)" in refused.value.message
    assert "another 60 min" in refused.value.message
    # An innocent one has been cleared: a later death makes it no poison.
    bench.submit(body=b"innocent")
    replica.die("c")
    bench.come_up(replica)
    assert bodies(replica) == [b"innocent"]
    bench.clock.advance(3600)
    bench.queue.forgive()
    bench.submit(body=b"poison!!")


def test_what_is_forgiven_is_served_like_any_other() -> None:
    first, second = FakeReplica(room=9), FakeReplica(room=9)
    bench = Bench(first, second)
    bench.submit()
    first.die("a")
    second.die("b")
    bench.come_up(first)
    with pytest.raises(PoisonRequest):
        bench.submit()
    bench.queue.forgive()
    bench.submit()
    assert first.in_flight == 1


def test_a_suspect_that_leaves_gives_the_others_their_worker_back() -> None:
    replica = FakeReplica(room=9)
    bench = Bench(replica, max_queued=9)
    passage = bench.queue.submit(work(body=b"1"), Recorder())
    replica.die("a")
    replica.phase = Phase.READY
    busy = FakeReplica(room=0)
    bench.replicas.append(busy)
    bench.queue.pump()
    assert bodies(replica) == [b"1"]
    bench.submit(body=b"2")
    assert bench.queue.waiting == 1
    passage.cancel()
    assert bodies(replica) == [b"2"]


def test_a_suspect_that_gives_up_waiting_gives_the_worker_back_too() -> None:
    first, second = FakeReplica(room=9), FakeReplica(room=9)
    bench = Bench(first, second, max_queued=9)
    bench.submit(body=b"1", seconds=10)
    bench.submit(body=b"2")
    first.die("a")
    bench.submit(body=b"3")
    assert bodies(second) == [b"2"]
    bench.clock.advance(10)
    assert bodies(second) == [b"2", b"3"]
