"""What a daemon takes possession of before it does anything: folders, lock, log, PID files."""

from __future__ import annotations

import errno
from pathlib import Path

from twisted.logger import Logger

from tursi import instance, logging
from tursi.errors import ConfigurationError
from tursi.instance import Instance
from tursi.launch import Launch
from tursi.lock import StateLock
from tursi.model import Folders

log = Logger()

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What the system says when a disk is full."""


class Premises:
    """Taken as whoever twistd was started by, for the user that it becomes."""

    def __init__(self, folders: Folders, launch: Launch) -> None:
        self._folders = folders
        self._launch = launch
        self._lock = StateLock(folders.state)
        self.socket_is_ours = True
        """Whether the control socket's file goes with the daemon."""

    @property
    def taken(self) -> bool:
        """Whether they are ours."""
        return self._lock.held

    def take(self) -> None:
        """Raise ``AlreadyRunning`` if another has them, ``ConfigurationError`` if nobody can.

        A disk that is full is an ``OSError``.
        """
        owner, folders = self._launch.owner, self._folders
        for folder in (folders.state, folders.runtime, folders.cache):
            _make_folder(folder, owner)
        self._lock.acquire()
        if owner is not None:
            self._lock.give(*owner)
        self._open_log()
        for path in self._pid_files():
            try:
                instance.write_pid(path, owner)
            except OSError as error:
                log.warn("no PID file {path}: {error}", path=str(path), error=error.strerror)

    def leave(self) -> None:
        """Leave nothing behind that would tell of a running daemon; harmless if not taken."""
        if self._lock.held:
            self.remove_socket()
            for path in (*self._pid_files(), self._folders.status_file):
                instance.remove(path)
            self._lock.release()

    def describe(self, status: Instance) -> None:
        """Write the status file."""
        path = self._folders.status_file
        try:
            instance.write_status(path, status)
        except OSError as error:
            log.warn("no status file {path}: {error}", path=str(path), error=error.strerror)

    def remove_socket(self) -> None:
        """Stale for certain, as the lock is ours; unless it never was ours to remove."""
        if self.socket_is_ours:
            instance.remove(self._folders.socket)

    def _pid_files(self) -> list[Path]:
        other = self._launch.pid_file
        return [self._folders.pid_file, *([other] if other is not None else [])]

    def _open_log(self) -> None:
        if not logging.current.observing:
            return
        path = self._launch.log_file
        if path is None and self._launch.foreground:
            logging.current.to_stream(self._launch.output)
            return
        path = path or self._folders.log
        _make_folder(path.parent, self._launch.owner)
        try:
            logging.current.to_file(path, self._launch.owner)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise ConfigurationError(
                f"The log {path} can't be opened: {error.strerror}; name another with "
                "twistd --logfile."
            ) from None


def _make_folder(folder: Path, owner: tuple[int, int] | None) -> None:
    try:
        instance.make_folder(folder, owner)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise ConfigurationError(
            f"The folder {folder} can't be made: {error.strerror}; "
            "choose another with --state, --runtime or --cache."
        ) from None
