"""cgroup v2: a group for each life of a worker, where the system lets us have groups.

``ROOT/cgroup.controllers`` is there where version 2 is mounted with all its
controllers; ``/proc/self/cgroup`` tells our own group. Processes may not be
in a group whose children are controlled, so the daemon moves to one of its own
below it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from twisted.logger import Logger

from tursi.model import Limits

ROOT = Path("/sys/fs/cgroup")
DAEMON = "daemon"
"""The group of the daemon itself, its keepers and fetchers."""
PROCESSES = 512
"""Processes and threads of a worker for which nothing else is said."""
_WORKER = "worker-"
_WANTED = ("memory", "pids", "cpu")
_PERIOD = 100_000
"""Microseconds over which a share of the processor is counted."""

log = Logger()


class NotDelegated(Exception):
    """The system doesn't let us have groups; the message is a clause that says why."""


class Leaf:
    """The group of one life of a worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        return _counters(self.folder / "memory.events").get("oom_kill", 0)

    def peak(self) -> int | None:
        """The most memory that it had, in bytes; ``None`` before Linux 5.19."""
        try:
            return int((self.folder / "memory.peak").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def remove(self) -> bool:
        """Kill what may be left in it and remove it; whether it is gone."""
        with suppress(OSError):
            if _counters(self.folder / "cgroup.events").get("populated", 0):
                _write(self.folder / "cgroup.kill", "1")
        try:
            self.folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False  # the kernel takes a moment to bury the dead
        return True


class Groups:
    """The group that we have been given, and what is below it."""

    def __init__(self, base: Path, controllers: frozenset[str]) -> None:
        self.base = base
        self.controllers = controllers
        self._left: list[Leaf] = []

    def create(self, uuid: str, limits: Limits) -> Leaf:
        """A group with these limits; raises ``OSError``, and then there is none."""
        leaf = Leaf(self.base / f"{_WORKER}{uuid}")
        leaf.folder.mkdir()
        try:
            for name, value in self._settings(limits):
                _write(leaf.folder / name, value)
            if limits.memory is not None:
                # One process less would leave a worker that can't work.
                _write(leaf.folder / "memory.oom.group", "1")
                # Swapping only puts the end off. Not every kernel can swap.
                with suppress(OSError):
                    _write(leaf.folder / "memory.swap.max", "0")
        except OSError:
            leaf.remove()
            raise
        return leaf

    def _settings(self, limits: Limits) -> list[tuple[str, str]]:
        settings = []
        if limits.memory is not None:
            settings.append(("memory.max", str(limits.memory)))
        if "pids" in self.controllers:
            settings.append(("pids.max", str(limits.processes or PROCESSES)))
        if limits.cpu is not None and "cpu" in self.controllers:
            settings.append(("cpu.max", f"{round(limits.cpu * _PERIOD)} {_PERIOD}"))
        return settings

    def remove(self, leaf: Leaf) -> None:
        """Remove the group of a life that has ended, and those that couldn't be removed before."""
        self._left = [each for each in (*self._left, leaf) if not each.remove()]

    def sweep(self) -> None:
        """Kill and remove what an earlier daemon has left."""
        for folder in self.base.glob(f"{_WORKER}*"):
            self.remove(Leaf(folder))


def join(
    root: Path = ROOT,
    proc: Path = Path("/proc"),
    *,
    delegated: Callable[[Path], bool] | None = None,
    pid: int | None = None,
) -> Groups:
    """Take over our own group: move this process to a group below it and control the others there.

    Call it before any child is started. Raises ``NotDelegated``, and then nothing
    has changed.
    """
    pid = os.getpid() if pid is None else pid
    base = root / _own_group(root, proc).lstrip("/")
    if base.name == DAEMON and _is_controlled(base.parent):
        base = base.parent  # an earlier daemon's work: we were started in its place
    elif not (base == root or (delegated or is_delegated)(base)):
        raise NotDelegated(
            "the group isn't delegated to us: Delegate=yes in a systemd unit does that"
        )
    try:
        controllers = frozenset((base / "cgroup.controllers").read_text(encoding="ascii").split())
    except OSError as error:
        raise NotDelegated(f"{base} can't be read: {error.strerror}") from None
    if "memory" not in controllers:
        raise NotDelegated("memory isn't among the group's controllers")
    controllers &= frozenset(_WANTED)
    folder = base / DAEMON
    try:
        folder.mkdir(exist_ok=True)
        _write(folder / "cgroup.procs", str(pid))
        _write(
            base / "cgroup.subtree_control", " ".join(f"+{each}" for each in sorted(controllers))
        )
    except OSError as error:
        with suppress(OSError):
            _write(base / "cgroup.procs", str(pid))
            folder.rmdir()
        raise NotDelegated(f"{base} can't be divided: {error.strerror}") from None
    return Groups(base, controllers)


def _own_group(root: Path, proc: Path) -> str:
    if not (root / "cgroup.controllers").is_file():
        raise NotDelegated(f"version 2 isn't mounted at {root}")
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("0::"):
            return line.removeprefix("0::")
    raise NotDelegated("we are in no group of version 2")


def is_delegated(group: Path) -> bool:
    """Whether whoever manages groups here has left this one to us."""
    # A group of another user than root has been given to that user.
    with suppress(OSError):
        if os.getuid() != 0 and group.stat().st_uid == os.getuid():
            return True
    # By these systemd tells so also where everything belongs to root.
    for name in ("user.delegate", "trusted.delegate"):
        with suppress(OSError):
            if os.getxattr(group, name) == b"1":
                return True
    return False


def _is_controlled(group: Path) -> bool:
    try:
        text = (group / "cgroup.subtree_control").read_text(encoding="ascii")
    except OSError:
        return False
    return "memory" in text.split()


def _counters(file: Path) -> dict[str, int]:
    """A file of lines of a name and a number."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
        return {name: int(value) for name, value in (line.split() for line in lines)}
    except (OSError, ValueError):
        return {}


def _write(file: Path, text: str) -> None:
    # Not write_text, which would create and truncate: the kernel's files are there or aren't.
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)
