"""Asking a worker, again and again, whether it is still there."""

from __future__ import annotations

from collections.abc import Callable

from tursi.lifecycle.inputs import Clock, Timer

LATE_SECONDS = 1.0
"""When our own timer comes that late it is the daemon that stood still."""


class Probe:
    """Sends a PING each ``period`` seconds and expects an answer within ``timeout``.

    An unanswered one is followed by the next at once. When the daemon itself was
    stopped or starved, the window begins again: the answer may be there, unread.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        period: float,
        timeout: float,
        send: Callable[[], None],
        answered: Callable[[], None],
        missed: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._period = period
        self._timeout = timeout
        self._send = send
        self._answered = answered
        self._missed = missed
        self._timer: Timer | None = None
        self._due = 0.0
        self._sent = 0.0
        self._running = False

    def start(self) -> None:
        """Begin, with the first PING after one period."""
        if not self._running:
            self._running = True
            self._wait(self._period, self._ask)

    def stop(self) -> None:
        """Ask no more."""
        self._running = False
        self._cancel()

    def pong(self) -> None:
        """The worker has answered, be it late."""
        if self._running:
            left = self._sent + self._period - self._clock.seconds()
            self._wait(max(left, 0.0), self._ask)
            self._answered()

    def _ask(self) -> None:
        self._sent = self._clock.seconds()
        self._wait(self._timeout, self._expire)
        self._send()

    def _expire(self) -> None:
        late = self._clock.seconds() - self._due > LATE_SECONDS
        self._ask()
        if not late:
            self._missed()

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._cancel()
        self._due = self._clock.seconds() + seconds
        self._timer = self._clock.callLater(seconds, then)

    def _cancel(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
