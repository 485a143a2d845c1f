"""One listener's HTTP site: its connections, their bound, and the look at their deadlines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from twisted.internet.interfaces import IAddress
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web import http, server
from twisted.web.resource import IResource

from tursi.api.access import Access
from tursi.api.channel import Channel
from tursi.api.hot import HotChannel
from tursi.api.request import Request
from tursi.config import Http
from tursi.errors import InternalError

if TYPE_CHECKING:
    from tursi.api.audit import Audit
    from tursi.api.inference import Inference

log = Logger()

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class Site(server.Site):
    """The factory of a listener's connections.

    ``resource`` answers requests, ``inference`` those that are recognised before
    ``twisted.web`` has looked at them. ``uploads`` are methods and paths whose bodies are
    handed on while they arrive. ``new_id`` makes ids of requests and
    incidents, unique in this daemon.
    """

    access: Access

    def __init__(
        self,
        resource: IResource,
        inference: Inference,
        access: Access,
        settings: Http,
        audit: Audit,
        *,
        uploads: frozenset[tuple[bytes, bytes]] = frozenset(),
        new_id: Callable[[], bytes],
        reactor: Any,
    ) -> None:
        # Parsing forms costs more than all the rest of a request. Twisted's own
        # time-out is replaced by the deadlines of the channel.
        super().__init__(
            resource, Request, timeout=None, parsePOSTFormSubmission=False, reactor=reactor
        )
        self.inference = inference
        self.audit = audit
        self.uploads = uploads
        self.new_id = new_id
        self.channels: set[Channel] = set()
        """Open connections."""
        self._peers: Counter[str] = Counter()
        """How many of them each address has."""
        self.configure(access, settings)
        self._look: Any = None
        self._second = -1
        self._date = b""

    def configure(self, access: Access, settings: Http) -> None:
        """Go by these from now on; open connections too."""
        # No proxy that may become HTTP/2.
        self.protocol: Any = HotChannel if settings.hot_path else Channel
        self.access = access
        self.settings = settings
        shortest = min(settings.header_seconds, settings.body_seconds, settings.idle_seconds)
        self._interval = min(1.0, shortest / 4)
        for channel in self.channels:
            channel.visitor = access.visitor(channel)

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
        settings = self.settings
        host = getattr(addr, "host", None)
        if (
            host is not None
            and not self.access.is_proxied
            and self._peers[host] >= settings.max_connections_per_peer
        ) or (len(self.channels) >= settings.max_connections and not self._make_room()):
            return None
        channel = cast("Channel", super().buildProtocol(addr))
        channel.host = host
        return channel

    def _make_room(self) -> bool:
        """Close a connection that waits for its client, of the one who has most of them."""
        waiting = [each for each in self.channels if each.is_waiting]
        if not waiting:
            return False
        victim = min(waiting, key=lambda each: (-self._peers[each.host or ""], each.deadline))
        # Now: it would be told of its end only in another turn of the reactor.
        self.closed(victim)
        victim.abort()
        return True

    def request_id(self, given: bytes | None) -> bytes:
        """The client's id for its request if it is one that can do no harm, or a new one."""
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given
        return self.new_id()

    def incident(self, failure: Failure, method: bytes, path: bytes) -> InternalError:
        """Log a defect; the error that tells the client its id and nothing else."""
        incident = self.new_id().decode("ascii")
        log.failure(
            "incident {incident}: {method} {path} failed",
            failure,
            incident=incident,
            method=method,
            path=path,
        )
        return InternalError(
            f"Tursi failed; its log has the details under incident {incident}.", reference=incident
        )

    def date(self) -> bytes:
        """Now, for the Date header; made anew once a second."""
        second = int(self.reactor.seconds())
        if second != self._second:
            self._second, self._date = second, http.datetimeToString()
        return self._date

    def opened(self, channel: Channel) -> None:
        """Watch the deadlines of ``channel``."""
        self.channels.add(channel)
        self._peers[channel.host or ""] += 1
        if self._look is None:
            self._look = self.reactor.callLater(self._interval, self._look_at_deadlines)

    def closed(self, channel: Channel) -> None:
        """The connection is gone."""
        if channel not in self.channels:
            return
        self.channels.remove(channel)
        host = channel.host or ""
        self._peers[host] -= 1
        if not self._peers[host]:
            del self._peers[host]
        if not self.channels and self._look is not None:
            self._look.cancel()
            self._look = None

    def _look_at_deadlines(self) -> None:
        self._look = self.reactor.callLater(self._interval, self._look_at_deadlines)
        now = self.reactor.seconds()
        for channel in [each for each in self.channels if each.deadline <= now]:
            channel.overdue()
