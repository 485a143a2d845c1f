"""What a running daemon says of itself in its runtime folder: a PID file and a status file.

Both inform; who may run is decided by the lock on the state folder. So whatever
stands in them never keeps a daemon from starting, and no symbolic link in their
place is followed.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tursi import textfile

_MODE = 0o644
"""For all who may look into the folder."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One running daemon."""

    pid: int
    started_at: str
    """RFC 3339, UTC."""
    version: str
    state: str
    cache: str
    configuration: str | None
    """The file it was configured by; ``None`` if there was none."""
    log: str | None
    """The file it logs to; ``None`` if it doesn't log to a file."""
    listeners: tuple[str, ...]
    foreground: bool
    """Whether somebody else looks after the process: a service manager or a terminal."""
    stop_seconds: float
    """How long it may take to stop."""


def write_pid(path: Path, owner: tuple[int, int] | None = None) -> None:
    """Make ``path`` a PID file of this process."""
    textfile.replace(path, f"{os.getpid()}\n", _MODE, owner)


def write_status(path: Path, instance: Instance) -> None:
    """Make ``path`` say how ``instance`` is."""
    textfile.replace(path, json.dumps(asdict(instance), indent=2) + "\n", _MODE)


def read_status(path: Path) -> Instance | None:
    """What the status file at ``path`` says, if it is one."""
    try:
        found: Any = json.loads(path.read_bytes())
        return Instance(**{**found, "listeners": tuple(found["listeners"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remove(path: Path) -> None:
    """Remove what this module wrote at ``path``; who may not empties it."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        # The folder is root's and the file ours: an empty one names no process.
        with suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC))
    except OSError:
        pass


def make_folder(folder: Path, owner: tuple[int, int] | None = None) -> None:
    """Make ``folder`` where it is missing, for ``owner`` and its group whatever the umask is."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o750)
    if owner is not None:
        os.chown(folder, *owner, follow_symlinks=False)
