"""Stops starting workers when they die all over the place: then it isn't the models.

A host without memory, a driver that is gone or a disk that is full kills every
worker, and restarting them all makes it worse. So does asking a system for
processes again and again that has none left. Pure: the clock comes in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum, auto

MAX_DEATHS = 20
WINDOW_SECONDS = 60.0
"""More deaths than that within this time, and nothing is started"""
PAUSE_SECONDS = 60.0
"""for this long; then one at a time, until one serves or none has died for the window."""
REFUSED_SECONDS = 5.0
"""The same after the system had no process, descriptor or memory for another worker."""


class _State(Enum):
    OPEN = auto()
    PAUSED = auto()
    TRYING = auto()


class Governor:
    """Says how many workers may come up at a time; ``clock`` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS + 1)
        self._state = _State.OPEN
        self._until = 0.0
        self._why = ""
        self._storm = False

    def died(self) -> bool:
        """A worker died unasked; whether this begins a pause."""
        self._look()
        now = self._clock()
        self._deaths.append(now)
        storm = len(self._deaths) > MAX_DEATHS and now - self._deaths[0] <= WINDOW_SECONDS
        tried = self._state is _State.TRYING and self._storm
        if self._state is _State.PAUSED or not (storm or tried):
            return False
        self._pause(
            PAUSE_SECONDS, f"More than {MAX_DEATHS} workers died within {WINDOW_SECONDS:.0f} s"
        )
        self._storm = True
        return True

    def refused(self, why: str) -> bool:
        """The system could not start another worker; whether this begins a pause."""
        self._look()
        if self._state is _State.PAUSED:
            return False
        self._pause(REFUSED_SECONDS, f"The system refuses another process ({why})")
        return True

    def _pause(self, seconds: float, why: str) -> None:
        self._state, self._until, self._why = _State.PAUSED, self._clock() + seconds, why

    def served(self) -> None:
        """A worker has come up; after a pause that is what was waited for."""
        self._look()
        if self._state is _State.TRYING:
            self._open()

    def slots(self, most: int) -> int:
        """How many workers may load at a time, of at most ``most``."""
        self._look()
        return {_State.OPEN: most, _State.PAUSED: 0, _State.TRYING: min(most, 1)}[self._state]

    @property
    def paused_seconds(self) -> float:
        """How long the pause still is; 0 if there is none."""
        self._look()
        return self._until - self._clock() if self._state is _State.PAUSED else 0.0

    @property
    def trouble(self) -> str | None:
        """What is wrong, in one sentence."""
        self._look()
        if self._state is _State.OPEN:
            return None
        how = (
            f"nothing is started for another {self.paused_seconds:.0f} s"
            if self._state is _State.PAUSED
            else "workers are started one at a time until one serves"
        )
        return f"{self._why}: {how}."

    def _look(self) -> None:
        now = self._clock()
        if self._state is _State.PAUSED and now >= self._until:
            self._state, self._until = _State.TRYING, self._until + WINDOW_SECONDS
        if self._state is _State.TRYING and now >= self._until:
            self._open()

    def _open(self) -> None:
        self._state = _State.OPEN
        self._storm = False
        self._deaths.clear()
