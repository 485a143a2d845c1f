"""Server-sent events: what has happened, then what happens, until that or the client ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall

from tursi.api.request import Request

T = TypeVar("T")

_MAX_HELD = 256 * 1024
"""Bytes that wait for one slow reader before its stream is cut."""
_KEEP_ALIVE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Follow(Generic[T]):
    """Something that can be followed."""

    subscribe: Callable[[Callable[[T], None]], Callable[[], None]]
    """Calls back with each new item until the function that it returns is called."""
    history: Callable[[], Awaitable[Sequence[T]]]
    """The items so far that the client wants."""
    unseen: Callable[[Sequence[T], Sequence[T]], Sequence[T]]
    """Given the history and what came while it was read: what isn't in it."""
    encode: Callable[[T], bytes]
    """An item as an event."""
    last: Callable[[T], bool] = lambda _: False
    """Whether nothing comes after this item."""


class EventStream:
    """A response of events, bounded however slowly the client reads."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._paused = False
        headers = request.responseHeaders
        headers.setRawHeaders(b"Content-Type", [b"text/event-stream"])
        headers.setRawHeaders(b"Cache-Control", [b"no-cache"])
        headers.setRawHeaders(b"X-Accel-Buffering", [b"no"])

    async def run(self, follow: Follow[T]) -> None:
        """Send what ``follow`` has and gets, until its last; ends by cancellation otherwise."""
        request = self._request
        early: list[T] = []
        live = False
        over: Deferred[None] = Deferred()

        def receive(item: T) -> None:
            if live:
                self._send(follow.encode(item))
                if follow.last(item):
                    over.callback(None)
            else:
                early.append(item)

        # Subscribed before the history is read, or what happens meanwhile is lost.
        unsubscribe = follow.subscribe(receive)
        keep_alive = LoopingCall(self._send, b": keep-alive\n\n")
        keep_alive.clock = request.site.reactor
        try:
            history = await follow.history()
            self._paused = request.channel.congested
            request.registerProducer(self, True)
            # The headers go out now, even if nothing has happened yet.
            request.write(b": follows\n\n")
            past = (*history, *follow.unseen(history, early))
            # Bounded by what the client asked for, unlike what comes later.
            request.write(b"".join(follow.encode(item) for item in past))
            if any(map(follow.last, past)):
                return
            live = True
            keep_alive.start(_KEEP_ALIVE_SECONDS, now=False)
            await over
            self.resumeProducing()
        finally:
            unsubscribe()
            if request.channel is not None and request.producer is self:
                request.unregisterProducer()
            if keep_alive.running:
                keep_alive.stop()

    def _send(self, data: bytes) -> None:
        if not self._paused:
            self._request.write(data)
            return
        self._held_bytes += len(data)
        self._held.append(data)
        if self._held_bytes > _MAX_HELD and self._request.channel is not None:
            self._request.channel.abort()

    def pauseProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The client reads more slowly than things happen."""
        self._paused = True

    def resumeProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The client has caught up."""
        self._paused = False
        held, self._held, self._held_bytes = self._held, [], 0
        if held:
            self._request.write(b"".join(held))

    def stopProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The connection is gone; the request's end says so too."""
