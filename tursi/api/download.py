"""A file as an answer: read bit by bit in a thread, as fast as the client takes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool

from tursi.api.request import Request

_PIECE = 256 * 1024
_STALL_SECONDS = 60.0
"""How long a client may take for a piece."""


@dataclass(frozen=True, slots=True)
class Download:
    """The file at ``path``, which is gone when it has been sent."""

    path: Path
    name: str
    """What the client may call it."""


class FileStream:
    """A response that is a file."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._room: Deferred[None] | None = None
        """Waited for while the client reads more slowly than we do."""

    async def run(self, download: Download) -> None:
        """Send it; ends by cancellation when the client leaves."""
        request = self._request
        file = await self._in_thread(lambda: os.open(download.path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            await self._in_thread(download.path.unlink)
            headers = request.responseHeaders
            headers.setRawHeaders(b"Content-Type", [b"application/vnd.sqlite3"])
            headers.setRawHeaders(b"Content-Length", [b"%d" % os.fstat(file).st_size])
            headers.setRawHeaders(
                b"Content-Disposition", [f'attachment; filename="{download.name}"'.encode()]
            )
            request.on_overdue = request.abort
            request.registerProducer(self, True)
            while piece := await self._in_thread(lambda: os.read(file, _PIECE)):
                request.channel.answer_within(_STALL_SECONDS)
                request.write(piece)
                if self._room is not None:
                    await self._room
        finally:
            os.close(file)
            if request.producer is self:
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
