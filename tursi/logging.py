"""The daemon's own log: to a file that stays within bounds, or to the terminal.

Use it as ``twistd --logger=tursi.logging.observer``; ``twistd tursi`` does so by
itself unless it is told otherwise. A disk that can't be written loses lines,
nothing else.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from zope.interface import implementer

from twisted.logger import ILogObserver, LogEvent, LogLevel, eventAsText, formatEvent

from tursi.config import Log

MODE = 0o640
"""Of the log file."""
_HELD = 1000
"""Events that are kept until it is known where they go."""
_AGAIN_SECONDS = 1.0
"""Between two tries to open a file that can't be opened."""
_LEVELS = {level.name: number for number, level in enumerate(LogLevel.iterconstants())}
# A line can't be forged, nor a terminal told to do anything: C0 and C1 controls but
# tab and line end, line separators, and what turns text around.
_ESCAPES = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (
        *(set(range(0x20)) - {0x09, 0x0A}),
        *range(0x7F, 0xA0),
        *range(0x2028, 0x202F),
        *range(0x2066, 0x206A),
    )
}


@implementer(ILogObserver)
class DaemonLog:
    """An observer that writes events of a level as lines of text or JSON.

    Before ``open`` it only holds them: twistd logs before it has changed its
    user, its umask and its working directory. ``clock`` gives UTC epoch seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._settings = Log()
        self._path: Path | None = None
        self._stream: int | None = None
        self._file: int | None = None
        self._written = 0
        self._bounded = False
        self._retry_at = 0.0
        self._held: deque[LogEvent] | None = deque(maxlen=_HELD)
        self._debug = False
        # Events come from every thread.
        self._lock = threading.RLock()
        self.observing = False
        """Whether it has been given out as an observer."""
        self.dropped = 0
        """Events that could not be written."""

    @property
    def path(self) -> Path | None:
        """The file, if it goes to one."""
        return self._path

    @property
    def debugging(self) -> bool:
        """Whether it shows debug messages, whatever is configured."""
        return self._debug

    def to_stream(self, descriptor: int) -> None:
        """Write to ``descriptor`` from now on."""
        with self._lock:
            self._close()
            self._path, self._stream = None, descriptor
            self._release()

    def to_file(self, path: Path, owner: tuple[int, int] | None = None) -> None:
        """Write to ``path`` from now on, and give it to ``owner``; raises ``OSError``."""
        with self._lock:
            previous, self._path = self._path, path
            try:
                # Root gives nothing away that a link leads to.
                file = self._open(os.O_NOFOLLOW if owner is not None else 0)
                if owner is not None:
                    os.fchown(file, *owner)
            except OSError:
                self._path = previous
                raise
            self._stream = None
            self._take(file)
            self._release()

    def configure(self, settings: Log) -> None:
        """Take on level, form and bounds."""
        self._settings = settings

    def reopen(self) -> None:
        """Open the file anew: another process has moved it away."""
        with self._lock:
            self._close()
            self._retry_at = 0.0
            if self._path is not None:
                with suppress(OSError):
                    self._take(self._open())

    def toggle_debug(self) -> bool:
        """Show debug messages from now on, or no longer; which of the two."""
        self._debug = not self._debug
        return self._debug

    def __call__(self, event: LogEvent) -> None:
        """Write ``event``."""
        with self._lock:
            if self._held is not None:
                self._held.append(event)
                return
            level = event.get("log_level") or LogLevel.info
            lowest = "debug" if self._debug else self._settings.level
            if _LEVELS[level.name] < _LEVELS[lowest]:
                return
            try:
                form = _json if self._settings.format == "json" else _text
                self._write(form(event, level.name).encode("utf-8", "backslashreplace"))
            except Exception:  # noqa: BLE001 - who logs must never fail for it
                self.dropped += 1

    # -- writing ----------------------------------------------------------------------

    def _release(self) -> None:
        held, self._held = self._held, None
        for event in held or ():
            self(event)

    def _write(self, data: bytes) -> None:
        if self._path is None:
            if self._stream is not None:
                _write_all(self._stream, data)
            return
        if self._file is None:
            if self._clock() < self._retry_at:
                self.dropped += 1
                return
            self._retry_at = self._clock() + _AGAIN_SECONDS
            self._take(self._open())
        if self._bounded and self._written and self._written + len(data) > self._settings.max_bytes:
            self._rotate()
        if self._file is not None:
            _write_all(self._file, data)
            self._written += len(data)

    def _open(self, how: int = 0) -> int:
        assert self._path is not None  # noqa: S101 - for the type checker
        flags = how | os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        return os.open(self._path, flags, MODE)

    def _take(self, file: int) -> None:
        self._close()
        self._file = file
        found = os.fstat(file)
        self._written = found.st_size
        self._bounded = stat.S_ISREG(found.st_mode)

    def _rotate(self) -> None:
        """Move the files on by one; what would be one too many goes."""
        assert self._path is not None  # noqa: S101 - for the type checker
        try:
            for number in range(self._settings.old_files, 0, -1):
                newer = _numbered(self._path, number - 1)
                if newer.exists():
                    newer.replace(_numbered(self._path, number))
            if not self._settings.old_files:
                self._path.unlink()
            self._take(self._open())
        except OSError:
            # Rather too long a file than no line; the next try is a whole file later.
            self._written = 0

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


current = DaemonLog()
"""The log of this process."""


def observer() -> DaemonLog:
    """The log of this process as an observer, for ``twistd --logger``."""
    current.observing = True
    return current


def standard_output() -> int:
    """The descriptor of what is stdout just now."""
    try:
        return sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):
        return 1


def _text(event: LogEvent, level: str) -> str:
    text = eventAsText(event, includeTimestamp=False, includeSystem=False)
    # What isn't the beginning of an event can't look like one.
    message = text.translate(_ESCAPES).rstrip("\n").replace("\n", "\n    ")
    return f"{_stamp(event)} {level} {event.get('log_namespace', '-')}: {message}\n"


def _json(event: LogEvent, level: str) -> str:
    line: dict[str, object] = {
        "time": _stamp(event),
        "level": level,
        "logger": event.get("log_namespace"),
        "message": formatEvent(event),
    }
    if event.get("log_failure") is not None:
        line["traceback"] = event["log_failure"].getTraceback()
    return json.dumps(line) + "\n"


def _stamp(event: LogEvent) -> str:
    at = datetime.fromtimestamp(event.get("log_time") or time.time(), UTC)
    return at.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _numbered(path: Path, number: int) -> Path:
    return path if not number else path.with_name(f"{path.name}.{number}")
