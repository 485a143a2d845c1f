"""A worker's signs of life: a page of memory that it shares with the daemon.

Written by the worker without a system call, read by the daemon without the
worker's help: what the page says is there also when the worker can't say it.

Layout, in the machine's own byte order: ``count:u64 processor:f64
operation:u64 started:f64 progress:u64``. The first two are the heartbeat
thread's, the others the compute thread's, so that neither waits for the other.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from enum import IntEnum

SIZE = mmap.PAGESIZE
_LIFE = struct.Struct("=Qd")
_OPERATION = struct.Struct("=Qd")
_PROGRESS = struct.Struct("=Q")
_WHOLE = struct.Struct("=QdQdQ")
_OPERATION_OFFSET = _LIFE.size
_PROGRESS_OFFSET = _OPERATION_OFFSET + _OPERATION.size
_READS = 4


class Operation(IntEnum):
    """What the compute thread is at."""

    IDLE = 0
    IMPORT = 1
    LOAD = 2
    WARM = 3
    PREPARE = 4
    """A request is being read."""
    BATCH = 5
    PREFILL = 6
    DECODE = 7


@dataclass(frozen=True, slots=True)
class Beat:
    """What the page said at one moment."""

    count: int
    """Beats so far."""
    processor: float
    """Seconds of processor time that the compute thread has used, as of the last beat."""
    operation: Operation
    started: float
    """When the operation began, on CLOCK_MONOTONIC, which all processes share."""
    progress: int
    """Tokens, inputs or tensors done so far; only ever grows."""


class Writer:
    """The worker's side; each method costs less than a microsecond."""

    def __init__(self, page: mmap.mmap) -> None:
        self._page = page
        self._count = 0
        self._progress = 0

    def beat(self, processor: float) -> None:
        """The process lives; for the heartbeat thread only."""
        self._count += 1
        _LIFE.pack_into(self._page, 0, self._count, processor)

    def begin(self, operation: Operation) -> None:
        """An operation begins, and the one before has ended; for the compute thread only."""
        _OPERATION.pack_into(self._page, _OPERATION_OFFSET, operation, time.monotonic())

    def advance(self, done: int = 1) -> None:
        """The operation has come further; for the compute thread only."""
        self._progress += done
        _PROGRESS.pack_into(self._page, _PROGRESS_OFFSET, self._progress)


def share() -> tuple[Writer, int | None]:
    """A new page and the descriptor to send; the caller closes that.

    Where memory can't be shared (no memfd) nobody will read the page.
    """
    try:
        descriptor = os.memfd_create("tursi-heartbeat", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, SIZE)
    except (AttributeError, OSError):
        return Writer(mmap.mmap(-1, SIZE)), None
    return Writer(mmap.mmap(descriptor, SIZE)), descriptor


class Pulse(threading.Thread):
    """The heartbeat thread: beats as long as the process lives."""

    def __init__(self, writer: Writer, seconds: float = 1.0) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._seconds = seconds
        self._changed = threading.Event()
        self._writer = writer
        self._clock: int | None = None
        self._processor = 0.0

    def beat_every(self, seconds: float) -> None:
        """Beat now, and that often from now on."""
        self._seconds = seconds
        self._changed.set()

    def watch(self) -> None:
        """Tell from now on how much processor time the calling thread uses."""
        self._clock = time.pthread_getcpuclockid(threading.get_ident())

    def run(self) -> None:
        """Beat."""
        while True:
            self._writer.beat(self._measure())
            if self._changed.wait(self._seconds):
                self._changed.clear()

    def _measure(self) -> float:
        if self._clock is not None:
            try:
                self._processor = time.clock_gettime(self._clock)
            except OSError:
                self._clock = None  # the thread has ended
        return self._processor


class Reader:
    """The daemon's side; owns the descriptor.

    Raises OSError unless it is one of memory: reading another could block. It is
    read, not mapped: touching a mapped page that the worker has cut off would end
    the daemon with SIGBUS.
    """

    def __init__(self, descriptor: int) -> None:
        try:
            # Only memory has seals.
            fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor: int | None = descriptor

    def read(self) -> Beat | None:
        """The page as it is now; ``None`` if it can't be understood, or is closed."""
        if self._descriptor is None:
            return None
        before = b""
        for _ in range(_READS):
            # Twice the same: not read while it was being written.
            now = os.pread(self._descriptor, _WHOLE.size, 0)
            if now == before:
                break
            before = now
        try:
            count, processor, operation, started, progress = _WHOLE.unpack(before)
            return Beat(count, processor, Operation(operation), started, progress)
        except (struct.error, ValueError):
            return None

    def close(self) -> None:
        """Read no more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
