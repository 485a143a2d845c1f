"""One HTTP connection: its deadlines, and how it ends when a request is refused on the way."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from twisted.internet.address import UNIXAddress
from twisted.internet.interfaces import IDelayedCall, ITCPTransport
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web import http

from tursi.api.access import Visitor
from tursi.api.phrases import phrase
from tursi.api.upload import STALL_SECONDS
from tursi.errors import HostRefused, InvalidRequest, RequestTimeout, TursiError
from tursi.faces.openai import errors

if TYPE_CHECKING:
    from tursi.api.request import Request
    from tursi.api.site import Site

_LINGER_SECONDS = 2.0
"""How long what the client still sends is thrown away, so that it can read its refusal."""
_LARGE = 16384
"""Bytes of it that are worth a read;"""
_REST_SECONDS = 0.02
"""after less nothing is read for this long."""
_FLUSH_SECONDS = 15.0
"""How long an idle connection may take to send what is left when it is closed."""
_NEVER = math.inf
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_FRAMING = (
    "A Content-Length or Transfer-Encoding header isn't valid, or there is more than one of them."
)
_BARE_LINE_FEED = "A line of the headers ends with LF alone; HTTP ends lines with CR LF."


class Channel(http.HTTPChannel):
    """An HTTP/1.1 connection with absolute deadlines.

    Twisted's own time-out starts anew with every byte, so a client that sends
    one byte now and then could hold a connection for ever. Here the headers, the
    body and the pause between requests each have to end at a fixed time; the
    site looks at ``deadline`` once in a while, which costs a request nothing.
    """

    site: Site
    transport: Any
    _networkProducer: Any  # noqa: N815 - Twisted's name
    maxHeaders = 100  # noqa: N815 - Twisted's name
    local = False
    """Whether it came by a Unix socket."""
    host: str | None = None
    """The client's address, under which its connections are counted."""
    visitor: Visitor
    """Who is at the other end."""
    deadline = _NEVER
    """Monotonic time, in seconds, at which ``overdue`` is called."""
    _rest: IDelayedCall | None = None
    """Until it comes nothing is read."""
    _stage = "idle"
    """What is waited for: idle, headers, body, answer, or closing."""

    # -- the connection's life -----------------------------------------------------

    def connectionMade(self) -> None:  # noqa: N802 - Twisted's name
        """Begin; a peer that vanishes without a word is found by TCP keep-alive."""
        super().connectionMade()
        if ITCPTransport.providedBy(self.transport):
            self.transport.setTcpKeepAlive(True)
        self.local = isinstance(self.transport.getHost(), UNIXAddress)
        self.visitor = self.site.access.visitor(self)
        self._wait("idle", self.site.settings.idle_seconds)
        self.site.opened(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802 - Twisted's name
        """End; requests in progress are told."""
        self.deadline = _NEVER
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        self.site.closed(self)
        super().connectionLost(reason)

    def _wait(self, stage: str, seconds: float) -> None:
        self._stage = stage
        self.deadline = self.site.reactor.seconds() + seconds

    def answer_within(self, seconds: float) -> None:
        """Call the request's ``overdue`` unless it is finished in time."""
        self._wait("answer", seconds)

    def overdue(self) -> None:
        """The deadline has passed."""
        self.deadline = _NEVER
        match self._stage:
            case "idle":
                self._wait("closing", _FLUSH_SECONDS)
                self.loseConnection()
            case "answer":
                self.requests[0].overdue()
            case "closing":
                self.transport.abortConnection()
            case stage:
                self.refuse(RequestTimeout(f"The {stage} of the request did not arrive in time."))

    def abort(self) -> None:
        """Close at once, whatever is still to be sent."""
        self.transport.abortConnection()

    def take_no_more(self) -> None:
        """Let the client wait with the rest of its body."""
        self.deadline = _NEVER
        self._networkProducer.pauseProducing()

    def take_more(self) -> None:
        """Let the client go on with its body."""
        if self._stage == "closing":
            return
        if self._stage == "body":
            self.expect_more(STALL_SECONDS)
        self._networkProducer.resumeProducing()

    def expect_more(self, seconds: float) -> None:
        """Give up unless more of the body arrives in time."""
        self._wait("body", seconds)

    @property
    def request_line(self) -> tuple[bytes, bytes]:
        """Method and target of the request that is being received."""
        return self._command, self._path

    @property
    def is_waiting(self) -> bool:
        """Whether nothing would be lost but a connection if it were closed."""
        return self._stage in {"idle", "headers"}

    @property
    def congested(self) -> bool:
        """Whether the client reads more slowly than is written to it."""
        return bool(self._waitingForTransport)

    # -- receiving -------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:  # noqa: N802 - Twisted's name
        """Bytes from the client; dropped once a request was refused."""
        if self._stage == "closing":
            self._throw_away(data)
            return
        if self._stage == "idle":
            self._wait("headers", self.site.settings.header_seconds)
        super().dataReceived(data)
        if (
            self._stage == "headers"
            and self.line_mode
            and not self.paused
            and not self._busyReceiving
            and b"\n" in self._buffer
        ):
            # Twisted would wait for a CR LF.
            self.refuse(InvalidRequest(_BARE_LINE_FEED))

    def _throw_away(self, data: bytes) -> None:
        """Read on after a refusal, but no faster than that costs little."""
        if len(data) < _LARGE and self._rest is None:
            # Many small pieces cost the more, and arrive together a moment later.
            self.transport.pauseProducing()
            self._rest = self.site.reactor.callLater(_REST_SECONDS, self._read_on)

    def _read_on(self) -> None:
        self._rest = None
        if self.deadline != _NEVER:
            self.transport.resumeProducing()

    def headerReceived(self, line: bytes) -> bool:  # noqa: N802 - Twisted's name
        """A header."""
        if self._stage == "closing":
            return False
        try:
            return bool(super().headerReceived(line))
        except ValueError:
            # A Content-Length of more digits than int() takes.
            return self._failChooseTransferDecoder()

    def lineLengthExceeded(self, line: bytes) -> None:  # noqa: ARG002, N802 - Twisted's name
        """A line longer than all headers together may be."""
        self._receivedHeaderSize = self.totalHeadersSize + 1
        self._respondToBadRequestAndDisconnect()

    def allHeadersReceived(self) -> None:  # noqa: N802 - Twisted's name
        """Decide by the headers whether the body is wanted."""
        if self._path.startswith((b"http", b"HTTP")) and not self._strip_authority():
            return
        if self.length != 0:
            self._wait("body", self.site.settings.body_seconds)
        super().allHeadersReceived()

    def _strip_authority(self) -> bool:
        """Make a target in absolute form, as for a proxy, the path that it means."""
        matched = _ABSOLUTE.fullmatch(self._path)
        if matched is None:
            return True
        if not self.site.access.knows(matched[1], local=self.local):
            self.refuse(HostRefused("This server doesn't answer for the host in the URL."))
            return False
        self._path = matched[2] if matched[2].startswith(b"/") else b"/" + matched[2]
        return True

    def _send100Continue(self) -> None:  # noqa: N802 - Twisted's name
        if self._stage != "closing":
            super()._send100Continue()

    def allContentReceived(self) -> None:  # noqa: N802 - Twisted's name
        """Answer the request, unless it was refused."""
        if self._stage == "closing":
            return
        self._stage, self.deadline = "answer", _NEVER
        super().allContentReceived()

    def requestDone(self, request: Request) -> None:  # noqa: N802 - Twisted's name
        """The request is answered; the next may be here already."""
        settings = self.site.settings
        if not self.persistent:
            self._wait("closing", settings.idle_seconds)
        elif any(self._dataBuffer):
            self._wait("headers", settings.header_seconds)
        else:
            self._wait("idle", settings.idle_seconds)
        # Who doesn't read its answers gets no more of them: Twisted would answer
        # all that has arrived, and read on.
        self.paused = bool(self.persistent) and self._waitingForTransport
        super().requestDone(request)
        if self.paused:
            self._networkProducer.pauseProducing()

    def resumeProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The client has read what was written."""
        super().resumeProducing()
        if self.paused:
            self.paused = False
            super().dataReceived(b"")

    # -- refusing ----------------------------------------------------------------------

    def _respondToBadRequestAndDisconnect(self) -> None:  # noqa: N802 - Twisted's name
        self.refuse(InvalidRequest(self._fault()))

    def _failChooseTransferDecoder(self) -> bool:  # noqa: N802 - Twisted's name
        self.refuse(InvalidRequest(_FRAMING))
        self.length = None
        return False

    def _fault(self) -> str:
        """What isn't HTTP about what was received last."""
        if self._stage == "body":
            return "The chunks of the body aren't valid."
        if self._receivedHeaderSize > self.totalHeadersSize:
            return f"The request line and headers are larger than {self.totalHeadersSize} bytes."
        if self._receivedHeaderCount > self.maxHeaders:
            return f"The request has more than {self.maxHeaders} headers."
        if not hasattr(self, "_command"):
            return "The request line isn't that of HTTP/1.1, such as 'GET / HTTP/1.1'."
        return "A header isn't valid: it is a name, a colon and a value without control characters."

    def refuse(self, error: TursiError) -> None:
        """Answer the request that is being received with ``error``, and close.

        Closing with unread bytes would reset the connection, and a client
        that is still sending would never see the answer. So only our half is
        closed, and for a while the rest is read and thrown away.
        """
        if self._stage == "closing":
            return
        self._wait("closing", _LINGER_SECONDS)
        self.site.inference.metrics.refused(error.code)
        request = self.requests[-1] if self.requests else None
        answer = errors.answer(error) if request is None else request.error(error)
        status, body = answer.status, answer.body
        length = len(body)
        request_id = (request and request.request_id) or self.site.new_id()
        headers = {**(answer.headers or {}), **(request.cors() if request else {})}
        if getattr(self, "_command", b"") == b"HEAD":
            body = b""
        self.transport.write(
            b"HTTP/1.1 %d %s\r\n"
            b"Content-Type: application/json\r\n"
            b"Content-Length: %d\r\n"
            b"Connection: close\r\n"
            b"X-Request-Id: %s\r\n%s\r\n"
            % (
                status,
                phrase(status),
                length,
                request_id,
                b"".join(b"%s: %s\r\n" % each for each in _encoded(headers)),
            )
            + body
        )
        self._networkProducer.unregisterProducer()
        self._networkProducer.resumeProducing()
        self.setRawMode()
        # For good, so that a line of a request that isn't refused costs nothing.
        self.lineReceived = self.rawDataReceived = _ignore  # type: ignore[method-assign]
        # TLS says that it ends, and closes when the client says so too; the half of the
        # connection below it, which its transport would hand out, is not ours to close.
        close = self.transport.loseConnection
        if not self.isSecure():
            close = getattr(self.transport, "loseWriteConnection", close)
        close()


def _encoded(headers: Mapping[str, str]) -> Iterator[tuple[bytes, bytes]]:
    return ((name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items())


def _ignore(data: bytes) -> None:
    """What is received after a refusal."""
