"""What this machine has, and what each worker may use of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tursi.errors import InvalidRequest

MIN_MEMORY = 64 * 1024 * 1024
"""Bytes below which not even an empty worker fits."""
MIN_CPU = 0.01
"""Cores: the kernel knows no smaller share."""
MIN_FILES = 64
MIN_PROCESSES = 16
MAX_PROCESSES = 4_194_304
"""As many as a Linux system can have."""
MAX_MEMORY = 2**50
MAX_CPU = 2**16
MAX_THREADS = 2**16
MAX_FILES = 2**31
"""More of any of them is a slip, whatever machine it is meant for."""


@dataclass(frozen=True, slots=True)
class Host:
    """What this machine has; ``None`` where that isn't known."""

    memory: int | None = None
    """Bytes."""
    cores: int | None = None
    files: int | None = None
    """Descriptors that a process may be allowed to have open."""
    gpus: tuple[str, ...] = ()
    """The devices that workers may compute on besides the processor, as far as known."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What each worker of a deployment may use; ``None`` means the default, or no limit."""

    memory: int | None = None
    """Bytes."""
    cpu: float | None = None
    """Cores: 1.5 is one and a half of them."""
    threads: int | None = None
    """Compute threads."""
    files: int | None = None
    """Open descriptors."""
    processes: int | None = None
    """Processes and threads together."""

    def check(self, host: Host) -> None:
        """Raise ``InvalidRequest`` for what can't be met on ``host``."""
        memory, cpu = self.memory, self.cpu
        if memory is not None and memory < MIN_MEMORY:
            raise _unmet("memory", f"{mebibytes(memory)} is less than {mebibytes(MIN_MEMORY)}")
        most = min(host.memory or MAX_MEMORY, MAX_MEMORY)
        if memory is not None and memory > most:
            raise _unmet("memory", f"{mebibytes(memory)} is more than the {mebibytes(most)} here")
        if cpu is not None and not math.isfinite(cpu):
            raise _unmet("cpu", f"{cpu:g} is no number of cores")
        if cpu is not None and cpu < MIN_CPU:
            raise _unmet("cpu", f"{cpu:g} is less than {MIN_CPU:g} of a core")
        _at_most("cpu", cpu, host.cores or MAX_CPU, "cores")
        _at_least("threads", self.threads, 1)
        _at_most("threads", self.threads, host.cores or MAX_THREADS, "cores")
        _at_least("files", self.files, MIN_FILES)
        _at_most("files", self.files, host.files or MAX_FILES, "that the system allows a process")
        _at_least("processes", self.processes, MIN_PROCESSES)
        _at_most("processes", self.processes, MAX_PROCESSES, "that Linux can have")


def mebibytes(size: int) -> str:
    """A size of memory, for people."""
    if size < 2**20:
        return f"{size} bytes"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and value < least:
        raise _unmet(name, f"{value:g} is less than {least:g}")


def _at_most(name: str, value: float | None, most: float, of_what: str) -> None:
    if value is not None and value > most:
        raise _unmet(name, f"{value:g} is more than the {most:g} {of_what}")


def _unmet(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"The limit {name} can't be met: {why}.", param=f"limits.{name}")
