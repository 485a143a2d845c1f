"""The log of one worker life: its stdout and stderr, line by line, within bounds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from twisted.logger import Logger

from tursi import claims
from tursi.supervision.lines import Form, plain

log = Logger()

MAX_LINE = 8192
"""Bytes of a line that are kept."""
_BLOCK = 65536


class LifeLog:
    """Lines with their time (RFC 3339, UTC) and stream (out, err, or tursi for our own notes).

    They are in ``path`` and, older, ``path.1``; ``form`` makes them.

    The two files together stay below ``size`` bytes, and the child's lines below
    ``rate`` bytes a second; what was dropped is noted. ``clock`` gives UTC epoch
    seconds. A disk that can't be written loses lines, nothing else.
    """

    unwritten: ClassVar[int] = 0
    """Lines of all logs of this process that no disk took."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float],
        size: int,
        rate: int,
        form: Form = plain,
    ) -> None:
        self.path = path
        self._clock = clock
        self._form = form
        self._half = size // 2
        self._rate = rate
        self._budget = float(rate)
        self._refilled = clock()
        self._streams = {"out": _Lines(), "err": _Lines()}
        self._subscribers: dict[object, Callable[[str], None]] = {}
        self._dropped_lines = 0
        self._dropped_bytes = 0
        self._closed = False
        self._failing = False
        self._file: int | None = None
        self._written = 0

    def feed(self, stream: str, data: bytes) -> None:
        """Take what came out of ``stream`` ("out" or "err")."""
        if self._closed:
            return
        self._refill()
        lines = self._streams[stream]
        if self._budget <= 0:
            # A flood is counted, not looked at.
            self._dropped_bytes += len(data)
            self._dropped_lines += lines.skip(data)
            return
        self._write_lines(stream, lines.feed(data))

    def line(self, text: str) -> None:
        """Write a note of our own; it is never dropped for its rate."""
        if not self._closed:
            self._write(self._format("tursi", text.encode()))

    def flush(self) -> None:
        """Write what is incomplete."""
        if self._closed:
            return
        for stream, lines in self._streams.items():
            self._write_lines(stream, lines.rest())
        self._note_dropped()

    def close(self) -> None:
        """Write what is incomplete, and close the file; later calls do nothing."""
        self.flush()
        self._closed = True
        self._subscribers.clear()
        self._close_file()

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call ``callback`` with each line from now on, until the answer is called."""
        token = object()
        self._subscribers[token] = callback

        def unsubscribe() -> None:
            self._subscribers.pop(token, None)

        return unsubscribe

    def _refill(self) -> None:
        now = self._clock()
        # A clock that was set back must not use the budget up.
        elapsed = max(now - self._refilled, 0.0)
        self._refilled = now
        self._budget = min(self._budget + elapsed * self._rate, float(self._rate))

    def _write_lines(self, stream: str, lines: Iterator[bytes]) -> None:
        formatted: list[str] = []
        for text in lines:
            if self._budget <= 0:
                self._dropped_lines += 1
                self._dropped_bytes += len(text)
                continue
            if self._dropped_lines or self._dropped_bytes:
                self._note_dropped()
            line = self._format(stream, text)
            self._budget -= len(line)
            formatted.append(line)
        if formatted:
            self._write(*formatted)

    def _note_dropped(self) -> None:
        lines, count = self._dropped_lines, self._dropped_bytes
        self._dropped_lines = self._dropped_bytes = 0
        if lines or count:
            self.line(
                f"dropped {lines} lines ({count} bytes) that came faster than {self._rate} bytes"
                " a second"
            )

    def _format(self, stream: str, text: bytes) -> str:
        stamp = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        readable = claims.harmless(text.decode("utf-8", "backslashreplace"))
        return self._form(f"{stamp.removesuffix('+00:00')}Z", stream, readable)

    def _write(self, *lines: str) -> None:
        for token, callback in list(self._subscribers.items()):
            try:
                for line in lines:
                    callback(line)
            except Exception:  # noqa: BLE001 - a follower's defect must not cost the log
                log.failure("A follower of {path} failed", path=str(self.path))
                self._subscribers.pop(token, None)
        try:
            self._store([f"{line}\n".encode() for line in lines])
        except OSError as error:
            if not self._failing:
                log.warn("The log {path} loses lines: {error}", path=str(self.path), error=error)
            self._failing = True
            LifeLog.unwritten += len(lines)
        else:
            self._failing = False

    def _store(self, lines: list[bytes]) -> None:
        data = b"".join(lines)
        if len(data) > self._half and len(lines) > 1:
            middle = len(lines) // 2
            self._store(lines[:middle])
            self._store(lines[middle:])
            return
        if self._file is None:
            self._file = self._open(os.O_APPEND)
        if self._written + len(data) > self._half and self._written:
            self._rotate()
        self._written += os.write(self._file, data[: self._half - self._written])

    def _open(self, how: int) -> int:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | how
        file = os.open(self.path, flags, 0o600)
        self._written = os.fstat(file).st_size
        return file

    def _rotate(self) -> None:
        older = _older(self.path)
        lost = older.exists()
        self._close_file()
        self.path.replace(older)
        self._file = self._open(os.O_TRUNC)
        if lost:
            note = self._format(
                "tursi", b"the lines before the last ones were dropped for the size"
            )
            self._written += os.write(self._file, f"{note}\n".encode())

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class _Lines:
    """Cuts one stream into lines; of a progress bar the last state counts."""

    def __init__(self) -> None:
        self._held = b""
        self._returned = False
        self._skipping = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that ``data`` completes."""
        *complete, rest = data.split(b"\n")
        for piece in complete:
            self._hold(piece)
            if not self._skipping:
                yield _cut(self._held)
            self._held, self._returned, self._skipping = b"", False, False
        self._hold(rest)

    def rest(self) -> Iterator[bytes]:
        """What came after the last line end, if anything did."""
        if self._held and not self._skipping:
            yield _cut(self._held)
        self._held = b""

    def skip(self, data: bytes) -> int:
        """Pass over ``data``; how many lines ended in it."""
        self._held, self._returned = b"", False
        # Whatever is still to come of the last line is the end of a lost one.
        self._skipping = not data.endswith(b"\n")
        return data.count(b"\n")

    def _hold(self, piece: bytes) -> None:
        text = piece.rstrip(b"\r")
        if text:
            _, again, state = text.rpartition(b"\r")
            joined = state if again or self._returned else self._held + state
            # One byte more than is kept tells that there was more.
            self._held = joined[: MAX_LINE + 1]
        if piece:
            self._returned = len(text) < len(piece)


def _cut(text: bytes) -> bytes:
    return text if len(text) <= MAX_LINE else text[:MAX_LINE] + b" [cut]"


def _older(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


def tail(path: Path, lines: int) -> list[str]:
    """The last ``lines`` lines of the log at ``path``, read from its end; none if there is none."""
    found: list[str] = []
    for part in (path, _older(path)):
        if len(found) < lines:
            found = _last(part, lines - len(found)) + found
    return found


def _last(path: Path, lines: int) -> list[str]:
    data = b""
    try:
        with path.open("rb") as file:
            position = file.seek(0, os.SEEK_END)
            while position and data.count(b"\n") <= lines:
                start = max(position - _BLOCK, 0)
                file.seek(start)
                data = file.read(position - start) + data
                position = start
    except FileNotFoundError:
        return []
    return data.decode("utf-8", "replace").splitlines()[-lines:] if lines > 0 else []
