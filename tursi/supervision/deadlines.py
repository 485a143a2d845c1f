"""Timers of deadlines that blame nobody for a daemon that stood still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tursi.lifecycle.inputs import Timer

LATE_SECONDS = 2.0
"""A timer that comes later than this was held up together with everything else."""
GRACE_SECONDS = 5.0
"""What is granted then at most, once: what was waited for may be there, unread."""


class Deadlines:
    """A clock (``lifecycle.inputs.Clock``) whose calls go through ``feed``."""

    def __init__(self, clock: Any, feed: Callable[..., None]) -> None:
        self._clock = clock
        self._feed = feed

    def seconds(self) -> float:
        """Now."""
        return float(self._clock.seconds())

    def callLater(  # noqa: N802 - Twisted's name
        self,
        delay: float,
        callable: Callable[..., object],  # noqa: A002 - Twisted's name
        *args: object,
    ) -> Timer:
        """Call after ``delay`` seconds, or a little later if nobody ran at that time."""
        return _Deadline(self._clock, delay, lambda: self._feed(callable, *args))


class _Deadline:
    def __init__(self, clock: Any, delay: float, call: Callable[[], None]) -> None:
        self._clock = clock
        self._call = call
        self._grace = min(delay, GRACE_SECONDS)
        self._due = clock.seconds() + delay
        self._timer: Any = clock.callLater(delay, self._expire)

    def cancel(self) -> None:
        """Don't call any more."""
        self._timer.cancel()

    def active(self) -> bool:
        """Whether the call is still to come."""
        return bool(self._timer.active())

    def _expire(self) -> None:
        if self._grace and self._clock.seconds() - self._due > LATE_SECONDS:
            grace, self._grace = self._grace, 0.0
            self._timer = self._clock.callLater(grace, self._call)
        else:
            self._call()
