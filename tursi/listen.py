"""Listening: what an endpoint string means, whether it may be used, and binding it at once."""

from __future__ import annotations

import errno
import grp
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.internet.unix import Port as UnixPort
from twisted.python.failure import Failure

from tursi.config import Listener
from tursi.errors import AddressInUse, AlreadyRunning, ConfigurationError
from tursi.model import Role

_SOCKET_PATH_LIMIT = 107
"""Bytes in the path of a Unix socket on Linux (``sockaddr_un``, without its final NUL)."""


_MAX_HANDED_OVER = 64


class _HandedOver(Exception):
    """Keeps an endpoint from closing the descriptor that it would listen on."""


class _Recorder:
    """Stands in for the reactor to see where an endpoint would listen."""

    def __init__(self) -> None:
        self.host = ""
        self.port: int | None = None
        self.descriptor: int | None = None
        """The socket, where the service manager has handed it over,"""
        self.family: int | None = None
        """and its address family."""
        self.context: Any = None
        """For TLS, if it has that."""

    def listenTCP(self, port: int, *_: object, interface: str = "", **__: object) -> None:  # noqa: N802 - Twisted's name
        self.host, self.port = interface, port

    def listenSSL(  # noqa: N802 - the same
        self,
        port: int,
        _: object,
        contextFactory: Any,  # noqa: N803 - the same
        interface: str = "",
        **__: object,
    ) -> None:
        self.host, self.port, self.context = interface, port, contextFactory

    def listenUNIX(self, *_: object, **__: object) -> None:  # noqa: N802 - the same
        pass

    def adoptStreamPort(self, descriptor: int, family: int, _: object) -> None:  # noqa: N802 - the same
        with socket.fromfd(descriptor, -1, -1) as one:
            if one.family != family:
                right = one.family.name.removeprefix("AF_")
                raise ValueError(f"the socket is of the domain {right}")
            if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise ValueError("the socket doesn't listen (its unit must say Accept=no)")
            if family != socket.AF_UNIX:
                self.host, self.port = one.getsockname()[:2]
        self.descriptor, self.family = descriptor, family
        raise _HandedOver


def _look(endpoint: str) -> _Recorder:
    """Where an endpoint would listen; raises whatever its parser does."""
    recorder = _Recorder()
    outcome: list[object] = []
    serverFromString(recorder, endpoint).listen(None).addErrback(outcome.append)
    for failure in outcome:
        if isinstance(failure, Failure) and not failure.check(_HandedOver):
            failure.raiseException()
    return recorder


def look_at(listener: Listener) -> _Recorder:
    """Where the listener would listen; ``ConfigurationError`` if that isn't an endpoint."""
    try:
        recorder = _look(listener.endpoint)
    except (KeyError, IndexError):
        raise ConfigurationError(
            f"http.listeners: systemd has handed over no socket for {listener.endpoint!r}; its "
            "name is FileDescriptorName= of the .socket unit, and the service must be started by "
            "systemd."
        ) from None
    except Exception as error:  # noqa: BLE001 - endpoint parsers raise all kinds of errors
        raise ConfigurationError(
            f"http.listeners: {listener.endpoint!r} is not an endpoint: {error}"
        ) from None
    return recorder


def needs_keys(listener: Listener) -> bool:
    """Whether others than this machine's users may come by it."""
    place = look_at(listener)
    return listener.behind_proxy or (place.port is not None and not _is_loopback(place.host))


def check(listener: Listener) -> None:
    """Refuse what isn't an endpoint, what would send keys in the clear, and a port that is taken.

    Raises ``ConfigurationError`` or ``AddressInUse``; binds nothing for longer
    than the look takes.
    """
    recorder = look_at(listener)
    if recorder.port is None:
        return
    exposed = not _is_loopback(recorder.host) and not listener.behind_proxy
    if exposed and recorder.context is None:
        interface = f":interface={recorder.host}" if recorder.host else ""
        raise ConfigurationError(
            f"http.listeners: {listener.endpoint!r} can be reached from other machines without "
            "TLS. Write  behind_proxy = true  under it if a proxy with TLS is in front of it, or "
            f'write  endpoint = "ssl:{recorder.port}{interface}:privateKey=KEY.pem:'
            f'certKey=CHAIN.pem"  , or  endpoint = "tcp:{recorder.port}:interface=127.0.0.1"  .'
        )
    if recorder.descriptor is not None:
        return
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


def control(path: Path, others: Iterable[Listener]) -> Listener:
    """The control socket: one that the service manager hands over for ``path``, else our own.

    ``ConfigurationError`` if one of the ``others`` claims it, or the path is too long.
    """
    for endpoint, descriptor in _handed_over():
        with socket.fromfd(descriptor, -1, -1) as one:
            if one.family != socket.AF_UNIX or os.fsdecode(one.getsockname()) != str(path):
                continue
        for other in others:
            if is_handed_over(other) and _look(other.endpoint).descriptor == descriptor:
                raise ConfigurationError(
                    f"http.listeners: {other.endpoint!r} is the control socket itself, which "
                    "needs no entry; leave it out."
                )
        return Listener(endpoint=endpoint, roles=tuple(Role))
    return unix(path)


def check_nobody_serves(path: Path) -> None:
    """Raise ``AlreadyRunning`` if somebody listens on the Unix socket ``path``."""
    with socket.socket(socket.AF_UNIX) as one:
        one.setblocking(False)
        try:
            one.connect(str(path))
        except BlockingIOError:
            pass  # it does, and is busy
        except OSError:
            return
    raise AlreadyRunning(
        f"Another daemon, with another state folder, serves {path}; choose another runtime folder "
        "with --runtime."
    )


def is_handed_over(listener: Listener) -> bool:
    """Whether its socket is the service manager's, which goes on listening without us."""
    return listener.endpoint.startswith("systemd:")


def unclaimed(listeners: Iterable[Listener]) -> list[str]:
    """What the service manager has handed over and no listener uses; call before binding.

    Nobody would answer there. No child inherits them.
    """
    claimed = {_look(each.endpoint).descriptor for each in listeners if is_handed_over(each)}
    found = []
    for endpoint, descriptor in _handed_over():
        os.set_inheritable(descriptor, False)
        if descriptor not in claimed:
            with socket.fromfd(descriptor, -1, -1) as one:
                found.append(f"{endpoint} ({one.getsockname()})")
    return found


def _handed_over() -> Iterator[tuple[str, int]]:
    """An endpoint and the descriptor of each socket from the service manager."""
    for index in range(_MAX_HANDED_OVER):
        for domain in ("UNIX", "INET", "INET6"):
            endpoint = f"systemd:domain={domain}:index={index}"
            try:
                found = _look(endpoint).descriptor
            except IndexError:
                return
            except (ValueError, OSError):
                continue
            if found is not None:
                yield endpoint, found


def bind(reactor: Any, listener: Listener, factory: IProtocolFactory) -> IListeningPort:
    """Listen now; a failure is raised rather than left in a Deferred."""
    if is_handed_over(listener):
        found = _look(listener.endpoint)
        if found.descriptor is not None:
            return _adopt(reactor, found, factory)
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


def _adopt(reactor: Any, found: _Recorder, factory: IProtocolFactory) -> IListeningPort:
    """Listen on a copy of the service manager's socket, and leave that as it was.

    Twisted's own way closes the socket that it copies; a reload looks at it again.
    """
    descriptor: Any = found.descriptor
    os.set_blocking(descriptor, False)
    if found.port is not None:
        adopted: IListeningPort = reactor.adoptStreamPort(descriptor, found.family, factory)
        return adopted
    # And it opens a Unix socket to everybody; and with the port it would shut the
    # socket down and remove its file, so that no later start could serve it.
    port: Any = UnixPort._fromListeningDescriptor(reactor, descriptor, factory)  # noqa: SLF001 - no other way
    path = port._preexistingSocket.getsockname()  # noqa: SLF001 - the same
    if isinstance(path, str):
        port.mode = stat.S_IMODE(Path(path).stat().st_mode)
    port.startListening()
    port._shouldShutdown = False  # noqa: SLF001 - the same
    port._bindPath = b"\0"  # noqa: SLF001 - an abstract name has no file
    listening: IListeningPort = port
    return listening


def group_id(name: str) -> int | None:
    """The control group's id, ``None`` without a name; ``ConfigurationError`` if unknown."""
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigurationError(
            f"http.control_group: there is no group {name!r} on this machine; make it, or leave "
            "the setting empty."
        ) from None


def give_to_group(path: Path, group: int) -> None:
    """Let ``group`` have the control socket and its folder."""
    for each in (path.parent, path):
        try:
            os.chown(each, -1, group)
        except OSError as error:
            raise ConfigurationError(
                f"http.control_group: {each} can't be given to that group ({error.strerror}); the "
                "daemon's user must be a member of it."
            ) from None


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
