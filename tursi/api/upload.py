"""A body that is handed on while it arrives, as fast as it is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred

from tursi.errors import RequestCancelled

if TYPE_CHECKING:
    from tursi.api.request import Request

_ENOUGH = 1024 * 1024
"""Bytes that wait to be taken before the client is made to wait."""
STALL_SECONDS = 60.0
"""How long a client may send nothing."""


class Upload:
    """The body of one request; ``read`` until it gives nothing."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._pieces: list[bytes] = []
        self._held = 0
        self._paused = False
        self._waiting: Deferred[None] | None = None
        self._lost = False
        self._at_end: Callable[[], None] | None = None
        self.complete = False
        """Whether all of it has arrived."""

    async def read(self) -> bytes:
        """What has arrived since the last time; nothing at the end; ``RequestCancelled``."""
        while not (self._pieces or self.complete or self._lost):
            self._waiting = Deferred()
            await self._waiting
        if self._lost:
            raise RequestCancelled
        pieces, self._pieces, self._held = self._pieces, [], 0
        if self._paused:
            self._paused = False
            self._request.channel.take_more()
        return b"".join(pieces)

    def feed(self, data: bytes) -> None:
        """A piece of it has arrived."""
        self._pieces.append(data)
        self._held += len(data)
        if self._held >= _ENOUGH and not self._paused:
            self._paused = True
            self._request.channel.take_no_more()
        self._wake()

    def at_end(self, call: Callable[[], None]) -> None:
        """Call that when all of it has arrived."""
        if self.complete:
            call()
        else:
            self._at_end = call

    def end(self) -> None:
        """All of it has arrived."""
        self.complete = True
        if self._at_end is not None:
            self._at_end()
        self._wake()

    def lose(self) -> None:
        """No more of it will arrive."""
        self._lost = True
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.callback(None)
