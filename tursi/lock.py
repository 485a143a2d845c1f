"""The lock on a state folder: one daemon at a time, whatever happened to the last one."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tursi.errors import AlreadyRunning


class StateLock:
    """A ``flock`` on ``tursi.lock``; the kernel releases it however the process ends."""

    def __init__(self, state: Path) -> None:
        self._path = state / "tursi.lock"
        self._state = state
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take it, or raise ``AlreadyRunning`` that names the holder."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            self._lock(descriptor, fcntl.LOCK_EX)
        except AlreadyRunning:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        self._descriptor = descriptor

    def probe(self) -> None:
        """Raise ``AlreadyRunning`` if somebody holds it; change nothing."""
        if not self._path.exists():
            return
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            self._lock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Give it back; harmless if it isn't held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, descriptor: int, how: int) -> None:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode("ascii", "replace").strip()
            raise AlreadyRunning(
                f"Tursi is already running (pid {holder or 'unknown'}) on {self._state}."
            ) from None
