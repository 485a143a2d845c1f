"""Telling the service manager how the daemon is: systemd's notification protocol.

Each message is one datagram to the socket that ``NOTIFY_SOCKET`` names. Without
that variable, and on any trouble with the socket, nothing happens: a service
manager that doesn't listen must not harm the service.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi.model import DeploymentStatus, Desired, Phase

STATUS_SECONDS = 1.0
"""Between two looks at how the daemon is."""
RETRY_SECONDS = 0.5
RETRIES = 20
"""How often a change of state is sent again while the manager's queue is full."""
NAMED = 3
"""Deployments in trouble that the line for people names."""

log = Logger()


class Notifier:
    """Speaks to the service manager of ``environment``, if there is one."""

    def __init__(self, reactor: Any, environment: Mapping[str, str] = os.environ) -> None:
        self._reactor = reactor
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._watchdog = _number(environment.get("WATCHDOG_USEC", "")) / 1e6
        self._watched_pid = _number(environment.get("WATCHDOG_PID", ""))
        self._waiting: list[str] = []
        self._text = ""
        self._look: Any = None
        self._feeding: LoopingCall | None = None

    # -- states ----------------------------------------------------------------------

    def ready(self) -> None:
        """The daemon serves, for the first time or again after ``reloading``."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """It reads its configuration again; ``ready`` must follow, whatever comes of it."""
        self._tell(
            f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"
        )

    def stopping(self) -> None:
        """It has begun to stop."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        self._tell("STOPPING=1")

    def extend(self, seconds: float) -> None:
        """Starting or stopping may take that much longer from now on; say it again in time."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def status(self, text: str) -> None:
        """One line for people (``systemctl status``); the same again is not sent."""
        line = " ".join(text.split())
        if line != self._text and self._send(f"STATUS={line}"):
            self._text = line

    def changed(self, describe: Callable[[], str]) -> None:
        """Send what ``describe`` says, soon: many changes within a second are one line."""
        if self._address is not None and self._look is None:
            self._look = self._reactor.callLater(STATUS_SECONDS, self._describe, describe)

    def _describe(self, describe: Callable[[], str]) -> None:
        self._look = None
        self.status(describe())

    # -- watchdog ----------------------------------------------------------------------

    def watch(self, round_trip: Callable[[], Deferred[Any]]) -> None:
        """Feed the watchdog from now on, each time after a ``round_trip`` has come back."""
        wanted = self._watched_pid in {0, os.getpid()}
        if self._address is None or not self._watchdog or not wanted:
            return

        def feed() -> Deferred[None]:
            # The loop waits for the Deferred: what never comes back is never fed for.
            return round_trip().addCallbacks(self._feed, _not_fed)

        self._feeding = LoopingCall(feed)
        self._feeding.clock = self._reactor
        self._feeding.start(self._watchdog / 3)

    def unwatch(self) -> None:
        """Feed it no more."""
        if self._feeding is not None and self._feeding.running:
            self._feeding.stop()

    def _feed(self, _: object) -> None:
        self._send("WATCHDOG=1")

    # -- the socket ----------------------------------------------------------------------

    def _tell(self, message: str) -> None:
        self._waiting.append(message)
        if len(self._waiting) == 1:
            self._tell_waiting(RETRIES)

    def _tell_waiting(self, left: int) -> None:
        while self._waiting and (self._send(self._waiting[0]) or not left):
            del self._waiting[0]
        if self._waiting:
            self._reactor.callLater(RETRY_SECONDS, self._tell_waiting, left - 1)

    def _send(self, message: str) -> bool:
        """Whether it went, or never will."""
        if self._address is None:
            return True
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
                one.setblocking(False)
                one.sendto(message.encode(), self._address)
        except BlockingIOError:
            return False
        except OSError as error:
            log.debug("the service manager can't be told: {error}", error=error)
        return True


def describe(deployments: Sequence[DeploymentStatus]) -> str:
    """How the models are, in one line."""
    wanted = [each for each in deployments if each.desired is Desired.RUNNING]
    if not wanted:
        return "no deployments"
    ready = sum(each.phase is Phase.READY for each in wanted)
    troubled = [each for each in wanted if each.phase in _TROUBLE]
    said = [f"{ready} of {len(wanted)} deployment{'s' * (len(wanted) > 1)} ready"]
    said += [f"{each.name} {each.phase.value}" for each in troubled[:NAMED]]
    if len(troubled) > NAMED:
        said.append(f"{len(troubled) - NAMED} more in trouble")
    return ", ".join(said)


_TROUBLE = {Phase.FAILED, Phase.QUARANTINED, Phase.WEDGED}


def _address(text: str) -> str | None:
    """The socket's address; of what isn't a path or an abstract name, none."""
    if text.startswith("@") and len(text) > 1:
        return "\0" + text[1:]
    return text if text.startswith("/") else None


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() else 0


def _not_fed(failure: Failure) -> None:
    log.warn("the watchdog isn't fed: {error}", error=failure.value)
