"""Listening: what an endpoint string means, whether it may be used, and binding it at once."""

from __future__ import annotations

import errno
import ipaddress
import socket
from pathlib import Path
from typing import Any

from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.python.failure import Failure

from tursi.config import Listener
from tursi.errors import AddressInUse, ConfigurationError
from tursi.model import Role

_SOCKET_PATH_LIMIT = 107
"""Bytes in the path of a Unix socket on Linux (``sockaddr_un``, without its final NUL)."""


class _Recorder:
    """Stands in for the reactor to see where an endpoint would listen."""

    def __init__(self) -> None:
        self.host = ""
        self.port: int | None = None

    def listenTCP(self, port: int, *_: object, interface: str = "", **__: object) -> None:  # noqa: N802 - Twisted's name
        self.host, self.port = interface, port

    listenSSL = listenTCP  # noqa: N815 - the same

    def listenUNIX(self, *_: object, **__: object) -> None:  # noqa: N802 - the same
        pass


def check(listener: Listener) -> None:
    """Refuse what isn't an endpoint, what would expose control, and a port that is taken.

    Raises ``ConfigurationError`` or ``AddressInUse``; binds nothing for longer
    than the look takes.
    """
    recorder = _Recorder()
    try:
        serverFromString(recorder, listener.endpoint).listen(None)
    except Exception as error:  # noqa: BLE001 - endpoint parsers raise all kinds of errors
        raise ConfigurationError(
            f"http.listeners: {listener.endpoint!r} is not an endpoint: {error}"
        ) from None
    if recorder.port is None:
        return
    if Role.CONTROL in listener.roles and not _is_loopback(recorder.host):
        raise ConfigurationError(
            f"http.listeners: {listener.endpoint!r} would offer control outside this machine; "
            "leave out the role 'control' or add 'interface=127.0.0.1'."
        )
    family = socket.AF_INET6 if ":" in recorder.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((recorder.host, recorder.port))
            probe.listen(1)
        except OSError as error:
            raise _cannot_listen(listener.endpoint, error) from None


def unix(path: Path) -> Listener:
    """A Unix socket with all roles; ``ConfigurationError`` if its path is too long."""
    if len(str(path).encode()) > _SOCKET_PATH_LIMIT:
        raise ConfigurationError(
            f"The socket's path {path} is over {_SOCKET_PATH_LIMIT} bytes; "
            "choose a shorter runtime folder with --runtime."
        )
    # lockfile=0: Twisted's lock is a symbolic link to a pid, which may be
    # reused; the state folder's lock already says that a socket is stale.
    escaped = str(path).replace("\\", "\\\\").replace(":", "\\:").replace("=", "\\=")
    return Listener(endpoint=f"unix:{escaped}:mode=660:lockfile=0", roles=tuple(Role))


def bind(reactor: Any, listener: Listener, factory: IProtocolFactory) -> IListeningPort:
    """Listen now; a failure is raised rather than left in a Deferred."""
    outcome: list[IListeningPort | Failure] = []
    serverFromString(reactor, listener.endpoint).listen(factory).addBoth(outcome.append)
    if not outcome:
        raise ConfigurationError(f"{listener.endpoint!r} doesn't listen at once.")
    if isinstance(outcome[0], Failure):
        error = outcome[0].value
        if isinstance(error, CannotListenError):
            raise _cannot_listen(listener.endpoint, error.socketError)
        raise ConfigurationError(f"{listener.endpoint!r} can't be used: {error}")
    return outcome[0]


def _cannot_listen(endpoint: str, error: OSError) -> AddressInUse:
    if error.errno == errno.EADDRINUSE:
        return AddressInUse(
            f"Another process already listens on {endpoint!r}; stop it, or choose another "
            "port in http.listeners."
        )
    return AddressInUse(f"Tursi can't listen on {endpoint!r}: {error.strerror or error}.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
