"""How late the event loop is, measured all the time, and where it stands when it stalls."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from bisect import bisect_left
from typing import Any

from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

EVERY = 0.25
"""Seconds between two looks at the clock."""
STALLED = 2.0
"""Lateness from which on the stack is worth a note."""
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_RECENT = 240
"""Looks that ``worst`` covers: a minute of them."""

log = Logger()


class Lag:
    """Measures how much later than asked the reactor calls.

    A thread watches it: whoever holds up the reactor for two seconds is named in
    the log with the stack, once each time.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0
        self._recent: list[float] = []
        self._call: IDelayedCall | None = None
        self._due = 0.0
        self._ended = threading.Event()
        self._reactor_thread = 0

    def start(self) -> None:
        """Begin; call it in the reactor's thread."""
        self._reactor_thread = threading.get_ident()
        self._schedule()
        threading.Thread(target=self._watch, name="lag", daemon=True).start()

    def stop(self) -> None:
        """End both."""
        self._ended.set()
        if self._call is not None:
            self._call.cancel()
            self._call = None

    @property
    def now(self) -> float:
        """Seconds that the latest call came late."""
        return self._recent[-1] if self._recent else 0.0

    @property
    def worst(self) -> float:
        """The most of the last minute."""
        return max(self._recent, default=0.0)

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, and the sum, as Prometheus wants them."""
        total, found = 0, []
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self._counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found, self._sum

    def _schedule(self) -> None:
        self._due = time.monotonic() + EVERY
        self._call = self._reactor.callLater(EVERY, self._look)

    def _look(self) -> None:
        late = max(0.0, time.monotonic() - self._due)
        self._counts[bisect_left(BOUNDS, late)] += 1
        self._sum += late
        self._recent.append(late)
        del self._recent[:-_RECENT]
        self._schedule()

    # -- the thread ---------------------------------------------------------------------

    def _watch(self) -> None:
        noted = 0.0
        while not self._ended.wait(EVERY):
            due = self._due
            late = time.monotonic() - due
            if late < STALLED or due == noted:
                continue
            noted = due
            frame = sys._current_frames().get(self._reactor_thread)  # noqa: SLF001 - there is no other way
            stack = "".join(traceback.format_stack(frame)) if frame else "(unknown)"
            log.warn(
                "the event loop has stood still for {late:.1f} s:\n{stack}", late=late, stack=stack
            )
