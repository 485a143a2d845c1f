"""Observing a worker in service, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable

from tursi.heartbeat import Beat
from tursi.lifecycle.inputs import Clock, Timer
from tursi.lifecycle.liveness import Finding, Liveness
from tursi.supervision import ticks


def suspended() -> float:
    """Seconds that the machine has ever been suspended; only differences mean something."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


class Probe:
    """Gives ``liveness`` what there is to see, and ``found`` what it makes of that.

    ``read`` reads the heartbeat page, ``send`` sends a PING.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        liveness: Liveness,
        read: Callable[[], Beat | None],
        send: Callable[[], None],
        found: Callable[[Finding], None],
        suspended: Callable[[], float] = suspended,
    ) -> None:
        self.liveness = liveness
        self._clock = clock
        self._read = read
        self._send = send
        self._found = found
        self._suspended = suspended
        self._timer: Timer | None = None

    def start(self) -> None:
        """Begin; nothing happens if it has begun."""
        if self._timer is None:
            self.liveness.begin(self._clock.seconds())
            self._look()

    def stop(self) -> None:
        """Observe no more."""
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None

    def pong(self) -> None:
        """The worker has answered a PING, be it late."""
        if self._timer is not None:
            self.liveness.answered(self._clock.seconds())
            self._judge()

    def _look(self) -> None:
        now = self._clock.seconds()
        self._timer = self._clock.callLater(ticks.until(now, self.liveness.period), self._look)
        if self.liveness.asks(now):
            self._send()
        self._judge()

    def _judge(self) -> None:
        now = self._clock.seconds()
        self._found(self.liveness.observe(now, self._suspended(), self._read()))
