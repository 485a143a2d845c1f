"""A process under a keeper that isn't restarted, and that speaks in frames (the fetcher)."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi.supervision.life import Confinement, Exit, KeeperProtocol, Keepers, Launch, Life
from tursi.supervision.logs import LifeLog
from tursi.wire import Decoder, Frame, WireError

log = Logger()

_END_SECONDS = 2.0
"""How long the end of the data socket may come after the end of the process."""


class OneShot:
    """Starts such processes; ``name_life`` gives each life its uuid."""

    def __init__(
        self,
        reactor: Any,
        *,
        keepers: Keepers | None = None,
        name_life: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._reactor = reactor
        self._keepers = keepers or Keepers(reactor)
        self._name_life = name_life

    def run(
        self,
        name: str,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        receive: Callable[[Frame], None],
        log: LifeLog,
        confinement: Confinement = Confinement(),  # noqa: B008 - a frozen value
    ) -> Running:
        """Start ``arguments`` (argv) in ``environment``; ``receive`` gets each frame from its fd 3.

        ``name`` is for our own log. If nothing can be started, ``finished`` fails.
        """
        running = Running(self._reactor, name, receive)
        launch = Launch(self._name_life(), arguments, environment, log, confinement)
        running.start(KeeperProtocol(self._keepers, running, launch))
        return running


class Running:
    """One process that was started so.

    ``finished`` fires with the Exit once the whole tree is gone and the last
    frame has been received.
    """

    def __init__(self, reactor: Any, name: str, receive: Callable[[Frame], None]) -> None:
        self.finished: Deferred[Exit] = Deferred()
        self._reactor = reactor
        self._name = name
        self._receive = receive
        self._keeper: KeeperProtocol | None = None
        self._exit: Exit | None = None
        self._connected = False
        self._cancelled = False
        self._deadline: IDelayedCall | None = None

    def start(self, keeper: KeeperProtocol) -> None:
        """Spawn the keeper, once."""
        self._keeper = keeper
        try:
            keeper.spawn()
        except Exception:  # noqa: BLE001 - whatever it is, there is no process
            self.finished.errback(Failure())

    def cancel(self) -> None:
        """Kill the whole tree; no frame is received any more."""
        self._cancelled = True
        if self._keeper is not None and self._exit is None:
            self._keeper.kill()

    def spawned(self, life: Life) -> None:
        """Listen to the data socket."""
        factory = Factory.forProtocol(lambda: _Frames(self._frame, self._disconnected))
        self._reactor.adoptStreamConnection(life.socket.fileno(), socket.AF_UNIX, factory)
        life.socket.close()
        self._connected = True

    def started(self, pid: int) -> None:
        """Nobody waits for that."""

    def ended(self, exit: Exit) -> None:  # noqa: A002 - the field's word
        """What it has written last may still be in the socket."""
        self._exit = exit
        if self._connected:
            self._deadline = self._reactor.callLater(_END_SECONDS, self._finish)
        else:
            self._finish()

    def _frame(self, frame: Frame) -> None:
        if self._cancelled:
            return
        try:
            self._receive(frame)
        except Exception:  # noqa: BLE001 - one bad frame must not keep the next from coming
            log.failure("A frame of {name} could not be handled", name=self._name)

    def _disconnected(self, error: WireError | None) -> None:
        self._connected = False
        if error is not None:
            log.warn("{name} broke the protocol: {error}", name=self._name, error=error)
            self.cancel()
        if self._exit is not None:
            self._finish()

    def _finish(self) -> None:
        if self._deadline is not None and self._deadline.active():
            self._deadline.cancel()
        if not self.finished.called and self._exit is not None:
            self.finished.callback(self._exit)


class _Frames(Protocol):
    """Takes frames off the data socket."""

    def __init__(
        self, frame: Callable[[Frame], None], disconnected: Callable[[WireError | None], None]
    ) -> None:
        self._decoder = Decoder()
        self._frame = frame
        self._disconnected = disconnected
        self._error: WireError | None = None

    def dataReceived(self, data: bytes) -> None:  # noqa: N802 - Twisted's name
        try:
            for frame in self._decoder.feed(data):
                self._frame(frame)
        except WireError as error:
            self._error = error
            if self.transport is not None:
                self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802 - the same
        if not reason.check(ConnectionDone) and self._error is None:
            log.debug("The data socket was lost: {reason}", reason=reason.getErrorMessage())
        self._disconnected(self._error)
