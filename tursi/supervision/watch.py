"""Watches what a worker's processes use together, where no cgroup limits them."""

from __future__ import annotations

from collections.abc import Callable

from tursi.lifecycle.inputs import Clock, Timer
from tursi.supervision import ticks

SECONDS = 1.0
"""Between two looks."""
SOFT = 0.9
"""The part of the limit from which on it is told."""


class MemoryWatch:
    """Calls ``near`` once when ``read`` comes near ``limit``, and ``over`` when it is past it.

    All in bytes; both get what is used. After ``over`` it looks no more.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        limit: int,
        read: Callable[[], int],
        near: Callable[[int], None],
        over: Callable[[int], None],
    ) -> None:
        self._clock = clock
        self._limit = limit
        self._read = read
        self._near = near
        self._over = over
        self._told = False
        self._timer: Timer | None = None
        self.peak = 0
        """The most that was seen."""

    @property
    def soft(self) -> int:
        """From which on it is told."""
        return int(self._limit * SOFT)

    def start(self) -> None:
        """Look, and go on looking."""
        used = self._read()
        self.peak = max(self.peak, used)
        if used > self._limit:
            self.stop()
            self._over(used)
            return
        self._timer = self._clock.callLater(ticks.until(self._clock.seconds(), SECONDS), self.start)
        if used > self.soft and not self._told:
            self._told = True
            self._near(used)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
