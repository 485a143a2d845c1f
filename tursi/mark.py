"""The marks by which a daemon's processes are found again: variables in their environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

STATE = "TURSI_STATE"
"""Holds the daemon's state folder; all its children have it."""
WORKER = "TURSI_WORKER"
"""Holds the uuid of a life; workers have it, and whatever they start."""


def of_state(folder: Path) -> bytes:
    """The mark of a daemon on this state folder, as it stands in an environment."""
    return os.fsencode(f"{STATE}={folder}")


def of_worker(uuid: str) -> bytes:
    """The mark of this life of a worker."""
    return f"{WORKER}={uuid}".encode()


def bearers(mark: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Pid and environment of the other processes with that mark, as far as one may look."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            with suppress(OSError):
                environment = (folder / "environ").read_bytes().split(b"\0")
                if mark in environment:
                    yield int(folder.name), environment
