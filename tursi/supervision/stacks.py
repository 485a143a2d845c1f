"""Where the threads of a hung worker stand, as it writes that on its stderr when told to."""

from __future__ import annotations

import re
from collections.abc import Callable

from tursi.lifecycle.inputs import Clock, Timer
from tursi.supervision.lines import words
from tursi.supervision.logs import LifeLog

QUIET_SECONDS = 0.25
"""faulthandler marks no end: when nothing more comes for that long, it is one."""
MAX_TEXT = 64 * 1024
"""Characters that are kept; more than faulthandler ever writes of some threads."""
# What faulthandler begins each thread with.
_BEGINNING = re.compile(r"(Current thread|Thread) 0x[0-9a-f]+ ")


class Stacks:
    """Collects them from the life's log; ``done`` is called once they are complete.

    That they come at all is not for certain: the caller has a deadline of its own.
    """

    def __init__(self, log: LifeLog, clock: Clock, done: Callable[[], None]) -> None:
        self._clock = clock
        self._done = done
        self._lines: list[str] = []
        self._room = MAX_TEXT
        self._timer: Timer | None = None
        self._unsubscribe = log.subscribe(self._line)

    @property
    def text(self) -> str:
        """What has come so far."""
        return "\n".join(self._lines)

    def close(self) -> None:
        """Collect no more."""
        self._unsubscribe()
        self._cancel()

    def _line(self, line: str) -> None:
        stream, text = words(line)
        if stream != "err" or not (self._lines or _BEGINNING.match(text)):
            return
        self._room -= len(text)
        if self._room > 0:
            self._lines.append(text)
        self._cancel()
        self._timer = self._clock.callLater(QUIET_SECONDS, self._done)

    def _cancel(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
