"""Whom a fetcher connects to, wherever a hub and its content hosts send it.

What an attacker has put into a repository or a mirror must not make this machine ask
its own network on the attacker's behalf (server-side request forgery). So every address
is looked at where a name becomes one, which a redirect or a second answer of a name
server can't get around.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from functools import cache
from ipaddress import IPv6Address, ip_address
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from tursi.errors import FetchError

_resolve = socket.getaddrinfo


def confine(hub: str) -> None:
    """From now on refuse to connect to what ``hub``, a URL, has no business with.

    Whoever connects then gets ``FetchError``.
    """
    ours = {urlsplit(url).hostname for url in (hub, *getproxies().values())}

    @cache
    def is_inside() -> bool:
        return not all(ip_address(each).is_global for each in _addresses(urlsplit(hub).hostname))

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        found = _resolve(host, *arguments, **options)
        name = host.decode() if isinstance(host, bytes) else host
        if name not in ours:
            for *_, (address, *_) in found:
                if not is_allowed(str(address), inside=is_inside()):
                    raise FetchError(
                        f"{hub} leads to {name} ({address}), which is no place of files of a "
                        "public hub: check endpoint under [hub]."
                    )
        return found

    socket.getaddrinfo = resolve


def is_allowed(address: str, *, inside: bool) -> bool:
    """Whether content may come from ``address``; ``inside``: the hub itself isn't public.

    Link-local addresses, where clouds keep their machines' credentials, never have any.
    """
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    if found.is_link_local or found.is_multicast or found.is_unspecified:
        return False
    return found.is_global or inside


def _addresses(host: str | None) -> Iterable[str]:
    """Those of the hub; none where only a proxy knows them."""
    try:
        return [str(address) for *_, (address, *_) in _resolve(host, None)]
    except OSError:
        return []
