"""The machine: what it has, and how much of it the daemon may use.

In a container, or a unit with ``MemoryMax=``, that is less memory than the machine has:
who takes more than its control group may have is killed, however much else is free.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import msgspec

from twisted.logger import Logger

from tursi.config import Configuration
from tursi.model import Host

log = Logger()

_MANY_FILES = 65536
"""Open files beyond which there is no use for more."""
_OWN_FILES = 512
"""Open files for everything but connections of clients."""
_FEW = 16
_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")
_ENDLESS = 2**60
"""Bytes that are no limit, as version 1 has it."""
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""In which a control group of version 2, and one of version 1, has its limit and its use, and
what of that counts for files that nobody uses just now."""


def host(environment: Mapping[str, str]) -> Host:
    """What this machine has."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Host(
        memory=memory() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cores=len(os.sched_getaffinity(0)),
        files=None if files == resource.RLIM_INFINITY else files,
        gpus=tuple(f"cuda:{index}" for index in range(_gpus(environment))),
    )


def memory(proc: Path = _PROC, groups: Path = _GROUPS) -> int | None:
    """Bytes of memory that there are for us and all our children."""
    found = [limit for limit, _ in _allowances(proc, groups)]
    there = _line(proc / "meminfo", "MemTotal:")
    return min(found if there is None else [*found, there * 1024], default=None)


def available(proc: Path = _PROC, groups: Path = _GROUPS) -> int | None:
    """Bytes of it that can be taken now, without swapping and without being killed for it."""
    found = [max(0, limit - used) for limit, used in _allowances(proc, groups)]
    free = _line(proc / "meminfo", "MemAvailable:")
    return min(found if free is None else [*found, free * 1024], default=None)


def _allowances(proc: Path, groups: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each control group that we are in, as far as it has a limit."""
    for folder, (limit, used, unused) in _limited(proc, groups):
        most, has = _number(folder / limit), _number(folder / used)
        if most is not None and has is not None:
            yield most, has - (_line(folder / "memory.stat", unused) or 0)


@cache
def _limited(proc: Path, groups: Path) -> tuple[tuple[Path, tuple[str, str, str]], ...]:
    """Those groups, with their files; looked for once, as that takes longer than to read them."""
    return tuple(
        (folder, files)
        for folder in _own_groups(proc, groups)
        for files in _FILES
        if (_number(folder / files[0]) or _ENDLESS) < _ENDLESS
    )


def _own_groups(proc: Path, groups: Path) -> Iterator[Path]:
    """Our control groups and those that they are in, up to the root that we see."""
    try:
        lines = (proc / "self/cgroup").read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = groups / "memory" if kinds else groups
        folder = root / path.lstrip("/")
        # A container may be told a path that only its host can see.
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(root))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return None


def _line(path: Path, name: str) -> int | None:
    """The number after ``name`` in a file of such lines."""
    try:
        for line in path.read_text("ascii").splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


def _gpus(environment: Mapping[str, str]) -> int:
    """How many GPUs workers can see."""
    here = len([*Path("/dev").glob("nvidia[0-9]*")])
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    return here if chosen is None else min(here, len([*filter(None, chosen.split(","))]))


def fitting(configuration: Configuration) -> Configuration:
    """``configuration`` with no more connections than there may be descriptors for.

    Without one left nobody could be let in, on the control socket neither.
    """
    http = configuration.http
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    most = max(_FEW, (files - _OWN_FILES) // (len(http.listeners) + 1))
    if most >= http.max_connections:
        return configuration
    log.warn(
        "http.max_connections is taken as {fitting}: the system allows this process only {files} "
        "open files (LimitNOFILE=, ulimit -n)",
        fitting=most,
        files=files,
    )
    return msgspec.structs.replace(
        configuration, http=msgspec.structs.replace(http, max_connections=most)
    )
