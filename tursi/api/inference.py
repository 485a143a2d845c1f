"""The way of an inference request through the daemon, in front of Klein because it is hot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from twisted.python.failure import Failure
from twisted.web.http import NO_BODY_CODES, UNAUTHORIZED

from tursi.api.access import require_deployment
from tursi.api.fleet import End, Fleet, Head, Ticket
from tursi.api.keyring import Keyring
from tursi.api.metrics import Metrics
from tursi.config import Configuration
from tursi.errors import (
    DeadlineExceeded,
    InternalError,
    RequestCancelled,
    TursiError,
    UnsupportedMediaType,
    by_code,
)
from tursi.faces.route import Answer, Match, Route, addressed, status_of
from tursi.fleet import Work
from tursi.model import Caller, Role, Scope, Usage
from tursi.rollup import Observation

if TYPE_CHECKING:
    from tursi.api.site import Site

_STREAMS = ("text/event-stream", "application/x-ndjson")
_MAX_WHOLE = 256 * 1024 * 1024
"""Bytes of an answer that isn't a stream."""
_NO_USAGE = Usage()
_FRAMING = frozenset({"content-length", "transfer-encoding"})


class Responder(Protocol):
    """A complete request, and the way of its answer."""

    site: Site
    request_id: bytes
    caller: Caller
    on_overdue: Callable[[], None] | None
    """Called when the answer takes longer than ``answer_within`` was told."""
    on_lost: Callable[[], None] | None
    """Called when the connection is lost before the answer is finished."""

    @property
    def body(self) -> bytes:
        """The whole body."""
        ...

    @property
    def content_types(self) -> Sequence[bytes]:
        """What the Content-Type headers say."""
        ...

    def answer_within(self, seconds: float) -> None:
        """Call ``on_overdue`` unless the answer is finished in time."""
        ...

    def respond(self, answer: Answer) -> None:
        """Write the whole answer."""
        ...

    def open_stream(self, status: int, headers: Mapping[str, str], exchange: Exchange) -> bool:
        """Begin an answer that ``exchange`` writes bit by bit; whether it must wait at first."""
        ...

    def write(self, data: bytes) -> None:
        """Write some of a stream."""
        ...

    def end_stream(self, rest: bytes) -> None:
        """Write the last bytes of a stream."""
        ...

    def abort(self) -> None:
        """Close the connection at once."""
        ...

    def incident(self, failure: Failure) -> InternalError:
        """Log a defect; the error that tells the client its id and nothing else."""
        ...


class Inference:
    """Hands requests to the fleet, and answers to clients."""

    def __init__(
        self, fleet: Fleet, metrics: Metrics, configuration: Configuration, keyring: Keyring
    ) -> None:
        self.fleet = fleet
        self.metrics = metrics
        self.settings = configuration.requests
        self.keyring = keyring

    def configure(self, configuration: Configuration) -> None:
        """Go by this from now on."""
        self.settings = configuration.requests

    def render(self, request: Responder, match: Match) -> None:
        """Answer ``request``, now or later."""
        route = match.route
        exchange = Exchange(self, request, route)
        caller = request.caller
        try:
            request.site.access.require(Role.INFERENCE, Scope.INFER, caller)
            if caller.key is not None:
                self.keyring.admit(caller)
            body = request.body
            content_type = _json_type(request.content_types)
            model, keep_alive = addressed(body, match.model)
            exchange.deployment = self.fleet.find(model)
            require_deployment(exchange.deployment, caller)
            exchange.submit(
                Work(
                    route=route.name,
                    request_id=request.request_id.decode("ascii"),
                    content_type=content_type,
                    body=body,
                    seconds=self.settings.deadline_seconds,
                    keep_alive=keep_alive,
                    caller=caller,
                )
            )
        except TursiError as error:
            exchange.failed(error)
        except Exception:  # noqa: BLE001 - the client gets the face's shape for a defect too
            exchange.failed(request.incident(Failure()))


class Exchange:
    """One request and its answer: the sink that the fleet answers to.

    A whole answer is written at its end, so that whatever fails before is
    still an HTTP error. A stream is written as it comes; what a slow reader does not
    take is held up to a limit, and then its stream is cut: nobody else waits for it.
    """

    __slots__ = (
        "_began", "_done", "_first", "_head", "_held", "_held_bytes", "_inference", "_opened",
        "_paused", "_request", "_route", "_streaming", "_ticket", "deployment",
    )  # fmt: skip

    def __init__(self, inference: Inference, request: Responder, route: Route) -> None:
        self._inference = inference
        self._request = request
        self._route = route
        self._began = request.site.reactor.seconds()
        self._first: float | None = None
        self._ticket: Ticket | None = None
        self._head: Head | None = None
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._streaming = self._opened = self._paused = self._done = False
        self.deployment = ""

    def submit(self, work: Work) -> None:
        """Send it on its way; from now on it ends by an answer, a disconnection or in time."""
        request = self._request
        ticket = self._inference.fleet.submit(self.deployment, work, self)
        if self._done:
            return
        self._ticket = ticket
        request.on_lost = self._lost
        request.on_overdue = self._overdue
        request.answer_within(work.seconds)

    # -- what the fleet tells ------------------------------------------------------------

    def head(self, head: Head) -> None:
        """Keep status and headers until there is something to send."""
        self._head = head
        self._streaming = (
            head.content_type.startswith(_STREAMS) and head.status not in NO_BODY_CODES
        )

    def body(self, data: bytes) -> None:
        """Send or keep ``data``."""
        if self._done:
            return
        if not self._streaming:
            self._hold(data, _MAX_WHOLE)
        elif self._paused:
            self._hold(data, self._inference.settings.max_stream_buffer)
        else:
            if not self._opened:
                self._open()
            self._request.write(data)

    def end(self, end: End) -> None:
        """Send what is left."""
        if self._done:
            return
        head, request = self._head, self._request
        if head is None:
            error = by_code().get(end.error, InternalError)
            self.failed(error("The worker could not answer.") if end.error else error())
            return
        self._close(head.status, end.error, end.usage)
        if not self._streaming:
            body = b"".join(self._held)
            request.respond(Answer(head.status, head.content_type, body, head.headers))
            return
        if not self._opened:
            self._open()
        request.end_stream(b"".join(self._held))

    def failed(self, error: TursiError) -> None:
        """Tell the client: by an HTTP error, or by the last event of a stream."""
        if self._done:
            return
        if not self._request.caller.trusted:
            error = error.discreet()
        self._close(status_of(error), error.code)
        if self._opened:
            self._request.end_stream(b"".join((*self._held, self._route.failure(error))))
        else:
            self._request.respond(self._route.error(error))

    # -- what the client does --------------------------------------------------------------

    def pauseProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The client reads more slowly than the worker writes."""
        self._paused = True

    def resumeProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The client has caught up."""
        self._paused = False
        if self._held and not self._done:
            held = b"".join(self._held)
            self._held.clear()
            self._held_bytes = 0
            self._request.write(held)

    def stopProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The connection is gone; ``_lost`` says so too."""

    def _lost(self) -> None:
        if not self._done:
            self._cancel(RequestCancelled.code)

    def _overdue(self) -> None:
        if self._done:
            return
        seconds = self._inference.settings.deadline_seconds
        self._drop()
        self.failed(DeadlineExceeded(f"The request took longer than {seconds:g} s."))

    # -- sending ---------------------------------------------------------------------------

    def _hold(self, data: bytes, limit: int) -> None:
        self._held_bytes += len(data)
        if self._held_bytes <= limit:
            self._held.append(data)
        elif self._streaming:
            self._cancel("slow_reader")
            self._request.abort()
        else:
            self._drop()
            self._held.clear()
            self.failed(InternalError(f"The answer is larger than {limit} bytes."))

    def _open(self) -> None:
        """Begin a stream."""
        head = self._head
        assert head is not None  # noqa: S101 - for the type checker: only a head says it is a stream
        self._opened = True
        self._first = self._request.site.reactor.seconds() - self._began
        headers = {
            "Content-Type": head.content_type,
            # A stream ends where the connection's protocol says so.
            **{name: value for name, value in head.headers.items() if name.lower() not in _FRAMING},
            "Cache-Control": "no-cache",
            # Proxies would collect the events.
            "X-Accel-Buffering": "no",
        }
        self._paused = self._request.open_stream(head.status, headers, self)

    def _cancel(self, code: str) -> None:
        self._drop()
        self._close(499, code)

    def _drop(self) -> None:
        """Let the worker stop."""
        if self._ticket is not None:
            self._ticket.cancel()

    def _close(self, status: int, code: str, usage: Usage = _NO_USAGE) -> None:
        """Nothing of the answer is listened to any more; count it."""
        self._done = True
        request, ticket, inference = self._request, self._ticket, self._inference
        # They lead back to here; without them nothing waits for the collector.
        self._ticket = request.on_lost = request.on_overdue = None
        seconds = request.site.reactor.seconds() - self._began
        key = request.caller.key
        deployment = self.deployment
        inference.metrics.record(deployment, self._route.name, status, seconds, usage, code)
        if status != UNAUTHORIZED:
            # Who asks without a key that would do is nobody's user.
            generation, waited = (ticket.generation, ticket.waited) if ticket else (0, 0.0)
            seen = Observation(
                deployment, generation, key or 0, status, code, seconds, waited, self._first, usage
            )
            inference.fleet.count(seen)
        if key is not None:
            inference.keyring.charge(request.caller, usage.prompt_tokens + usage.completion_tokens)


def _json_type(given: Sequence[bytes]) -> str:
    """The body's Content-Type if it is JSON or isn't said, else ``UnsupportedMediaType``."""
    if not given:
        return "application/json"
    if given[0] == b"application/json":
        return "application/json"
    media = given[0].partition(b";")[0].strip().lower()
    if len(given) > 1 or (media != b"application/json" and not media.endswith(b"+json")):
        raise UnsupportedMediaType(
            "The body must be JSON; send it with the header 'Content-Type: application/json'."
        )
    return given[0].decode("latin-1")
