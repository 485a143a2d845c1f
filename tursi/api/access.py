"""Who may ask: the Host and Origin of a request, who sends it, and what they may do here.

Every request passes here before its body is read, and every route asks for its
role and scope here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from twisted.internet.address import UNIXAddress
from twisted.web.http_headers import Headers

from tursi.api.keyring import MARK, Keyring
from tursi.api.peer import Peer, peer_of
from tursi.errors import (
    DeploymentForbidden,
    HostRefused,
    InvalidRequest,
    KeyRefused,
    KeyRequired,
    OriginRefused,
    PeerRefused,
    RoleNotOffered,
    ScopeMissing,
    TursiError,
)
from tursi.model import ALL_SCOPES, Caller, Role, Scope

if TYPE_CHECKING:
    from tursi.api.channel import Channel

_AUTHORITY = re.compile(rb"(\[[0-9a-f:.]{2,45}\]|[^\s:/?#@\[\]]{1,253})(?::[0-9]{1,5})?")
_LOOPBACK = frozenset({b"localhost", b"127.0.0.1", b"[::1]"})
# Of a Unix socket: nobody's DNS leads there, and clients make up a name.
_LOCAL = _LOOPBACK | {b"tursi"}
_SAME_SITE = frozenset({b"none", b"same-origin"})
_KEY_IN_QUERY = re.compile(
    rb"tursi_[0-9]|(?:^|&)(?:api[-_]?key|access[-_]?token|token|key|authorization)=", re.IGNORECASE
)
_ADDRESS = re.compile(rb"[0-9A-Fa-f:.]{2,45}")
_WHITESPACE = b" \t"


def needed(method: str, role: Role | None) -> Scope | None:
    """The scope that a route of ``role`` needs, unless its contract says another."""
    if role is Role.CONTROL:
        return Scope.READ if method == "GET" else Scope.ADMIN
    if role is Role.INFERENCE:
        return Scope.INFER
    return Scope.READ if role is Role.METRICS else None


class Access:
    """What one listener lets in.

    ``hosts`` are the names to answer for besides those of the loopback
    interface, each with or without a port; ``origins`` those whose web pages may
    ask. Where ``is_open``, inference and metrics need no key. ``is_proxied``
    means that ``X-Forwarded-For`` is to be believed; ``group`` is that of the
    control socket's users.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        roles: Iterable[Role],
        keyring: Keyring,
        *,
        origins: Iterable[str] = (),
        is_open: bool = True,
        is_proxied: bool = False,
        group: int | None = None,
    ) -> None:
        named = frozenset(host.lower().encode("utf-8") for host in hosts)
        self._hosts = _LOOPBACK | named
        self._local_hosts = _LOCAL | named
        self._origins = frozenset(origin.encode("utf-8") for origin in origins)
        self._roles = frozenset(roles)
        self._is_open = is_open
        self.free = frozenset({Scope.INFER}) if is_open else frozenset[Scope]()
        """What may be done without a key."""
        self.is_proxied = is_proxied
        self._group = group
        self.keyring = keyring

    # -- where a request is for, and where it comes from ----------------------------------

    def refusal(self, headers: Headers, target: bytes, *, local: bool) -> TursiError | None:
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
            if self.allowed_origin(headers) is None:
                return OriginRefused()
        else:
            sites = headers.getRawHeaders(b"sec-fetch-site")
            if sites is not None and not _SAME_SITE.issuperset(sites):
                return OriginRefused()
        _, _, query = target.partition(b"?")
        if query and _KEY_IN_QUERY.search(query):
            return InvalidRequest(
                "A key in the URL would be seen in logs and histories; send it in the header "
                "'Authorization: Bearer KEY'."
            )
        return None

    def knows(self, host: bytes, *, local: bool) -> bool:
        """Whether the listener answers for ``host``, the value of a Host header."""
        known = self._local_hosts if local else self._hosts
        host = host.lower()
        if host in known:
            return True
        matched = _AUTHORITY.fullmatch(host)
        return matched is not None and matched[1] in known

    def allowed_origin(self, headers: Headers) -> bytes | None:
        """The origin of the web page that asks, if it is one that may."""
        origins = headers.getRawHeaders(b"origin") or ()
        return origins[0] if len(origins) == 1 and origins[0] in self._origins else None

    # -- who sends it ----------------------------------------------------------------------

    def visitor(self, channel: Channel) -> Visitor:
        """Who is at the other end of a new connection."""
        transport = channel.transport
        if isinstance(transport.getHost(), UNIXAddress):
            try:
                peer = peer_of(transport)
            except OSError:
                # Gone already; nobody's id.
                peer = Peer(-1)
            return Visitor(self, None, peer, trusted=peer.is_trusted(self._group))
        return Visitor(self, str(getattr(transport.getPeer(), "host", "")) or None, None)

    @property
    def is_control(self) -> bool:
        """Whether the listener has the role control."""
        return Role.CONTROL in self._roles

    # -- what they may do ------------------------------------------------------------------

    def require(self, role: Role | None, scope: Scope | None, caller: Caller) -> None:
        """Raise what keeps ``caller`` from a route with this role and scope, if anything does."""
        if role is not None and role not in self._roles:
            raise RoleNotOffered(
                f"This listener doesn't offer {role.value}; use the control socket."
            )
        if scope is None or scope in caller.scopes:
            return
        if caller.key is not None:
            raise ScopeMissing(
                f"The key {caller.key_name!r} lacks the scope {scope.value!r}, which this needs."
            )
        if role is Role.METRICS and self._is_open:
            return
        raise KeyRequired


class Visitor:
    """The other end of a connection."""

    __slots__ = ("_access", "_anonymous", "_peer", "stranger")

    def __init__(
        self, access: Access, address: str | None, peer: Peer | None, *, trusted: bool = False
    ) -> None:
        self._access = access
        self._peer = None if trusted else peer
        uid = None if peer is None else peer.uid
        self.stranger = Caller(frozenset(), address, uid)
        """The same before it is known what they may do."""
        self._anonymous = Caller(ALL_SCOPES if trusted else access.free, address, uid)

    def caller(
        self, authorization: bytes | None, api_key: bytes | None, forwarded: bytes | None
    ) -> Caller:
        """Who sends a request with these headers, else ``KeyRefused`` or ``PeerRefused``.

        They are those of the header ``Authorization``, ``X-Api-Key`` and
        ``X-Forwarded-For``.
        """
        if self._peer is not None and self._access.is_control:
            raise PeerRefused
        anonymous = self._anonymous
        if authorization is None and api_key is None and forwarded is None:
            return anonymous
        address = anonymous.address
        if forwarded is not None and self._access.is_proxied:
            # The last one is what our proxy has seen; what is before it, anyone may have made up.
            last = forwarded.rpartition(b",")[2].strip(_WHITESPACE)
            if _ADDRESS.fullmatch(last):
                address = last.decode("ascii")
                anonymous = Caller(anonymous.scopes, address)
        token = _token(authorization, api_key)
        if token is None:
            return anonymous
        if token.startswith(MARK):
            return self._access.keyring.find(token).caller(address, anonymous.uid)
        if not anonymous.scopes:
            raise KeyRefused
        # Clients that must have some key send whatever they have.
        return anonymous


def require_deployment(name: str, caller: Caller) -> None:
    """``DeploymentForbidden`` if the caller's key isn't for this deployment."""
    if caller.deployments is not None and name not in caller.deployments:
        raise DeploymentForbidden(f"The key {caller.key_name!r} isn't for the deployment {name!r}.")


def _token(authorization: bytes | None, api_key: bytes | None) -> bytes | None:
    if authorization is not None:
        scheme, _, token = authorization.strip(_WHITESPACE).partition(b" ")
        if scheme.lower() == b"bearer":
            return token.strip(_WHITESPACE)
    return None if api_key is None else api_key.strip(_WHITESPACE)


def single(headers: Headers, name: bytes) -> bytes | None:
    """The header's value, else ``None``; ``InvalidRequest`` if it comes twice."""
    values: Sequence[bytes] = headers.getRawHeaders(name) or ()
    if len(values) > 1:
        raise InvalidRequest(f"The header {name.decode()} comes more than once.")
    return values[0] if values else None
