"""The daemon's end of one worker's data socket."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import msgspec
from zope.interface import implementer

from twisted.internet import protocol
from twisted.internet.interfaces import IFileDescriptorReceiver, IPullProducer
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi import claims, wire
from tursi.errors import InternalError, PayloadTooLarge, QueueFull, TursiError, WorkerLost, by_code
from tursi.heartbeat import Reader
from tursi.lifecycle.inputs import Clock
from tursi.model import Loaded, LoadOrder, Progress
from tursi.wire import Ask, End, Head, Hello, Kind, LastWords, WireError

log = Logger()

MAX_STRUCTURED = 1024 * 1024
"""Bytes of a frame that isn't part of an answer."""
MAX_PROGRESS = 100
"""Steps of loading that are passed on in a second; more would keep the daemon from its work."""
RETRY_SECONDS = 1

_HEAD, _BODY, _TOKENS, _END = int(Kind.HEAD), int(Kind.BODY), int(Kind.TOKENS), int(Kind.END)
_HELLO = msgspec.msgpack.Decoder(Hello)
_PROGRESS = msgspec.msgpack.Decoder(Progress)
_LOADED = msgspec.msgpack.Decoder(Loaded)
_LAST_WORDS = msgspec.msgpack.Decoder(LastWords)


class Sink(Protocol):
    """Where an answer goes; exactly one of ``end`` and ``failed`` ends every request."""

    def head(self, head: Head) -> None:
        """The answer begins."""

    def body(self, data: bytes) -> None:
        """It goes on."""

    def end(self, end: End) -> None:
        """It is complete, or as complete as it will be."""

    def failed(self, error: TursiError) -> None:
        """The worker was lost, or refused the request."""


class Owner(Protocol):
    """Who looks after the worker at the other end."""

    def hello(self, hello: Hello) -> None:
        """The worker's first words."""

    def progress(self, progress: Progress) -> None:
        """Loading has come that far."""

    def ready(self, loaded: Loaded) -> None:
        """The model can serve."""

    def last_words(self, words: LastWords) -> None:
        """The worker is about to exit."""

    def pong(self) -> None:
        """It has answered a PING."""

    def idle(self) -> None:
        """A request has ended; perhaps none is in flight."""

    def relieved(self) -> None:
        """The socket takes requests again after some were refused for what is unsent."""

    def broke(self, reason: str) -> None:
        """It broke the protocol; the link has closed itself."""

    def lost(self) -> None:
        """The socket has closed, by whatever cause."""


class _Pending:
    """One request that the worker holds."""

    __slots__ = ("begun", "request_id", "sink", "size")

    def __init__(self, sink: Sink, size: int, request_id: str) -> None:
        self.sink = sink
        self.size = size
        self.request_id = request_id
        self.begun = False


@implementer(IPullProducer, IFileDescriptorReceiver)
class WorkerLink(protocol.Protocol):
    """Many requests over one socket; every one of them ends, whatever the worker does.

    Reading never pauses, so the worker's blocking write is its back-pressure.
    Towards the worker at most ``max_requests`` requests with ``max_bytes`` bytes of
    bodies are in flight, and as many bytes unsent.
    """

    transport: Any

    def __init__(
        self,
        owner: Owner,
        *,
        name: str,
        reference: str,
        max_requests: int,
        max_bytes: int,
        clock: Clock,
    ) -> None:
        """``name`` is the deployment's, ``reference`` the life's: errors name both."""
        self._owner = owner
        self._name = name
        self._reference = reference
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._clock = clock
        self._decoder = wire.Decoder()
        self._pending: dict[int, _Pending] = {}
        self._next_id = 0
        self._pings = 0
        self._steps = 0
        self._steps_since = 0.0
        self._greeted = False
        self._open = False
        self._out: list[bytes] = []
        self._scheduled = False
        self._blocked = False
        self._refused = False
        self.page: Reader | None = None
        """The worker's heartbeat, which comes with its first words."""
        self._send: Callable[[bytes], int]
        self.queued_bytes = 0
        """Of the bodies in flight."""
        self.unsent = 0
        """Bytes that the socket hasn't taken yet."""
        self.lost: tuple[str, ...] = ()
        """Ids of the requests that were in flight when the socket closed."""

    def bound(self, max_requests: int, max_bytes: int) -> None:
        """Take as much from now on."""
        self._max_requests, self._max_bytes = max_requests, max_bytes

    @property
    def in_flight(self) -> int:
        """Requests that the worker holds."""
        return len(self._pending)

    # -- towards the worker ------------------------------------------------------------

    def load(self, order: LoadOrder) -> None:
        """Tell a fresh worker what to load."""
        self._write(wire.encode(Kind.LOAD, 0, msgspec.msgpack.encode(order)))

    def submit(self, ask: Ask, sink: Sink) -> int:
        """Send a request; its id. ``QueueFull`` at the limits or if closed."""
        size = len(ask.body)
        if not self._open:
            raise QueueFull("The worker has just gone.", retry_after=RETRY_SECONDS)
        if len(self._pending) >= self._max_requests:
            raise QueueFull(
                f"The worker already holds {len(self._pending)} requests; try again shortly.",
                retry_after=RETRY_SECONDS,
            )
        self._refused = self.unsent > self._max_bytes
        if self._refused or (
            # One body alone may be larger: it would never get through otherwise.
            self._pending and self.queued_bytes + size > self._max_bytes
        ):
            raise QueueFull(
                "The worker already holds as many bytes of requests as it may; try again shortly.",
                retry_after=RETRY_SECONDS,
            )
        self._next_id += 1
        id_ = self._next_id
        self._pending[id_] = _Pending(sink, size, ask.request_id)
        self.queued_bytes += size
        try:
            self._write(wire.encode(Kind.REQUEST, id_, wire.encode_ask(ask)))
        except WireError:
            # Told in the next turn: the caller doesn't know the id yet.
            self._clock.callLater(0, self._refuse, id_)
        return id_

    def cancel(self, id: int) -> None:  # noqa: A002 - the frame's own word
        """Nobody wants that answer any more: its sink hears nothing from now on."""
        if self._drop(id) is not None:
            if self._open:
                self._write(wire.encode(Kind.CANCEL, id))
            self._owner.idle()

    def ping(self) -> None:
        """Ask for a PONG."""
        if self._open:
            self._next_id += 1
            self._pings += 1
            self._write(wire.encode(Kind.PING, self._next_id))

    def close(self) -> None:
        """Cut the connection; what is in flight fails at once."""
        if self._open:
            self._open = False
            self._forget_page()
            self.transport.abortConnection()
            self._fail_all()

    def _write(self, frame: bytes) -> None:
        self._out.append(frame)
        self.unsent += len(frame)
        if not self._scheduled and not self._blocked:
            # What this turn still adds goes out in the same system call.
            self._scheduled = True
            self._clock.callLater(0, self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        if not self._open or self._blocked or not self._out:
            return
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        try:
            # The transport is empty (see resumeProducing); its own write() would
            # wait a turn for the socket to be writable.
            sent = self._send(data)
        except OSError:
            # Full, or broken: the transport finds out which.
            sent = 0
        if sent == len(data):
            self.unsent = 0
        else:
            self.unsent = len(data) - sent
            self._blocked = True
            self.transport.write(data[sent:] if sent else data)

    def resumeProducing(self) -> None:  # noqa: N802 - Twisted's name
        """Go on: the transport has sent everything (``IPullProducer``)."""
        if self._blocked:
            self._blocked = False
            self.unsent = sum(map(len, self._out))
            self._flush()
            if self._refused:
                self._refused = False
                self._owner.relieved()

    def stopProducing(self) -> None:  # noqa: N802 - Twisted's name
        """Nothing to do: ``connectionLost`` follows (``IPullProducer``)."""

    # -- from the worker -----------------------------------------------------------------

    def connectionMade(self) -> None:  # noqa: N802 - Twisted's name
        """Begin to talk."""
        self._open = True
        self._send = self.transport.getHandle().send
        self.transport.registerProducer(self, False)

    def fileDescriptorReceived(self, descriptor: int) -> None:  # noqa: N802 - Twisted's name
        """Keep the page; another descriptor breaks the protocol."""
        if self.page is not None or self._greeted or not self._open:
            os.close(descriptor)
            if self._open:
                self._break("it sent a descriptor that nobody asked for")
            return
        with suppress(OSError):
            self.page = Reader(descriptor)

    def dataReceived(self, data: bytes) -> None:  # noqa: N802 - Twisted's name
        """Hand every frame to whom it concerns."""
        if not self._open:
            return
        try:
            for kind, id_, body in self._decoder.feed(data):
                if _HEAD <= kind <= _END:
                    self._answer(kind, id_, body)
                else:
                    self._structured(kind, body)
                if not self._open:
                    return
        except WireError as error:
            self._break(str(error))

    def connectionLost(self, reason: Failure = protocol.connectionDone) -> None:  # noqa: ARG002, N802 - Twisted's signature
        """Fail whatever is in flight, at once."""
        self._open = False
        self._forget_page()
        self._out.clear()
        # First the owner: what fails may be sent again at once, and not to here.
        self._owner.lost()
        self._fail_all()

    def _answer(self, kind: int, id_: int, body: bytes) -> None:
        if kind == _TOKENS:
            if len(body) > MAX_STRUCTURED:
                raise WireError(f"a frame of tokens has {len(body)} bytes")
            for stream, piece in wire.decode_tokens(body):
                self._answer(_BODY, stream, piece)
            return
        entry = self._pending.get(id_)
        if entry is None:
            # Cancelled a moment ago.
            return
        if entry.begun is (kind == _HEAD) and not (kind == _END and wire.decode_end(body).error):
            raise WireError("an answer begins twice" if entry.begun else "an answer has no head")
        try:
            if kind == _BODY:
                entry.sink.body(body)
            elif kind == _HEAD:
                entry.begun = True
                entry.sink.head(claims.head(wire.decode_head(body)))
            else:
                self._finish(id_, entry, claims.end(wire.decode_end(body)))
        except WireError:
            raise
        except Exception:  # noqa: BLE001 - one client's trouble must not cost the others their worker
            log.failure("an answer of {name} could not be passed on", name=self._name)
            self.cancel(id_)

    def _finish(self, id_: int, entry: _Pending, end: End) -> None:
        del self._pending[id_]
        self.queued_bytes -= entry.size
        try:
            if entry.begun:
                entry.sink.end(end)
            else:
                entry.sink.failed(by_code().get(end.error, InternalError)())
        finally:
            self._owner.idle()

    def _structured(self, kind: int, body: bytes) -> None:
        if len(body) > MAX_STRUCTURED:
            raise WireError(f"a frame of kind {kind} has {len(body)} bytes")
        if self._greeted is (kind == Kind.HELLO):
            raise WireError(
                "it said hello twice" if self._greeted else f"its first frame is of kind {kind}"
            )
        try:
            match kind:
                case Kind.HELLO:
                    self._greeted = True
                    self._owner.hello(_HELLO.decode(body))
                case Kind.PROGRESS:
                    self._stepped(body)
                case Kind.READY:
                    self._owner.ready(claims.loaded(_LOADED.decode(body)))
                case Kind.FAILED:
                    self._owner.last_words(claims.last_words(_LAST_WORDS.decode(body)))
                case Kind.PONG:
                    self._ponged()
                case _:
                    raise WireError(f"a frame is of the unknown kind {kind}")
        except msgspec.MsgspecError as error:
            raise WireError(f"a frame of kind {kind} can't be read: {error}") from error

    def _stepped(self, body: bytes) -> None:
        now = self._clock.seconds()
        if now - self._steps_since >= 1:
            self._steps, self._steps_since = 0, now
        self._steps += 1
        if self._steps <= MAX_PROGRESS:
            self._owner.progress(claims.progress(_PROGRESS.decode(body)))

    def _ponged(self) -> None:
        # Each one costs a look at the worker.
        if not self._pings:
            raise WireError("it answers a PING that nobody has sent")
        self._pings -= 1
        self._owner.pong()

    def _forget_page(self) -> None:
        if self.page is not None:
            self.page.close()

    # -- ends ---------------------------------------------------------------------------

    def _break(self, what: str) -> None:
        self.close()
        self._owner.broke(f"the worker broke the protocol: {what}")

    def _refuse(self, id_: int) -> None:
        entry = self._drop(id_)
        if entry is not None:
            entry.sink.failed(PayloadTooLarge("The body is larger than a worker takes."))
            self._owner.idle()

    def _drop(self, id_: int) -> _Pending | None:
        entry = self._pending.pop(id_, None)
        if entry is not None:
            self.queued_bytes -= entry.size
        return entry

    def _fail_all(self) -> None:
        lost = list(self._pending.values())
        self._pending.clear()
        self.queued_bytes = 0
        self.lost += tuple(entry.request_id for entry in lost)
        for entry in lost:
            entry.sink.failed(self._lost())

    def _lost(self) -> WorkerLost:
        return WorkerLost(
            f"The worker of {self._name} ended while it held this request.",
            reference=self._reference,
        )
