"""What the kernel tells about a process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """What a process uses."""

    rss: int
    """Bytes."""
    cpu_seconds: float


def usage(pid: int, proc: Path = PROC) -> Usage | None:
    """What the process uses now; ``None`` if it is gone."""
    try:
        pages = (proc / str(pid) / "statm").read_text(encoding="ascii").split()[1]
        stat = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        # The second field, the name, may hold blanks and parentheses.
        fields = stat.rpartition(")")[2].split()
        return Usage(int(pages) * _PAGE, (int(fields[11]) + int(fields[12])) / _TICKS)
    except (OSError, IndexError, ValueError):
        return None


def oom_kills(proc: Path = PROC) -> int:
    """How many processes the kernel has killed for want of memory since it runs."""
    try:
        lines = (proc / "vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
