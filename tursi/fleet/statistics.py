"""Counts what each deployment does for each key, and hands it to the store second by second."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from tursi.errors import (
    DeadlineExceeded,
    RequestCancelled,
    RequestTimeout,
    WorkerLost,
)
from tursi.faces.route import STATUS
from tursi.fleet.recent import Recent, Series
from tursi.rollup import ErrorClass, Observation, Period, Record, Rollup

MAX_HELD = 5_000
"""Records that wait for the database; older ones are counted and dropped."""

_CLASSES = {
    WorkerLost.code: ErrorClass.LOST,
    DeadlineExceeded.code: ErrorClass.TIMEOUT,
    RequestTimeout.code: ErrorClass.TIMEOUT,
    RequestCancelled.code: ErrorClass.CANCELLED,
    "slow_reader": ErrorClass.CANCELLED,
}


@lru_cache(maxsize=256)
def error_class(status: int, code: str) -> str:
    """The class of an error with this code, told with this HTTP status; empty if it is none."""
    if status < 400 and not code:
        return ""
    found = _CLASSES.get(code)
    if found is None:
        if status < 400:
            # Its answer had begun.
            status = STATUS.get(code, 500)
        if status in {429, 503}:
            found = ErrorClass.OVERLOAD
        else:
            found = ErrorClass.CLIENT if status < 500 else ErrorClass.INTERNAL
    return found.value


class Statistics:
    """What is not stored yet, and what was of late; ``now`` gives UTC epoch seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._start, self._end = 0, 0
        """Of the minute that is being counted."""
        self._open: dict[Series, Rollup] = {}
        self._over: list[tuple[int, dict[Series, Rollup]]] = []
        """Minutes that have ended since the last ``take``."""
        self._sampled: dict[str, Rollup] = {}
        """Memory; kept until the minute is over, so that who is idle writes once a minute."""
        self._held: dict[tuple[int, str, int], Rollup] = {}
        """What could not be stored."""
        self.recent = Recent()
        self.dropped = 0
        """Records that are lost."""

    def count(self, seen: Observation) -> None:
        """Add one request."""
        if not self._start <= self._now() < self._end:
            self._turn()
        deployment, generation, key, status, code, seconds, waited, first_byte, usage = seen
        series = (deployment, generation, key)
        rollup = self._open.get(series)
        if rollup is None:
            rollup = self._open[series] = Rollup()
        rollup.count(
            error_class(status, code) if code or status >= 400 else "",
            generation > 0,
            seconds,
            waited + usage.queue_seconds,
            first_byte,
            usage.batch_size,
            usage.prompt_tokens,
            usage.completion_tokens,
        )

    def sample(self, deployment: str, rss: int, gpu: int = 0) -> None:
        """Add a look at the memory in bytes of all its workers together."""
        if not self._start <= self._now() < self._end:
            self._turn()
        rollup = self._sampled.get(deployment)
        if rollup is None:
            rollup = self._sampled[deployment] = Rollup()
        rollup.sample(rss, gpu)

    def take(self, seconds: float = 0.0) -> list[Record]:
        """What has been counted since the last call, for the store to add up.

        ``seconds`` is the monotonic time that it is remembered by for ``recent``.
        """
        self._turn()
        taken, self._held = self._held, {}
        for start, counted in self._over:
            self.recent.add(seconds, counted)
            for (deployment, _, key), rollup in counted.items():
                _add(taken, (start, deployment, key), rollup)
        self._over = []
        return [Record(*place, rollup) for place, rollup in taken.items()]

    def put_back(self, records: Iterable[Record]) -> None:
        """Keep for the next ``take`` what could not be stored."""
        for start, deployment, key, rollup in records:
            _add(self._held, (start, deployment, key), rollup)
        excess = len(self._held) - MAX_HELD
        if excess > 0:
            for place in sorted(self._held)[:excess]:
                del self._held[place]
            self.dropped += excess

    def _turn(self) -> None:
        """Go on with a fresh sheet, of the minute that it is now."""
        now = int(self._now())
        if not self._start <= now < self._end:
            for deployment, sampled in self._sampled.items():
                self._open.setdefault((deployment, 0, 0), Rollup()).merge(sampled)
            self._sampled = {}
        if self._open:
            self._over.append((self._start, self._open))
            self._open = {}
        self._start = now - now % Period.MINUTE
        self._end = self._start + Period.MINUTE


def _add(
    sheet: dict[tuple[int, str, int], Rollup], place: tuple[int, str, int], rollup: Rollup
) -> None:
    """Add it, and leave it as it is: ``recent`` has it too."""
    held = sheet.get(place)
    if held is None:
        sheet[place] = rollup
        return
    added = Rollup()
    added.merge(held)
    added.merge(rollup)
    sheet[place] = added
