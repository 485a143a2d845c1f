"""What the kernel tells about a process."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
MOST = 1000
"""Processes below one that are looked at: a worker that forks must not keep the daemon busy."""
MANY = 64
"""Processes from which on what they share is estimated."""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
_BLOCK = 65536


class Usage(NamedTuple):
    """What a process uses."""

    rss: int
    """Bytes."""
    cpu_seconds: float


def usage(pid: int, proc: Path = PROC) -> Usage | None:
    """What the process uses now; ``None`` if it is gone."""
    try:
        # The second field, the name, may hold blanks and parentheses.
        fields = _read(f"{proc}/{pid}/stat").rpartition(b")")[2].split()
        return Usage(int(fields[21]) * _PAGE, (int(fields[11]) + int(fields[12])) / _TICKS)
    except (OSError, IndexError, ValueError):
        return None


def highest(pid: int, proc: Path = PROC) -> int | None:
    """The most bytes that the process has had in memory; ``None`` if it is gone."""
    try:
        _, found, rest = _read(f"{proc}/{pid}/status").partition(b"\nVmHWM:")
        return int(rest.split(maxsplit=1)[0]) * 1024 if found else None
    except (OSError, IndexError, ValueError):
        return None


def descendants(pid: int, proc: Path = PROC) -> list[int]:
    """All processes below that one, or some more than ``MOST`` of them."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        if len(found) > MOST:
            break
        try:
            tasks = list((proc / str(parent) / "task").iterdir())
        except OSError:
            continue
        for task in tasks:
            with suppress(OSError, ValueError):
                children = [int(word) for word in (task / "children").read_text("ascii").split()]
                found += children
                waiting += children
    return found


def memory_below(pid: int, enough: int, proc: Path = PROC) -> int:
    """Bytes that the processes below that one use together.

    What they share counts once, but only where they would have more than
    ``enough`` without that: it is expensive to find out.
    """
    processes = descendants(pid, proc)
    used = sum(one.rss for each in processes if (one := usage(each, proc)) is not None)
    if len(processes) < 2 or used <= enough:
        return used
    if len(processes) > MANY:
        # All of them could take longer than there is time.
        sizes = [_sizes(each, proc) for each in processes]
        return sum(resident - shared for resident, shared in sizes) + max(
            shared for _, shared in sizes
        )
    return sum(_share(each, proc) for each in processes)


def _sizes(pid: int, proc: Path) -> tuple[int, int]:
    """What is in memory, and the part of that which may be shared, in bytes."""
    try:
        pages = (proc / str(pid) / "statm").read_text(encoding="ascii").split()
        return int(pages[1]) * _PAGE, int(pages[2]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0, 0


def _share(pid: int, proc: Path) -> int:
    """The process's part of what it uses, by how many share it (PSS)."""
    try:
        lines = (proc / str(pid) / "smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def oom_kills(proc: Path = PROC) -> int:
    """How many processes the kernel has killed for want of memory since it runs."""
    try:
        _, found, rest = (b"\n" + _read(f"{proc}/vmstat")).partition(b"\noom_kill ")
    except OSError:
        return 0
    return int(rest.split(maxsplit=1)[0]) if found else 0


def _read(path: str) -> bytes:
    """A small file of the kernel's, in a fraction of the time that ``pathlib`` takes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read = b""
        while more := os.read(descriptor, _BLOCK):
            read += more
        return read
    finally:
        os.close(descriptor)
