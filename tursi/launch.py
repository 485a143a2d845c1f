"""How ``twistd tursi`` was started, and the way from there to a running daemon.

twistd forks twice; the process that was started waits until the daemon says that
it runs. By itself it would wait for ever for a daemon that was killed before it
could say anything, and know no exit status but 0 and 1. So there is a pipe of our
own between the two.
"""

from __future__ import annotations

import fcntl
import os
import select
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DEADLINE_SECONDS = 600.0
"""How long a daemon may take until it listens; upgrading a large database takes its time."""
_GRACE_SECONDS = 1.0
"""twistd has words of its own for an unforeseen error; they come first."""
_FIRST_LISTENER = 3
_SERVES = b"0"
_SOFTWARE = 70


@dataclass(frozen=True, slots=True)
class Launch:
    """What the command line said, besides where things are."""

    foreground: bool = True
    configuration: Path | None = None
    """The file that was named; ``None`` for the usual one."""
    pid_file: Path | None = None
    """One more that somebody wants."""
    log_file: Path | None = None
    """``None`` for ``output`` in the foreground, and for the usual file otherwise."""
    output: int = 1
    """The descriptor of stdout, before it was redirected to the log."""
    owner: tuple[int, int] | None = None
    """The user and the group that twistd will become."""
    parent: Parent | None = None


class Parent:
    """The process that twistd was started as, seen from both sides.

    To be made in it, before it forks.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._waiting = False
        self._reader, self._writer = os.pipe()
        os.register_at_fork(after_in_parent=self._forked)

    def serves(self) -> None:
        """The daemon runs."""
        self._say(_SERVES)

    def refuses(self, status: int, message: str) -> None:
        """The daemon can't run; the process that was started exits with ``status``."""
        self._say(f"{status} {message}".encode())

    def _say(self, data: bytes) -> None:
        with suppress(OSError):
            os.write(self._writer, data)
        for descriptor in (self._writer, self._reader):
            with suppress(OSError):
                os.close(descriptor)

    def _forked(self) -> None:
        if os.getpid() == self._pid and not self._waiting:
            self._waiting = True
            # Then the pipe ends with the daemon.
            os.close(self._writer)
            threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        readable, _, _ = select.select([self._reader], [], [], DEADLINE_SECONDS)
        data = os.read(self._reader, 4096) if readable else None
        if data == _SERVES:
            return
        if data is None:
            status, message = (
                _SOFTWARE,
                (f"the daemon has not started within {DEADLINE_SECONDS:.0f} s; see its log."),
            )
        elif data:
            number, _, message = data.decode("utf-8", "replace").partition(" ")
            status = int(number)
        else:
            time.sleep(_GRACE_SECONDS)
            status, message = _SOFTWARE, "the daemon ended before it served; see its log."
        # sys.stderr goes to the log by now.
        os.write(2, f"tursi: {message}\n".encode())
        os._exit(status)


def close_inherited(environment: Mapping[str, str]) -> None:
    """Close the descriptors that whoever started us left open, but those given to listen on.

    Whatever Python opens isn't inherited by other programs, so what would be
    was inherited by us.
    """
    given = _FIRST_LISTENER
    if environment.get("LISTEN_PID") == str(os.getpid()):
        count = environment.get("LISTEN_FDS", "")
        given += int(count) if count.isdecimal() else 0
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers, no paths
        descriptor = int(name)
        if descriptor < given:
            continue
        with suppress(OSError):
            if not fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                os.close(descriptor)
