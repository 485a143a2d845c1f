from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest
from conftest import LoggedFailures
from fakes import RecordedSink

from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from tursi import wire
from tursi.errors import QueueFull
from tursi.model import Loaded, LoadOrder, Progress, Usage
from tursi.supervision.link import MAX_PROGRESS, MAX_STRUCTURED, WorkerLink
from tursi.wire import Ask, Decoder, End, Frame, Head, Hello, Kind, LastWords

HELLO = wire.encode(Kind.HELLO, 0, msgspec.msgpack.encode(Hello(1, 7, 8)))


class Owner:
    """Keeps what the link tells."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def hello(self, hello: Hello) -> None:
        self.told.append(hello)

    def progress(self, progress: Progress) -> None:
        self.told.append(progress)

    def ready(self, loaded: Loaded) -> None:
        self.told.append(loaded)

    def last_words(self, words: LastWords) -> None:
        self.told.append(words)

    def pong(self) -> None:
        self.told.append("pong")

    def idle(self) -> None:
        self.told.append("idle")

    def relieved(self) -> None:
        self.told.append("relieved")

    def broke(self, reason: str) -> None:
        self.told.append(reason)

    def lost(self) -> None:
        self.told.append("lost")


class Transport:
    """A socket that takes ``room`` bytes at a time, and Twisted's buffer in front of it."""

    def __init__(self) -> None:
        self.room = 1 << 30
        self.sent: list[bytes] = []
        self.buffer = b""
        self.aborted = False
        self.producer: Any = None

    def getHandle(self) -> Transport:  # noqa: N802 - Twisted's name
        return self

    def send(self, data: bytes) -> int:
        if self.room == 0:
            raise BlockingIOError
        taken = data[: self.room]
        self.room -= len(taken)
        self.sent.append(taken)
        return len(taken)

    def write(self, data: bytes) -> None:
        self.buffer += data

    def registerProducer(self, producer: Any, streaming: bool) -> None:  # noqa: N802 - the same
        assert not streaming
        self.producer = producer

    def abortConnection(self) -> None:  # noqa: N802 - Twisted's name
        self.aborted = True

    def writable(self) -> None:
        """The socket takes everything that waits."""
        self.room = 1 << 30
        data, self.buffer = self.buffer, b""
        self.sent.append(data)
        self.producer.resumeProducing()

    def frames(self) -> list[Frame]:
        """What has left so far."""
        sent, self.sent = b"".join(self.sent), []
        return list(Decoder().feed(sent))


class Linked:
    """A link with everything around it."""

    def __init__(self, max_requests: int = 4, max_bytes: int = 1000) -> None:
        self.clock = Clock()
        self.owner = Owner()
        self.transport = Transport()
        self.link = WorkerLink(
            self.owner,
            name="echo",
            reference="abc",
            max_requests=max_requests,
            max_bytes=max_bytes,
            clock=self.clock,
        )
        self.link.makeConnection(self.transport)

    def turn(self) -> list[Frame]:
        self.clock.advance(0)
        return self.transport.frames()

    def receive(self, *frames: bytes) -> None:
        self.link.dataReceived(b"".join(frames))

    def submit(self, body: bytes = b"{}") -> tuple[int, RecordedSink]:
        sink = RecordedSink()
        return self.link.submit(Ask("route", "r", "application/json", 5.0, body), sink), sink


def head(id_: int) -> bytes:
    body = wire.encode_head(Head(200, "application/json", {"Retry-After": "1"}))
    return wire.encode(Kind.HEAD, id_, body)


def end(id_: int, error: str = "") -> bytes:
    return wire.encode(Kind.END, id_, wire.encode_end(End(Usage(3, 4), error)))


def test_requests_of_a_turn_leave_in_one_write_and_answers_find_their_sinks() -> None:
    it = Linked()
    (one, first), (two, second) = it.submit(b"1"), it.submit(b"22")
    assert (it.link.in_flight, it.link.queued_bytes, it.transport.sent) == (2, 3, [])
    it.clock.advance(0)
    assert len(it.transport.sent) == 1
    frames = it.transport.frames()
    assert [(frame.kind, frame.id) for frame in frames] == [(Kind.REQUEST, 1), (Kind.REQUEST, 2)]
    assert wire.decode_ask(frames[1].body).body == b"22"
    it.receive(head(two), wire.encode(Kind.BODY, two, b"xy"), end(two), head(one))
    assert second.heads == [Head(200, "application/json", {"Retry-After": "1"})]
    assert second.pieces == [b"xy"]
    assert second.ends == [End(Usage(3, 4), "")]
    assert (it.link.in_flight, it.link.queued_bytes) == (1, 1)
    tokens = wire.encode_tokens([(one, b"a"), (99, b"of nobody"), (one, b"b")])
    it.receive(wire.encode(Kind.TOKENS, 0, tokens), end(one))
    assert (first.pieces, first.done) == ([b"a", b"b"], True)
    assert it.owner.told == ["idle", "idle"]


def test_answers_may_arrive_in_pieces_of_any_size() -> None:
    it = Linked()
    id_, sink = it.submit()
    for byte in head(id_) + wire.encode(Kind.BODY, id_, b"hello") + end(id_):
        it.receive(bytes([byte]))
    assert (sink.pieces, sink.done) == ([b"hello"], True)


def test_a_cancelled_request_is_heard_of_no_more() -> None:
    it = Linked()
    id_, sink = it.submit()
    it.receive(head(id_))
    it.link.cancel(id_)
    it.link.cancel(id_)
    assert [frame.kind for frame in it.turn()] == [Kind.REQUEST, Kind.CANCEL]
    it.receive(wire.encode(Kind.BODY, id_, b"late"), end(id_), head(id_))
    assert (sink.pieces, sink.done, sink.errors) == ([], False, [])
    assert (it.link.in_flight, it.link.queued_bytes) == (0, 0)
    assert it.owner.told == ["idle"]


def test_the_limits_refuse() -> None:
    it = Linked(max_requests=2, max_bytes=100)
    it.submit(b"x" * 150)
    with pytest.raises(QueueFull, match="as many bytes"):
        it.submit(b"x")
    other = Linked(max_requests=2)
    other.submit()
    other.submit()
    with pytest.raises(QueueFull, match="already holds 2 requests") as refused:
        other.submit()
    assert refused.value.retry_after == 1


def test_what_the_socket_does_not_take_waits_in_order_and_is_bounded() -> None:
    it = Linked(max_bytes=200)
    it.transport.room = 10
    id_, _ = it.submit(b"x" * 90)
    it.clock.advance(0)
    assert it.transport.buffer
    it.link.cancel(id_)
    later, _ = it.submit(b"y" * 90)
    it.link.cancel(later)
    # Nothing is in flight, but too much is unsent.
    with pytest.raises(QueueFull):
        it.submit()
    it.transport.writable()
    assert [frame.kind for frame in it.turn()] == [
        Kind.REQUEST, Kind.CANCEL, Kind.REQUEST, Kind.CANCEL,
    ]  # fmt: skip
    assert it.owner.told[-1] == "relieved"
    assert it.link.unsent == 0
    it.submit()


def test_a_full_socket_hands_everything_to_the_transport() -> None:
    it = Linked()
    it.transport.room = 0
    it.submit()
    it.clock.advance(0)
    assert it.transport.sent == []
    assert it.transport.buffer
    it.transport.writable()
    assert [frame.kind for frame in it.turn()] == [Kind.REQUEST]


def test_the_end_of_the_connection_fails_everything_at_once() -> None:
    it = Linked()
    sinks = [it.submit()[1] for _ in range(3)]
    it.link.connectionLost(Failure(ConnectionDone()))
    assert [(error.code, error.reference) for sink in sinks for error in sink.errors] == [
        ("worker_lost", "abc")
    ] * 3
    assert it.owner.told == ["lost"]
    assert it.link.in_flight == 0
    with pytest.raises(QueueFull):
        it.submit()
    assert it.turn() == []


def test_close_fails_everything_before_the_socket_is_gone() -> None:
    it = Linked()
    _, sink = it.submit()
    it.link.close()
    assert it.transport.aborted
    assert len(sink.errors) == 1
    it.link.close()
    it.link.connectionLost(Failure(ConnectionDone()))
    assert len(sink.errors) == 1


def test_what_the_worker_says_of_itself_is_passed_on() -> None:
    it = Linked()
    words = LastWords("weights_corrupt", "They are damaged.", "Traceback")
    loaded = Loaded("fill-mask", "cpu", "float32")
    it.link.ping()
    (ping,) = it.turn()
    it.receive(
        HELLO,
        wire.encode(Kind.PROGRESS, 0, msgspec.msgpack.encode(Progress("load", 1, 2))),
        wire.encode(Kind.READY, 0, msgspec.msgpack.encode(loaded)),
        wire.encode(Kind.PONG, ping.id),
        wire.encode(Kind.FAILED, 0, msgspec.msgpack.encode(words)),
    )
    assert it.owner.told == [Hello(1, 7, 8), Progress("load", 1, 2), loaded, "pong", words]
    order = LoadOrder("echo", "/model")
    it.link.load(order)
    (load,) = it.turn()
    assert msgspec.msgpack.decode(load.body, type=LoadOrder) == order
    assert ping.kind == Kind.PING


def wire_head(
    status: int = 200, content_type: str = "application/json", headers: dict[str, str] | None = None
) -> bytes:
    return wire.encode(Kind.HEAD, 1, wire.encode_head(Head(status, content_type, headers or {})))


def endless() -> bytes:
    return wire.encode(Kind.END, 1, wire.encode_end(End(Usage(queue_seconds=float("nan")), "")))


def test_a_flood_of_progress_is_passed_on_as_far_as_there_is_time() -> None:
    it = Linked()
    step = wire.encode(Kind.PROGRESS, 0, msgspec.msgpack.encode(Progress("load")))
    it.receive(HELLO, step * 10_000)
    assert len(it.owner.told) == 1 + MAX_PROGRESS
    it.clock.advance(1)
    it.receive(step)
    assert len(it.owner.told) == 2 + MAX_PROGRESS


BROKEN = {
    "garbage": (b"HTTP/1.1 200 OK\r\n\r\n", "a frame announces 1213486160 bytes"),
    "a frame of 2 GB": (b"\x80\0\0\0\x10" + bytes(8), "announces 2147483648 bytes"),
    "a frame without a kind": (b"\0\0\0\x01\x10" + bytes(8), "announces 1 bytes"),
    "no hello": (wire.encode(Kind.PONG, 1), "its first frame is of kind 24"),
    "two hellos": (HELLO + HELLO, "it said hello twice"),
    "an unreadable hello": (wire.encode(Kind.HELLO, 0, b"\xff"), "kind 16 can't be read"),
    "an unknown kind": (HELLO + wire.encode(99, 0), "unknown kind 99"),
    "a daemon's frame": (HELLO + wire.encode(Kind.LOAD, 0), "unknown kind 1"),
    "no head": (wire.encode(Kind.BODY, 1, b"x"), "an answer has no head"),
    "an end without a beginning": (end(1), "an answer has no head"),
    "two heads": (head(1) + head(1), "an answer begins twice"),
    "a short head": (wire.encode(Kind.HEAD, 1, b"\0"), "a HEAD frame can't be read"),
    "a short end": (head(1) + wire.encode(Kind.END, 1, b"\0"), "an END frame can't be read"),
    "cut tokens": (wire.encode(Kind.TOKENS, 0, bytes(9)), "a TOKENS frame can't be read"),
    "a status of its own": (wire_head(status=101), "an answer has the status 101"),
    "a header of its own": (wire_head(headers={"Set-Cookie": "a=b"}), "header 'Set-Cookie'"),
    "two headers in one": (wire_head(content_type="a/b\r\nX: y"), "the type 'a/b"),
    "a time that is no number": (head(1) + endless(), "an answer took nan s"),
    "a pong for nothing": (HELLO + wire.encode(Kind.PONG, 1), "that nobody has sent"),
    "too many tokens": (
        wire.encode(Kind.TOKENS, 0, wire.encode_tokens([(9, b"")] * (wire.MAX_PIECES + 1))),
        "more than 4096 pieces",
    ),
    "too large tokens": (
        wire.encode(Kind.TOKENS, 0, wire.encode_tokens([(9, bytes(MAX_STRUCTURED))])),
        "a frame of tokens has",
    ),
    "a model of no kind": (
        HELLO + wire.encode(Kind.READY, 0, msgspec.msgpack.encode(Loaded("x\n", "cpu", "y"))),
        "a model for 'x",
    ),
    "progress without end": (
        HELLO
        + wire.encode(Kind.PROGRESS, 0, msgspec.msgpack.encode(Progress("load", float("inf")))),
        "as far as inf",
    ),
    "much to say": (
        HELLO + wire.encode(Kind.PROGRESS, 0, bytes(MAX_STRUCTURED + 1)),
        "a frame of kind 17 has 1048577 bytes",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_protocol_closes_the_link_and_is_told_with_its_reason(case: str) -> None:
    data, reason = BROKEN[case]
    it = Linked()
    _, sink = it.submit()
    it.receive(data)
    assert it.transport.aborted
    assert it.owner.told[-1].startswith("the worker broke the protocol: ")
    assert reason in it.owner.told[-1]
    assert [error.code for error in sink.errors] == ["worker_lost"]
    told = list(it.owner.told)
    it.receive(HELLO)
    assert it.owner.told == told


def test_random_bytes_never_raise() -> None:
    for _ in range(200):
        it = Linked()
        it.submit()
        it.receive(os.urandom(64))


def test_an_answer_that_failed_before_its_head_fails_with_that_error() -> None:
    it = Linked()
    id_, sink = it.submit()
    it.receive(end(id_, "route_not_found"))
    assert [error.code for error in sink.errors] == ["route_not_found"]
    other, unknown = it.submit()
    it.receive(end(other, "no_such_code"))
    assert [error.code for error in unknown.errors] == ["internal_error"]


def test_a_body_larger_than_a_frame_is_refused_in_the_next_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME", 100)
    it = Linked()
    _, sink = it.submit(b"x" * 200)
    assert sink.errors == []
    assert it.turn() == []
    assert [error.code for error in sink.errors] == ["payload_too_large"]
    assert it.link.in_flight == 0


def test_a_sink_that_fails_costs_the_others_nothing(logged_failures: LoggedFailures) -> None:
    class Broken(RecordedSink):
        def body(self, data: bytes) -> None:
            raise RuntimeError("as told")

    it = Linked()
    broken = it.link.submit(Ask("route", "r", "text/plain", 5.0, b""), Broken())
    other, sink = it.submit()
    it.receive(head(broken), wire.encode(Kind.BODY, broken, b"x"), head(other), end(other))
    assert sink.done
    assert [frame.kind for frame in it.turn()][-1] == Kind.CANCEL
    assert len(logged_failures.flush(RuntimeError)) == 1
