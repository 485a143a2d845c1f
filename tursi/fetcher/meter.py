"""Counts the bytes that arrive and tells about them, not too often."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

from tursi.model import Progress

_EVERY = 0.25
"""Seconds between two reports."""


class Meter:
    """How many bytes of ``total`` are there; many threads add to it."""

    def __init__(
        self,
        total: int,
        tell: Callable[[Progress], None],
        now: Callable[[], float],
        stage: str = "download",
        *,
        quiet: bool = False,
        later: Callable[[float, Callable[[], None]], None] | None = None,
    ) -> None:
        """A ``quiet`` one says nothing of what is done at once.

        ``later`` calls something after so many seconds.
        """
        self._total = total
        self._tell = tell
        self._now = now
        self._stage = stage
        self._done = 0
        self._told_at = now() if quiet else now() - _EVERY
        self._lock = threading.Lock()
        self._later = later or _later
        self._waiting = False
        self._told = 0

    def add(self, count: float) -> None:
        """``count`` more bytes are there (fewer, where a file begins anew)."""
        with self._lock:
            self._done += int(count)
            now = self._now()
            if now - self._told_at >= _EVERY:
                self._told_at = now
                self._report()
            elif not self._waiting:
                # It may be the last that comes for long.
                self._waiting = True
                self._later(_EVERY, self._catch_up)

    def _catch_up(self) -> None:
        with self._lock:
            self._waiting = False
            if self._told == self._done or self._done >= self._total:
                return
            now = self._now()
            if now - self._told_at >= _EVERY:
                self._told_at = now
                self._report()
            else:
                self._waiting = True
                self._later(_EVERY, self._catch_up)

    def finish(self) -> None:
        """All is there."""
        with self._lock:
            self._done = self._total
            self._report()

    def _report(self) -> None:
        self._told = self._done
        done = max(0, min(self._done, self._total))
        self._tell(Progress(self._stage, float(done), float(self._total)))


def _later(seconds: float, call: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, call)
    # Nobody waits for it when the process ends.
    timer.daemon = True
    timer.start()


def bar(meter: Meter) -> type[Any]:
    """A progress bar class for huggingface_hub that feeds ``meter`` and draws nothing."""

    class Bar:
        """What huggingface_hub asks of a ``tqdm_class``; one object per file."""

        def __init__(self, **settings: Any) -> None:
            self.n = int(settings.get("initial") or 0)
            # What had arrived before the download was broken off.
            meter.add(self.n)
            self.total = settings.get("total")

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            self.n += int(count or 0)
            meter.add(count or 0)

        def update_transfer(self, count: float | None = 1) -> None:
            # Bytes on the network, which xet reports besides the bytes on disk.
            pass

        def set_postfix_str(self, *_: object, **__: object) -> None:
            pass

        set_transfer_postfix_str = refresh = close = set_postfix_str

    return Bar
