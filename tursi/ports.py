"""The ports that the daemon listens on, and changing them while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from twisted.internet.defer import maybeDeferred
from twisted.internet.interfaces import IListeningPort

from tursi.api.site import Site
from tursi.certificates import Certificates, certificates
from tursi.config import Listener
from tursi.errors import AddressInUse, ConfigurationError, TursiError
from tursi.listen import bind


class Ports:
    """One port per listener; ``make_site`` makes what answers there."""

    def __init__(self, reactor: Any, make_site: Callable[[Listener], Site]) -> None:
        self._reactor = reactor
        self._make_site = make_site
        self._open: dict[str, tuple[IListeningPort, Site]] = {}
        self._certificates: dict[str, Certificates] = {}

    def open(self, listeners: Iterable[Listener]) -> None:
        """Listen there; raises why that can't be."""
        for listener in listeners:
            if listener.endpoint in self._open:
                raise _twice(listener)
            site, reactor = self._make_site(listener), self._reactor
            secured = certificates(listener)
            if secured is not None:
                reactor = secured.reactor(reactor)
                self._certificates[listener.endpoint] = secured
            self._open[listener.endpoint] = (bind(reactor, listener, site), site)

    async def change(self, old: Sequence[Listener], new: Sequence[Listener]) -> bool:
        """Listen where ``new`` says instead of ``old``; where that fails, as before.

        What both have is left alone, but that its certificates are read again; whether
        there are new ones is the answer. Open connections stay.
        """
        renewed = False
        endpoints = [each.endpoint for each in new]
        for each in new:
            if endpoints.count(each.endpoint) > 1:
                raise _twice(each)
            if each.endpoint in self._open and each.endpoint in self._certificates:
                renewed |= self._certificates[each.endpoint].reload()
        added = [each for each in new if each.endpoint not in self._open]
        kept = {each.endpoint for each in new}
        dropped = [each for each in old if each.endpoint not in kept]
        opened: list[Listener] = []
        try:
            try:
                self._extend(added, opened)
            except AddressInUse:
                # Perhaps by ourselves: another interface, the same port.
                await self._close(dropped)
                self._extend(added[len(opened) :], opened)
        except TursiError:
            await self._close(opened)
            self.open(each for each in dropped if each.endpoint not in self._open)
            raise
        await self._close(dropped)
        return renewed

    def sites(self, listeners: Iterable[Listener]) -> Iterable[tuple[Listener, Site]]:
        """What answers on each of them."""
        return [(each, self._open[each.endpoint][1]) for each in listeners]

    async def close(self) -> None:
        """Listen nowhere."""
        for endpoint in list(self._open):
            port, _ = self._open.pop(endpoint)
            await maybeDeferred(port.stopListening)

    def _extend(self, listeners: Iterable[Listener], opened: list[Listener]) -> None:
        for listener in listeners:
            self.open([listener])
            opened.append(listener)

    async def _close(self, listeners: Iterable[Listener]) -> None:
        for listener in listeners:
            found = self._open.pop(listener.endpoint, None)
            if found is not None:
                await maybeDeferred(found[0].stopListening)


def _twice(listener: Listener) -> ConfigurationError:
    return ConfigurationError(
        f"http.listeners: {listener.endpoint!r} is there twice; leave one out."
    )
