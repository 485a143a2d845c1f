"""The lock on a state folder: one daemon at a time, whatever happened to the last one."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from tursi.errors import AlreadyRunning, ConfigurationError

_GLANCE_SECONDS = 0.5
"""Who only looks whether it is held holds it for a moment: this long a lock is tried again."""
_WRITE_SECONDS = 5.0
"""Who has just got it needs a moment to write its pid."""
_AGAIN_SECONDS = 0.01


class StateLock:
    """A ``flock`` on ``tursi.lock``; the kernel releases it however the process ends.

    The file holds the pid of the daemon, and nothing after an orderly end.
    """

    def __init__(self, state: Path) -> None:
        self._path = state / "tursi.lock"
        self._state = state
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether it is ours."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take it, or raise ``AlreadyRunning`` that names the holder."""
        descriptor = self._open(os.O_RDWR | os.O_CREAT)
        try:
            self._lock(descriptor, fcntl.LOCK_EX)
        except AlreadyRunning:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        self._descriptor = descriptor

    def give(self, uid: int, gid: int) -> None:
        """Let another user take it the next time."""
        if self._descriptor is not None:
            os.fchown(self._descriptor, uid, gid)

    def probe(self) -> None:
        """Raise ``AlreadyRunning`` if somebody holds it; change nothing."""
        try:
            descriptor = self._open(os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            self._lock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """The pid of the daemon that holds it: 0 if that isn't known, ``None`` if nobody does.

        Raises ``ConfigurationError`` where it can't be looked at.
        """
        try:
            self.probe()
        except AlreadyRunning:
            return self.last() or 0
        return None

    def last(self) -> int | None:
        """The pid of the daemon that holds it, or that ended without saying so."""
        try:
            text = self._path.read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return int(text) if text.isdecimal() and int(text) > 0 else None

    def release(self) -> None:
        """Give it back; harmless if it isn't held."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self, how: int) -> int:
        try:
            return os.open(self._path, how | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConfigurationError(
                f"The lock {self._path} can't be opened ({error.strerror}); run Tursi as the user "
                "that owns the state folder, or choose another with --state."
            ) from None

    def _lock(self, descriptor: int, how: int) -> None:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                return
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            # Looking shares the lock with looking: who is in the way holds it.
            looking = how is fcntl.LOCK_SH
            patience = 0.0 if looking and holder else _GLANCE_SECONDS if holder else _WRITE_SECONDS
            if time.monotonic() - began >= patience:
                raise AlreadyRunning(
                    f"Tursi is already running (pid {holder or 'unknown'}) on {self._state}."
                )
            time.sleep(_AGAIN_SECONDS)
