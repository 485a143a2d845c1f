"""Waiting in tests: not for a time, but until something is so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeVar

import psutil

T = TypeVar("T")


def until(look: Callable[[], T | Literal[False] | None], what: str, seconds: float = 60.0) -> T:
    """The first true answer of ``look``; fails with ``what`` when the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def gone(process: psutil.Process | int) -> bool:
    """Whether it has ended; who its parent is may take its time to collect it."""
    try:
        found = psutil.Process(process) if isinstance(process, int) else process
        # As long as one of its threads hasn't ended, its files and locks are held.
        return not found.is_running() or (
            found.status() == psutil.STATUS_ZOMBIE and found.num_threads() <= 1
        )
    except psutil.NoSuchProcess:
        return True
