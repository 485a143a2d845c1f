"""One listener's HTTP site: its connections, their bound, and the look at their deadlines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from twisted.internet.interfaces import IAddress
from twisted.web import http, server
from twisted.web.resource import IResource

from tursi.api.access import Access
from tursi.api.channel import Channel
from tursi.api.request import Request
from tursi.config import Http


class Site(server.Site):
    """The factory of a listener's connections.

    ``new_id`` makes ids of requests and incidents, unique in this daemon.
    """

    protocol = Channel  # type: ignore[assignment] # no proxy that may become HTTP/2
    access: Access

    def __init__(
        self,
        resource: IResource,
        access: Access,
        settings: Http,
        *,
        new_id: Callable[[], bytes],
        reactor: Any,
    ) -> None:
        # Parsing forms costs more than all the rest of a request. Twisted's own
        # time-out is replaced by the deadlines of the channel.
        super().__init__(
            resource, Request, timeout=None, parsePOSTFormSubmission=False, reactor=reactor
        )
        self.access = access
        self.settings = settings
        self.new_id = new_id
        self.channels: set[Channel] = set()
        """Open connections."""
        shortest = min(settings.header_seconds, settings.body_seconds, settings.idle_seconds)
        self._interval = min(1.0, shortest / 4)
        self._look: Any = None
        self._second = -1
        self._date = b""

    def startFactory(self) -> None:  # noqa: N802 - Twisted's name
        """Nothing: Twisted would keep a clock for its access log."""

    def stopFactory(self) -> None:  # noqa: N802 - Twisted's name
        """Nothing: open connections finish what they are at."""

    def log(self, request: http.Request) -> None:
        """Nothing: a line per request costs half as much as the request."""

    def acceptableProtocols(self) -> list[bytes]:  # noqa: N802 - Twisted's name
        """HTTP/1.1 only, over TLS too."""
        return [b"http/1.1"]

    def buildProtocol(  # type: ignore[override]  # noqa: N802 - Channel is no such proxy; Twisted's name
        self, addr: IAddress | None
    ) -> Channel | None:
        """A new connection, or ``None`` to close it where there are too many."""
        if len(self.channels) >= self.settings.max_connections:
            return None
        return cast("Channel", super().buildProtocol(addr))

    def date(self) -> bytes:
        """Now, for the Date header; made anew once a second."""
        second = int(self.reactor.seconds())
        if second != self._second:
            self._second, self._date = second, http.datetimeToString()
        return self._date

    def opened(self, channel: Channel) -> None:
        """Watch the deadlines of ``channel``."""
        self.channels.add(channel)
        if self._look is None:
            self._look = self.reactor.callLater(self._interval, self._look_at_deadlines)

    def closed(self, channel: Channel) -> None:
        """The connection is gone."""
        self.channels.discard(channel)
        if not self.channels and self._look is not None:
            self._look.cancel()
            self._look = None

    def _look_at_deadlines(self) -> None:
        self._look = self.reactor.callLater(self._interval, self._look_at_deadlines)
        now = self.reactor.seconds()
        for channel in [each for each in self.channels if each.deadline <= now]:
            channel.overdue()
