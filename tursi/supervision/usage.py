"""What a worker uses over its life, in a bounded number of points."""

from __future__ import annotations

from collections.abc import Callable

from tursi.lifecycle.inputs import Clock, Timer
from tursi.model import Sample
from tursi.supervision import ticks
from tursi.supervision.procfs import Usage

MAX_SAMPLES = 120
LOADING_SECONDS = 1.0
SERVING_SECONDS = 5.0
"""Between two samples; more happens while a model is being loaded."""


class Curve:
    """Samples from ``start`` to ``stop``: all of the last ones, ever fewer of the older ones.

    ``read`` gives the present usage, ``now`` UTC epoch seconds, ``serves`` whether the
    worker has been loaded.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        now: Callable[[], float],
        read: Callable[[], Usage | None],
        serves: Callable[[], bool],
    ) -> None:
        self._clock = clock
        self._now = now
        self._read = read
        self._serves = serves
        self._samples: list[Sample] = []
        self._timer: Timer | None = None

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Oldest first."""
        return tuple(self._samples)

    def start(self) -> None:
        """Take the first sample, and go on."""
        usage = self._read()
        # A process that has just died is still listed, without memory.
        if usage is not None and usage.rss:
            self._samples.append(Sample(self._now(), usage.rss, round(usage.cpu_seconds, 2)))
            if len(self._samples) > MAX_SAMPLES:
                del self._samples[1 : MAX_SAMPLES // 2 : 2]
        seconds = SERVING_SECONDS if self._serves() else LOADING_SECONDS
        self._timer = self._clock.callLater(ticks.until(self._clock.seconds(), seconds), self.start)

    def stop(self) -> None:
        """Take no more."""
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
