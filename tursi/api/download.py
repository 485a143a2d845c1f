"""Many bytes as an answer: made bit by bit in a thread, as fast as the client takes them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool

from tursi.api.request import Request

_STALL_SECONDS = 60.0
"""How long a client may take for a piece."""


@dataclass(frozen=True, slots=True)
class Download:
    """What ``open`` gives: how many bytes there are, and all of them, piece by piece.

    It is called in a thread, and so is each step of the iterator, whose pieces may be
    empty while there is something else to do.
    """

    open: Callable[[], tuple[int, Iterator[bytes]]]
    name: str
    """What the client may call it."""
    media: str


class _Steps:
    """Opens, takes and closes one after the other, whatever thread each is called in."""

    def __init__(self, download: Download) -> None:
        self._open = download.open
        self._pieces: Iterator[bytes] | None = None
        self._lock = Lock()
        self._closed = False

    def open(self) -> int:
        with self._lock:
            size, self._pieces = self._open()
            return size

    def take(self) -> bytes | None:
        with self._lock:
            return None if self._closed or self._pieces is None else next(self._pieces, None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if isinstance(self._pieces, Generator):
                self._pieces.close()


class FileStream:
    """A response that is a file."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._room: Deferred[None] | None = None
        """Waited for while the client reads more slowly than we do."""

    async def run(self, download: Download) -> None:
        """Send it; ends by cancellation when the client leaves."""
        request, steps = self._request, _Steps(download)
        try:
            size = await self._in_thread(steps.open)
            headers = request.responseHeaders
            headers.setRawHeaders(b"Content-Type", [download.media.encode("ascii")])
            headers.setRawHeaders(b"Content-Length", [b"%d" % size])
            headers.setRawHeaders(
                b"Content-Disposition", [f'attachment; filename="{download.name}"'.encode()]
            )
            request.on_overdue = request.abort
            request.registerProducer(self, True)
            # The headers go out now: the first piece may take a while.
            request.write(b"")
            while (piece := await self._in_thread(steps.take)) is not None:
                request.channel.answer_within(_STALL_SECONDS)
                if piece:
                    request.write(piece)
                if self._room is not None:
                    await self._room
        finally:
            # A step may still be under way, and is waited for there.
            self._in_thread(steps.close)
            if request.channel is not None and request.producer is self:
                request.unregisterProducer()

    def _in_thread(self, work: Callable[[], Any]) -> Deferred[Any]:
        reactor: Any = self._request.site.reactor
        return deferToThreadPool(reactor, reactor.getThreadPool(), work)

    def pauseProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The client reads more slowly."""
        self._room = self._room or Deferred()

    def resumeProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The client has caught up."""
        room, self._room = self._room, None
        if room is not None and not room.called:
            room.callback(None)

    def stopProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The connection is gone; the request's end says so too."""
