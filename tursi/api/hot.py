"""A short way for plain inference requests, past the parser and the headers of ``twisted.web``.

What is taken here is what nearly every client sends: a POST to a face's route in
HTTP/1.1 whose head arrives at once, with one known Host, one Content-Length within
the limit, and nothing that asks for more. Everything else, whatever is wrong or
unusual about it, goes to the ordinary channel byte for byte, and so does all that
follows on its connection. So there is one judge of what is refused, and how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from zope.interface import implementer

from twisted.internet.interfaces import IPullProducer
from twisted.internet.tcp import Connection
from twisted.python.failure import Failure
from twisted.web.http import NO_BODY_CODES
from twisted.web.http_headers import Headers

from tursi.api.channel import Channel
from tursi.api.phrases import phrase
from tursi.errors import InternalError, TursiError
from tursi.faces import TABLE
from tursi.faces.openai import errors
from tursi.faces.route import Answer, Match
from tursi.model import Caller, Scope

if TYPE_CHECKING:
    from tursi.api.inference import Exchange
    from tursi.api.site import Site

_MAX_HEAD = 8192
"""Bytes; larger heads are the ordinary channel's, which has the limits."""
_UNUSUAL = frozenset(
    {b"expect", b"origin", b"sec-fetch-site", b"trailer", b"transfer-encoding", b"upgrade"}
)
_WHITESPACE = b" \t"
_MAX_UNSENT = 65536
"""Bytes that wait for the client before the writer is told to, as Twisted has it."""


class HotChannel(Channel):
    """An HTTP/1.1 connection that serves plain inference requests itself.

    The ordinary channel underneath has seen no byte for as long as ``_hot`` is
    true; from the first that it gets it is in charge.
    """

    _hot = True
    _taking = False
    """Whether ``_take_all`` is at work."""
    _left = 0
    """Bytes of the body that are still to come."""

    def __init__(self) -> None:
        super().__init__()
        self._head = _Head()
        self._parser = HttpRequestParser(self._head)
        self._pieces: list[bytes] = []
        self._outlet: Outlet | None = None

    def connectionMade(self) -> None:  # noqa: N802 - Twisted's name
        """Begin."""
        super().connectionMade()
        # Not TLS, which is something else on top of this.
        if isinstance(self.transport, Connection):
            self._outlet = Outlet(self, self.transport)

    # -- receiving -----------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:  # noqa: N802 - Twisted's name
        """Bytes from the client."""
        if not self._hot:
            super().dataReceived(data)
        elif self._stage == "body":
            self._collect(data)
        elif self._stage == "answer" or self._dataBuffer:
            self._dataBuffer.append(data)
            if sum(map(len, self._dataBuffer)) > self._optimisticEagerReadSize:
                self._networkProducer.pauseProducing()
        elif self._stage == "idle":
            self._take_all(data)

    def _take_all(self, data: bytes) -> None:
        """Take the requests in ``data`` for as long as each is answered at once."""
        self._taking = True
        try:
            while data and self._stage == "idle":
                if self._waitingForTransport and self._hot:
                    # Who doesn't read its answers gets no more of them.
                    break
                data = self._take(data)
        finally:
            self._taking = False
        if data:
            self._dataBuffer.insert(0, data)
            if len(data) > self._optimisticEagerReadSize:
                self._networkProducer.pauseProducing()

    def _take(self, data: bytes) -> bytes:
        """Begin with the request that ``data`` begins with; what follows it."""
        end = data.find(b"\r\n\r\n", 0, _MAX_HEAD) + 4
        if end < 4 or not self._recognise(data if end == len(data) else data[:end]):
            self._hot = False
            if self._outlet is not None:
                self._outlet.close()
                self._outlet = None
            super().dataReceived(data)
            return b""
        stop = end + self._left
        body = data[end:stop]
        self._left -= len(body)
        if self._left:
            self._pieces.append(body)
            self._wait("body", self.site.settings.body_seconds)
            self._parser.feed_data(body)
            return b""
        self._parser.feed_data(body)
        self._begin(body)
        return data[stop:]

    def _collect(self, data: bytes) -> None:
        """More of the body."""
        rest = b""
        if len(data) > self._left:
            data, rest = data[: self._left], data[self._left :]
        self._left -= len(data)
        self._pieces.append(data)
        self._parser.feed_data(data)
        if self._left:
            return
        body = b"".join(self._pieces)
        self._pieces.clear()
        if rest:
            # Before the answer: where that comes at once, it goes on with this.
            self._dataBuffer.append(rest)
        self._begin(body)

    def _recognise(self, data: bytes) -> bool:
        """Whether the head ``data`` is of a plain inference request; if so, it is accepted."""
        head = self._head
        head.target, head.count, head.fields = b"", 0, {}
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            return False
        fields, target, site = head.fields, head.target, self.site
        if (
            not data.startswith(b"POST %b HTTP/1.1\r\n" % target)
            or len(fields) != head.count  # one of them twice
            or head.count > self.maxHeaders
            or not _UNUSUAL.isdisjoint(fields)
            or fields.get(b"connection", b"keep-alive").strip(_WHITESPACE).lower() != b"keep-alive"
        ):
            return False
        # One with a query is looked at more closely.
        match = None if b"?" in target else TABLE.find(target.decode("latin-1"))
        if match is None:
            return False
        length = fields.get(b"content-length", b"").strip(_WHITESPACE)
        if not length.isdigit() or not 0 < int(length) <= site.settings.max_inference_body:
            return False
        host = fields.get(b"host", b"").strip(_WHITESPACE)
        if not site.access.knows(host, local=self.local):
            return False
        try:
            caller = self.visitor.caller(
                fields.get(b"authorization"),
                fields.get(b"x-api-key"),
                fields.get(b"x-forwarded-for"),
            )
        except TursiError:
            return False
        if Scope.INFER not in caller.scopes:
            return False
        given = fields.get(b"x-request-id")
        request_id = site.request_id(given and given.strip(_WHITESPACE))
        self._left = int(length)
        self.requests.append(
            HotRequest(self, target, match, request_id, fields.get(b"content-type"), caller)
        )
        return True

    def _begin(self, body: bytes) -> None:
        """Answer the request, which is complete."""
        request = self.requests[0]
        request.body = body
        self._stage, self.deadline = "answer", math.inf
        self._handlingRequest = True
        request.process()

    # -- answering -------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send ``data``, at once if the socket takes it."""
        if self._outlet is None:
            self.transport.write(data)
        else:
            self._outlet.send(data)

    def done(self) -> None:
        """The request is answered; the next may be here already."""
        self.requests.clear()
        self._handlingRequest = False
        self._wait("idle", self.site.settings.idle_seconds)
        if self._waitingForTransport:
            self._networkProducer.pauseProducing()
        elif self._dataBuffer:
            self._networkProducer.resumeProducing()
        if not self._taking:
            self._go_on()

    def resumeProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The client has read what was written."""
        super().resumeProducing()
        if self._hot and self._stage == "idle":
            self._go_on()

    def _go_on(self) -> None:
        if self._dataBuffer and not self._waitingForTransport:
            data = b"".join(self._dataBuffer)
            self._dataBuffer.clear()
            self._take_all(data)


@implementer(IPullProducer)
class Outlet:
    """Sends without waiting a turn of the reactor for the socket to be writable.

    As the transport's pull producer it is told when there is nothing unsent. Like the
    transport it tells the channel to pause and to resume.
    """

    def __init__(self, channel: HotChannel, transport: Connection) -> None:
        self._channel = channel
        self._transport = transport
        self._send = transport.getHandle().send
        self._unsent = 0
        self._paused = False
        transport.unregisterProducer()
        transport.registerProducer(self, False)

    def send(self, data: bytes) -> None:
        """Send ``data``, or leave it to the transport."""
        if not self._unsent:
            try:
                sent = self._send(data)
            except OSError:
                # Full, or broken: the transport finds out which.
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
        self._unsent += len(data)
        self._transport.write(data)
        if self._unsent > _MAX_UNSENT and not self._paused:
            self._paused = True
            self._channel.pauseProducing()

    def resumeProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The transport has sent everything."""
        self._unsent = 0
        if self._paused:
            self._paused = False
            self._channel.resumeProducing()

    def stopProducing(self) -> None:  # noqa: N802 - Twisted's name
        """Nothing to do: ``connectionLost`` follows."""

    def close(self) -> None:
        """Give the transport back to the channel."""
        self._transport.unregisterProducer()
        self._transport.registerProducer(self._channel, True)


class _Head:
    """What the parser has found in a head."""

    __slots__ = ("count", "fields", "target")

    target: bytes
    fields: dict[bytes, bytes]
    """By lower-case name."""
    count: int

    def on_url(self, target: bytes) -> None:
        """The request's target."""
        self.target = target

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self.count += 1
        self.fields[name.lower()] = value


class HotRequest:
    """A request that ``HotChannel`` took, and the way of its answer."""

    __slots__ = (
        "_begun", "_channel", "_content_type", "_head", "_match", "_path", "body", "caller",
        "on_lost", "on_overdue", "request_id", "site",
    )  # fmt: skip

    site: Site
    on_overdue: Callable[[], None] | None
    on_lost: Callable[[], None] | None
    body: bytes

    def __init__(
        self,
        channel: HotChannel,
        path: bytes,
        match: Match,
        request_id: bytes,
        content_type: bytes | None,
        caller: Caller,
    ) -> None:
        self._channel = channel
        self._path = path
        self._match = match
        self._content_type = content_type
        self._begun = False
        self._head = b""
        self.site = channel.site
        self.request_id = request_id
        self.caller = caller
        self.body = b""
        self.on_lost = self.on_overdue = None

    @property
    def content_types(self) -> tuple[bytes, ...]:
        """What the Content-Type header says, if there is one."""
        given = self._content_type
        return () if given is None else (given.strip(_WHITESPACE),)

    def process(self) -> None:
        """Have it answered."""
        try:
            self.site.inference.render(self, self._match)
        except Exception:  # noqa: BLE001 - whatever it is, the client gets an answer
            error = self.incident(Failure())
            if self._begun:
                self.abort()
            else:
                self.respond(errors.answer(error))

    def error(self, error: TursiError) -> Answer:
        """``error`` in the shape of the route's face."""
        return self._match.route.error(error)

    def cors(self) -> Mapping[str, str]:
        """Nothing: it has no Origin."""
        return {}

    # -- what becomes of it ------------------------------------------------------------------

    def connectionLost(self, reason: Failure) -> None:  # noqa: ARG002, N802 - Twisted's signature
        """The client has gone."""
        if self.on_lost is not None:
            self.on_lost()

    def overdue(self) -> None:
        """The answer takes too long."""
        if self.on_overdue is not None:
            self.on_overdue()

    def answer_within(self, seconds: float) -> None:
        """Call ``on_overdue`` unless the answer is finished in time."""
        self._channel.answer_within(seconds)

    def abort(self) -> None:
        """Close the connection at once."""
        self._channel.abort()

    def incident(self, failure: Failure) -> InternalError:
        """Log a defect; the error that tells the client its id and nothing else."""
        return self.site.incident(failure, b"POST", self._path)

    # -- answering ---------------------------------------------------------------------------

    def respond(self, answer: Answer) -> None:
        """Write the whole answer."""
        self._begun = True
        body = answer.body
        if answer.headers or answer.status in NO_BODY_CODES:
            fields = {
                "Content-Type": answer.content_type,
                "Content-Length": str(len(body)),
                **(answer.headers or {}),
            }
            if answer.status in NO_BODY_CODES:
                body = b""
            data = self._start(answer.status, fields) + body
        else:
            data = b"%bDate: %b\r\nX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n%b" % (
                _opening(answer.status, answer.content_type),
                self.site.date(),
                self.request_id,
                len(body),
                body,
            )
        self._channel.send(data)
        self._channel.done()

    def open_stream(self, status: int, headers: Mapping[str, str], exchange: Exchange) -> bool:
        """Begin an answer that ``exchange`` writes bit by bit; whether it must wait at first."""
        self._begun = True
        self._head = self._start(status, {**headers, "Transfer-Encoding": "chunked"})
        congested = self._channel.congested
        self._channel.registerProducer(exchange, True)
        return congested

    def write(self, data: bytes) -> None:
        """Write some of a stream."""
        self._channel.send(self._head + _chunk(data))
        self._head = b""

    def end_stream(self, rest: bytes) -> None:
        """Write the last bytes of a stream."""
        self._channel.unregisterProducer()
        self._channel.send(b"%b%b0\r\n\r\n" % (self._head, _chunk(rest)))
        self._channel.done()

    def _start(self, status: int, fields: Mapping[str, str]) -> bytes:
        """Status line and headers."""
        headers = Headers()
        headers.setRawHeaders(b"Date", [self.site.date()])
        headers.setRawHeaders(b"X-Request-Id", [self.request_id])
        for name, value in fields.items():
            headers.setRawHeaders(name.encode("latin-1"), [value.encode("latin-1")])
        return b"%b%b\r\n" % (_status_line(status), _lines(headers))


def _chunk(data: bytes) -> bytes:
    # One without bytes would be the end.
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


@lru_cache(maxsize=64)
def _opening(status: int, content_type: str) -> bytes:
    """The status line and the Content-Type."""
    headers = Headers()
    headers.setRawHeaders(b"Content-Type", [content_type.encode("latin-1")])
    return _status_line(status) + _lines(headers)


def _status_line(status: int) -> bytes:
    return b"HTTP/1.1 %d %b\r\n" % (status, phrase(status))


def _lines(headers: Headers) -> bytes:
    return b"".join(
        b"%b: %b\r\n" % (name, value)
        for name, values in headers.getAllRawHeaders()
        for value in values
    )
