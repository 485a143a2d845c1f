"""One HTTP request: its limits while it arrives, its id, and the way of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from twisted.python.failure import Failure
from twisted.web import http, server

from tursi.api.access import single
from tursi.api.phrases import phrase
from tursi.api.upload import STALL_SECONDS, Upload
from tursi.errors import InternalError, PayloadTooLarge, TursiError
from tursi.faces import TABLE
from tursi.faces.openai import errors
from tursi.faces.route import Answer, Match
from tursi.model import Caller, Role, Scope

if TYPE_CHECKING:
    from tursi.api.channel import Channel
    from tursi.api.inference import Exchange
    from tursi.api.site import Site

_MAX_CHUNKS = 16_384
"""Chunks of one body: each costs some work, however small it is."""


class Request(server.Request):
    """A request of one of our sites."""

    channel: Channel
    transport: Any
    site: Site
    defaultContentType = None  # noqa: N815 - Twisted's name
    match: Match | None = None
    """The face's route at this path, whatever the method."""
    request_id = b""
    caller = Caller()
    """Who sent it; nobody until the headers are here."""
    on_overdue: Callable[[], None] | None = None
    """Called when the answer takes longer than ``channel.answer_within`` was told."""
    upload: Upload | None = None
    """The body, where it is handed on while it arrives."""
    on_lost: Callable[[], None] | None = None
    """Called when the connection is lost before the answer is finished."""
    _received: BytesIO
    _face: Callable[[TursiError], Answer] = staticmethod(errors.answer)
    _command = b""
    """The method, known earlier than Twisted says it."""
    _limit = 0
    _chunks: int | None = None
    """How many more chunks the body may have."""

    # -- receiving ----------------------------------------------------------------------

    def gotLength(self, length: int | None) -> None:  # noqa: N802 - Twisted's name
        """The headers are here; refuse what need not arrive (``length`` is None if chunked)."""
        channel = self.channel
        site = self.site = channel.site
        self.content = self._received = BytesIO()
        headers = self.requestHeaders
        given = headers.getRawHeaders(b"x-request-id")
        self.request_id = site.request_id(given[0] if given is not None else None)
        command, target = channel.request_line
        self._command = command
        self.caller = channel.visitor.stranger
        self.match = TABLE.find(target.partition(b"?")[0].decode("latin-1"))
        is_inference = self.match is not None and command == b"POST"
        self._face = self.match.route.error if self.match and is_inference else errors.answer
        refusal = self._refusal(target, is_inference=is_inference)
        if refusal is not None:
            site.audit.refused(self, command, target, refusal)
            channel.refuse(refusal)
        elif (command, target.partition(b"?")[0]) in site.uploads:
            self._begin_upload(command, target)
        elif length != 0:
            settings = site.settings
            self._limit = settings.max_inference_body if is_inference else settings.max_control_body
            self._chunks = _MAX_CHUNKS if length is None else None
            if length is not None and length > self._limit:
                channel.refuse(self._too_large())

    def _begin_upload(self, command: bytes, target: bytes) -> None:
        """Have the request answered while its body arrives, and not only after it."""
        self.upload = Upload(self)
        self.on_lost = self.upload.lose
        self.channel.expect_more(STALL_SECONDS)
        super().requestReceived(command, target, b"HTTP/1.1")

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:  # noqa: N802 - Twisted's name
        """All of the request is here."""
        if self.upload is None:
            super().requestReceived(command, path, version)
        else:
            self.upload.end()

    def _refusal(self, target: bytes, *, is_inference: bool) -> TursiError | None:
        """Why the request is refused by its headers alone, if it is."""
        access, headers = self.site.access, self.requestHeaders
        refusal = access.refusal(headers, target, local=self.channel.local)
        if refusal is not None:
            return refusal
        forwarded = headers.getRawHeaders(b"x-forwarded-for") or (None,)
        try:
            self.caller = self.channel.visitor.caller(
                single(headers, b"authorization"), single(headers, b"x-api-key"), forwarded[-1]
            )
            if is_inference and Scope.INFER not in self.caller.scopes:
                # Nobody's large bodies are wanted.
                access.require(Role.INFERENCE, Scope.INFER, self.caller)
        except TursiError as error:
            return error
        return None

    def handleContentChunk(self, data: bytes) -> None:  # noqa: N802 - Twisted's name
        """A piece of the body."""
        if self.upload is not None:
            self.channel.expect_more(STALL_SECONDS)
            self.upload.feed(data)
            return
        if self._received.tell() + len(data) > self._limit:
            self.channel.refuse(self._too_large())
            return
        if self._chunks is not None:
            self._chunks -= 1
            if self._chunks < 0:
                self.channel.refuse(
                    PayloadTooLarge(
                        f"The body has more than {_MAX_CHUNKS} chunks; send larger ones."
                    )
                )
                return
        self._received.write(data)

    @property
    def body(self) -> bytes:
        """The whole body."""
        return self._received.getvalue()

    @property
    def content_types(self) -> Sequence[bytes]:
        """What the Content-Type headers say."""
        return self.requestHeaders.getRawHeaders(b"content-type") or ()

    def parseCookies(self) -> None:  # noqa: N802 - Twisted's name
        """Nothing: there are no cookies."""

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"The body is larger than {self._limit} bytes, the most that this path takes."
        )

    # -- answering -----------------------------------------------------------------------

    def process(self) -> None:
        """Hand the complete request to the site's resource."""
        headers = self.responseHeaders
        headers.setRawHeaders(b"Date", [self.site.date()])
        headers.setRawHeaders(b"X-Request-Id", [self.request_id])
        for name, value in self.cors().items():
            headers.setRawHeaders(name.encode("latin-1"), [value.encode("latin-1")])
        try:
            self.site.resource.render(self)
        except Exception:  # noqa: BLE001 - whatever it is, the client gets an answer
            self.processingFailed(Failure())

    # What the site's class does besides is of no use here, and costs.
    write = http.Request.write
    finish = http.Request.finish

    def connectionLost(self, reason: Failure) -> None:  # noqa: N802 - Twisted's name
        """The client has gone."""
        super().connectionLost(reason)
        if self.on_lost is not None:
            self.on_lost()

    def overdue(self) -> None:
        """The answer takes too long."""
        if self.on_overdue is not None:
            self.on_overdue()

    def error(self, error: TursiError) -> Answer:
        """``error`` in the shape of the route's face."""
        return self._face(error)

    def cors(self) -> Mapping[str, str]:
        """The headers by which a browser lets the page of an allowed origin see the answer."""
        headers = self.requestHeaders
        origin = self.site.access.allowed_origin(headers) if self.site else None
        if origin is None:
            return {}
        found = {
            "Access-Control-Allow-Origin": origin.decode("latin-1"),
            "Access-Control-Expose-Headers": "Retry-After, X-Request-Id, X-Should-Retry",
            "Vary": "Origin",
        }
        if self.is_preflight:
            found |= {
                "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE",
                "Access-Control-Allow-Headers": (
                    headers.getRawHeaders(b"access-control-request-headers") or [b""]
                )[0].decode("latin-1"),
                "Access-Control-Max-Age": "600",
            }
        return found

    @property
    def is_preflight(self) -> bool:
        """Whether a browser asks what the page of another origin may send."""
        headers = self.requestHeaders
        return (
            self._command == b"OPTIONS"
            and headers.hasHeader(b"access-control-request-method")
            and self.site.access.allowed_origin(headers) is not None
        )

    def prepare(self, answer: Answer) -> bytes:
        """Set status and headers; the body to write."""
        self.setResponseCode(answer.status, phrase(answer.status))
        headers = self.responseHeaders
        headers.setRawHeaders(b"Content-Type", [answer.content_type.encode("latin-1")])
        headers.setRawHeaders(b"Content-Length", [b"%d" % len(answer.body)])
        if answer.headers:
            for name, value in answer.headers.items():
                headers.setRawHeaders(name.encode("latin-1"), [value.encode("latin-1")])
        return answer.body

    def respond(self, answer: Answer) -> None:
        """Write the whole answer."""
        self.write(self.prepare(answer))
        self.finish()

    def answer_within(self, seconds: float) -> None:
        """Call ``on_overdue`` unless the answer is finished in time."""
        self.channel.answer_within(seconds)

    def open_stream(self, status: int, headers: Mapping[str, str], exchange: Exchange) -> bool:
        """Begin an answer that ``exchange`` writes bit by bit; whether it must wait at first."""
        self.setResponseCode(status, phrase(status))
        for name, value in headers.items():
            self.responseHeaders.setRawHeaders(name.encode("latin-1"), [value.encode("latin-1")])
        congested = self.channel.congested
        self.registerProducer(exchange, True)
        return congested

    def end_stream(self, rest: bytes) -> None:
        """Write the last bytes of a stream."""
        if rest:
            self.write(rest)
        if self.producer is not None:
            self.unregisterProducer()
        self.finish()

    def abort(self) -> None:
        """Close the connection at once, unless it is gone."""
        if self.channel is not None:
            self.channel.abort()

    def incident(self, failure: Failure) -> InternalError:
        """Log a defect; the error that tells the client its id and nothing else."""
        return self.site.incident(failure, self.method, self.path)

    def processingFailed(self, reason: Failure) -> Failure:  # noqa: N802 - Twisted's name
        """Answer for a defect."""
        error = self.incident(reason)
        if self.startedWriting:
            self.channel.abort()
        elif not self._disconnected:
            self.respond(errors.answer(error))
        return reason
