"""The contract of a handler, kept on the handler, and its service over HTTP by Klein.

A handler takes domain arguments and returns a domain value. Whatever has to do
with HTTP (decoding, validating, encoding, status, errors) is done here; the
OpenAPI document is made from the same contracts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import msgspec
from klein import Klein
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi import errors
from tursi.api.access import needed
from tursi.api.download import Download, FileStream
from tursi.api.request import Request
from tursi.api.stream import EventStream, Follow
from tursi.errors import DeadlineExceeded, InvalidRequest, TursiError, UnsupportedMediaType
from tursi.faces.body import answer
from tursi.faces.openai.errors import answer as error_answer
from tursi.faces.route import Answer, decoded
from tursi.model import Role, Scope

T = TypeVar("T")
log = Logger()
Handler = TypeVar("Handler", bound=Callable[..., Any])

_CONTRACT = "__contract__"


@dataclass(frozen=True, slots=True)
class Contract:
    """What an endpoint takes and gives."""

    method: str
    path: str
    """In werkzeug's syntax."""
    role: Role | None
    """The role that the listener needs; ``None`` means that any will do."""
    reply: Any
    """Its type, or a tuple of the types that it may have; ``bytes`` where it isn't JSON."""
    body: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None
    statuses: tuple[int, ...] = (200,)
    """The first is the usual one."""
    follow: Any = None
    """Type of the events that ``follow=1`` streams."""
    media: str = "application/json"
    upload: str | None = None
    """Content type of a body that the handler gets as ``upload``, while it arrives."""
    scope: Scope | None = None
    """What a key needs for it; by default what ``access.needed`` says of its role."""

    def __post_init__(self) -> None:
        """Every route has its rule."""
        if self.scope is None:
            object.__setattr__(self, "scope", needed(self.method, self.role))

    @property
    def replies(self) -> tuple[Any, ...]:
        """The types of a reply in JSON."""
        found = self.reply if isinstance(self.reply, tuple) else (self.reply,)
        return tuple(each for each in found if each is not bytes)

    @property
    def name(self) -> str:
        """Its name in the router."""
        return f"{self.method} {self.path}"


@dataclass(frozen=True, slots=True)
class Status(Generic[T]):
    """A reply with another status than the usual one."""

    status: int
    value: T


@dataclass(frozen=True, slots=True)
class Text:
    """A reply that isn't JSON."""

    content_type: str
    data: bytes


def endpoint(method: str, path: str, **contract: Any) -> Callable[[Handler], Handler]:
    """Declare a handler's ``Contract``; fields of query and body become its arguments by name.

    Besides those and the parts of the path it may take ``caller``, ``by`` (the caller in
    words), ``accept`` (the header) and ``upload``.
    """

    def declare(handler: Handler) -> Handler:
        setattr(handler, _CONTRACT, Contract(method, path, **contract))
        return handler

    return declare


def endpoints(owner: object) -> Iterator[tuple[Contract, Callable[..., Any]]]:
    """The handlers of ``owner`` with their contracts, in the order of the source."""
    for name in vars(type(owner)):
        handler = getattr(owner, name)
        contract = getattr(handler, _CONTRACT, None)
        if contract is not None:
            yield contract, handler


def router(seconds: Callable[[], float], *owners: object) -> Klein:
    """A Klein application of all handlers; each has ``seconds`` to answer."""
    app = Klein()
    app.url_map.merge_slashes = False
    for owner in owners:
        for contract, handler in endpoints(owner):
            service = _Service(contract, handler, seconds)
            route = app.route(contract.path, methods=[contract.method], endpoint=contract.name)
            route(service.answer)
    app.handle_errors(HTTPException)(_unrouted)
    return app


def _unrouted(request: Any, failure: Failure) -> Any:
    """Nothing is at this path, or not for this method."""
    allowed: set[str] = set()
    if isinstance(failure.value, MethodNotAllowed):
        allowed.update(failure.value.valid_methods or ())
    if request.match is not None:
        allowed.add("POST")
    if not allowed:
        return request.prepare(
            error_answer(errors.RouteNotFound("There is nothing at this path; see /openapi.json."))
        )
    methods = ", ".join(sorted(allowed))
    request.setHeader(b"Allow", methods.encode("ascii"))
    return request.prepare(
        error_answer(errors.MethodNotAllowed(f"This path takes {methods} only."))
    )


class _Service:
    """Answers requests by one handler."""

    def __init__(
        self, contract: Contract, handler: Callable[..., Any], seconds: Callable[[], float]
    ) -> None:
        self._contract = contract
        self._handler = handler
        self._seconds = seconds
        self._names = inspect.signature(handler).parameters.keys()
        self._body = msgspec.json.Decoder(contract.body) if contract.body else None
        self._query = msgspec.json.Decoder(contract.query, strict=False) if contract.query else None

    async def answer(self, request: Request, **parts: str) -> bytes | None:
        """The body to write; Klein writes it."""
        try:
            value = await self._within(request, self._audited(request, parts))
            if isinstance(value, Follow):
                return await self._follow(request, value)
            if isinstance(value, Download):
                await self._send(request, value)
                return None
            return request.prepare(self._answer(value))
        except CancelledError:
            raise
        except TursiError as error:
            shown = error if request.caller.trusted else error.discreet()
        except Exception:  # noqa: BLE001 - whatever it is, the client gets an answer
            shown = request.incident(Failure())
        if request.startedWriting:
            # The client finds out by the length, the operator here.
            log.warn(
                "the answer to {method} {path} was broken off: {message}",
                method=self._contract.method,
                path=self._contract.path,
                message=shown.message,
            )
            request.abort()
        elif request.upload is None or request.upload.complete:
            return request.prepare(error_answer(shown))
        else:
            request.channel.refuse(shown)
        # Until the connection is gone, which cancels this.
        return await Deferred[bytes]()

    async def _audited(self, request: Request, parts: dict[str, str]) -> Any:
        audit, arguments = request.site.audit, dict[str, Any](parts)
        try:
            access, caller = request.site.access, request.caller
            access.require(self._contract.role, self._contract.scope, caller)
            access.keyring.admit(caller)
            self._read(request, arguments)
            value = self._handler(**arguments)
            value = await value if inspect.isawaitable(value) else value
        except Exception as error:
            audit.failed(request, self._contract, arguments, error)
            raise
        if arguments.get("dry_run") is not True:
            status = value.status if isinstance(value, Status) else self._contract.statuses[0]
            if self._contract.upload is not None:
                arguments["name"] = _about(value)
            await audit.done(request, self._contract, arguments, status)
        return value

    def _read(self, request: Request, arguments: dict[str, Any]) -> None:
        """Add to ``arguments`` what the request has for the handler."""
        body = request.body
        if self._contract.upload is not None:
            _require(self._contract.upload, request.content_types or [b""])
            if request.upload is None:
                raise AssertionError("an upload is taken before it is here")
            arguments["upload"] = request.upload
        elif body or self._body is not None:
            _require_json(request.requestHeaders.getRawHeaders(b"content-type") or [b""])
        if self._query is not None:
            arguments.update(_fields(_decode_query(self._query, request.args)))
        if self._body is not None:
            arguments.update(_fields(decoded(self._body, body)))
        if "by" in self._names:
            arguments["by"] = str(request.caller)
        if "caller" in self._names:
            arguments["caller"] = request.caller
        if "accept" in self._names:
            arguments["accept"] = (request.getHeader(b"accept") or b"").decode("latin-1")

    async def _within(self, request: Request, work: Any) -> Any:
        """What ``work`` gives, but don't wait longer than the deadline, or for who has left.

        The work itself goes on: a change that is half made in the database would
        be worse than one whose client doesn't hear of it.
        """
        waiting: Deferred[Any] = Deferred()
        seconds = self._seconds()

        def done(outcome: object) -> None:
            if not waiting.called:
                waiting.callback(outcome)
            elif isinstance(outcome, Failure) and not outcome.check(TursiError):
                request.incident(outcome)

        def overdue() -> None:
            if not waiting.called:
                waiting.errback(DeadlineExceeded(f"The answer took over {seconds:g} s."))

        Deferred.fromCoroutine(work).addBoth(done)
        if not waiting.called:
            request.on_overdue = overdue
            if request.upload is None:
                request.channel.answer_within(seconds)
            else:
                request.upload.at_end(lambda: request.channel.answer_within(seconds))
        return await waiting

    def _answer(self, value: Any) -> Answer:
        status = self._contract.statuses[0]
        if isinstance(value, Text):
            return Answer(status, value.content_type, value.data)
        if isinstance(value, Status):
            status, value = value.status, value.value
        return answer(jsonable(value), status=status)

    async def _follow(self, request: Request, follow: Follow[Any]) -> bytes | None:
        request.on_overdue = None
        stream = EventStream(request)
        if request.method == b"HEAD":
            return b""
        await stream.run(follow)
        return None

    async def _send(self, request: Request, download: Download) -> None:
        request.on_overdue = None
        await FileStream(request).run(download)


def _about(value: Any) -> str | None:
    """The name of the deployment that an answer tells of."""
    found = value.value if isinstance(value, Status) else value
    return getattr(getattr(found, "deployment", None), "name", None)


def _fields(value: msgspec.Struct) -> dict[str, Any]:
    return msgspec.structs.asdict(value)


def _decode_query(decoder: msgspec.json.Decoder[Any], given: dict[bytes, list[bytes]]) -> Any:
    try:
        values = {name.decode(): found[-1].decode() for name, found in given.items()}
    except UnicodeDecodeError:
        raise InvalidRequest("The query isn't valid UTF-8.") from None
    try:
        return decoded(decoder, msgspec.json.encode(values))
    except InvalidRequest as error:
        message = error.message.replace("The body", "The query", 1)
        raise InvalidRequest(message, param=error.param) from None


def _require(wanted: str, types: Sequence[bytes]) -> None:
    if len(types) > 1 or types[0].partition(b";")[0].strip().lower() != wanted.encode("ascii"):
        raise UnsupportedMediaType(f"The body must be sent with 'Content-Type: {wanted}'.")


def _require_json(types: Sequence[bytes]) -> None:
    if len(types) > 1 or types[0].partition(b";")[0].strip().lower() != b"application/json":
        raise UnsupportedMediaType(
            "The body must be JSON; send it with the header 'Content-Type: application/json'."
        )


_DIGITS = 19
"""Fewer than these always fit into what SQLite counts with."""


def identity(text: str) -> int | None:
    """The id that a part of a path names; ``None`` if no id can look so."""
    if not (text.isascii() and text.isdigit() and len(text) < _DIGITS):
        return None
    return int(text)


# -- values as JSON ---------------------------------------------------------------------


def is_time(name: str) -> bool:
    """Whether a field of this name is a point in time, which is shown in RFC 3339."""
    return name in {"at", "since"} or name.endswith("_at")


def jsonable(value: Any) -> Any:
    """``value`` in JSON's types, its times as RFC 3339 strings in UTC."""
    return _timed(msgspec.to_builtins(value))


def _timed(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _time(item) if is_time(name) and isinstance(item, int | float) else _timed(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_timed(item) for item in value]
    return value


def _time(value: float) -> str:
    text = datetime.fromtimestamp(value, UTC).isoformat(timespec="milliseconds")
    return text.removesuffix("+00:00") + "Z"
