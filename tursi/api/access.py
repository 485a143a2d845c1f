"""Who may ask: the Host and Origin of a request, and the roles of the listener it came by.

Every request passes here before its body is read, and every route asks for its
role here. Keys and scopes belong here too.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from twisted.internet.address import UNIXAddress
from twisted.web.http_headers import Headers

from tursi.errors import HostRefused, InvalidRequest, OriginRefused, RoleNotOffered, TursiError
from tursi.model import Role

if TYPE_CHECKING:
    from tursi.api.request import Request

_AUTHORITY = re.compile(rb"(\[[0-9a-f:.]{2,45}\]|[^\s:/?#@\[\]]{1,253})(?::[0-9]{1,5})?")
_LOOPBACK = frozenset({b"localhost", b"127.0.0.1", b"[::1]"})
# Of a Unix socket: nobody's DNS leads there, and clients make up a name.
_LOCAL = _LOOPBACK | {b"tursi"}
_SAME_SITE = frozenset({b"none", b"same-origin"})
_CREDENTIALS = struct.Struct("iII")
"""``struct ucred``: pid, uid, gid."""


class Access:
    """What one listener lets in.

    ``hosts`` are the names to answer for besides those of the loopback
    interface, each with or without a port.
    """

    def __init__(self, hosts: Iterable[str], roles: Iterable[Role]) -> None:
        named = frozenset(host.lower().encode("utf-8") for host in hosts)
        self._hosts = _LOOPBACK | named
        self._local_hosts = _LOCAL | named
        self._roles = frozenset(roles)

    def refusal(self, headers: Headers, *, local: bool) -> TursiError | None:
        """Why a request with these headers is refused, if it is; ``local`` means a Unix socket."""
        hosts = headers.getRawHeaders(b"host") or ()
        if len(hosts) != 1 or not hosts[0]:
            return InvalidRequest("The request needs exactly one Host header.")
        if not self.knows(hosts[0], local=local):
            return HostRefused(
                "This server doesn't answer for the host that the Host header names; use "
                "localhost or 127.0.0.1, or add the name to http.hosts in the configuration."
            )
        if headers.hasHeader(b"origin"):
            return OriginRefused()
        sites = headers.getRawHeaders(b"sec-fetch-site")
        if sites is not None and not _SAME_SITE.issuperset(sites):
            return OriginRefused()
        return None

    def knows(self, host: bytes, *, local: bool) -> bool:
        """Whether the listener answers for ``host``, the value of a Host header."""
        known = self._local_hosts if local else self._hosts
        host = host.lower()
        if host in known:
            return True
        matched = _AUTHORITY.fullmatch(host)
        return matched is not None and matched[1] in known

    def require(self, role: Role) -> None:
        """Raise ``RoleNotOffered`` unless the listener has this role."""
        if role not in self._roles:
            raise RoleNotOffered(
                f"This listener doesn't offer {role.value}; use the control socket."
            )


def caller(request: Request) -> str:
    """Who sent ``request``, in words for the history."""
    peer = request.getClientAddress()
    if not isinstance(peer, UNIXAddress):
        return str(getattr(peer, "host", "unknown"))
    packed = request.transport.getHandle().getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
    )
    _, uid, _ = _CREDENTIALS.unpack(packed)
    return f"uid {uid}"
