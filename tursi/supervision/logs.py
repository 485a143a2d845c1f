"""The log of one worker life: its stdout and stderr, line by line, within bounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class LifeLog:
    """Writes lines to ``path``; ``size`` bytes at most, ``rate`` bytes a second at most."""

    def __init__(self, path: Path, *, clock: Callable[[], float], size: int, rate: int) -> None:
        raise NotImplementedError

    def feed(self, stream: str, data: bytes) -> None:
        """Take what came out of ``stream`` ("out" or "err")."""

    def line(self, text: str) -> None:
        """Write a note of our own."""

    def close(self) -> None:
        """Write what is incomplete, and close the file; later calls do nothing."""

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call ``callback`` with each line from now on, until the answer is called."""
        raise NotImplementedError


def tail(path: Path, lines: int) -> list[str]:
    """The last ``lines`` lines of the log at ``path``."""
    raise NotImplementedError
