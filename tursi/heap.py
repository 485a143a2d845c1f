"""The daemon's own memory: quick for large bodies, and given back when they have gone."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool

TRIM_SECONDS = 60.0

_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1


def tune() -> None:
    """Give back less memory than glibc would, and tell the collector what stays.

    Every buffer of 128 KiB or more would otherwise be mapped and unmapped, which
    is most of the cost of a large body.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 64 << 20)
        mallopt(_M_TRIM_THRESHOLD, 128 << 20)
    gc.collect()
    gc.freeze()


class Heap:
    """Gives back now and then what large bodies have left, while nothing is ``busy``.

    ``trim`` is glibc's ``malloc_trim``, which is quick where there is nothing to give.
    """

    def __init__(
        self,
        reactor: Any,
        busy: Callable[[], bool],
        trim: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None),  # noqa: B008 - found once
    ) -> None:
        self._reactor = reactor
        self._busy = busy
        self._trim = trim
        self._loop = LoopingCall(self._look)
        self._loop.clock = reactor

    def start(self) -> None:
        """Look every minute."""
        if self._trim is not None:
            self._loop.start(TRIM_SECONDS, now=False)

    def stop(self) -> None:
        """No more."""
        if self._loop.running:
            self._loop.stop()

    def _look(self) -> Deferred[object] | None:
        if self._trim is None or self._busy():
            return None
        # It may take tens of milliseconds, in which it holds no lock of Python's.
        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), self._trim, 0)
