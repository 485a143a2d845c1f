"""One life of a child process, as the daemon sees it: the other end of ``tursi/keeper.py``."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from tursi.supervision.logs import LifeLog


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start."""

    uuid: str
    """Of the life; the child finds it in its environment as TURSI_WORKER."""
    arguments: tuple[str, ...]
    """argv of the worker; the first is the absolute path of its executable."""
    environment: Mapping[str, str]
    """The whole environment, built from an allow-list."""
    log: LifeLog
    """Where stdout and stderr go; closed when the life has ended."""


@dataclass(frozen=True, slots=True)
class Life:
    """A keeper that has just been spawned."""

    uuid: str
    keeper_pid: int
    keeper_start_time: int
    """Field 22 of ``/proc/PID/stat``: clock ticks since boot."""
    boot_id: str
    socket: socket.socket
    """The daemon's end of the data socket; whoever receives this owns and closes it."""


@dataclass(frozen=True, slots=True)
class Exit:
    """What is known of an end."""

    exit_status: int | None = None
    signal: int | None = None
    worker_pid: int | None = None
    peak_rss: int | None = None
    """Bytes; never below the 8 MB or so of the keeper it was forked from."""
    cpu_seconds: float | None = None
    reported: bool = False
    """False: the keeper died before the worker, or before it had started one."""
    tree: str = "nothing left"
    """How the rest of the process tree was cleared."""
