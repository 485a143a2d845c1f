"""What this machine is like, as far as it matters to the daemon; nothing is changed."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import platform
import re
import shutil
import socket
import sys
import time
from _sqlite3 import sqlite_version  # the version only: SQL is the store's
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tursi import config, mark, mounts, sandbox
from tursi.errors import ConfigurationError
from tursi.lock import StateLock
from tursi.model import Folders

PACKAGES = ("tursi", "torch", "transformers", "huggingface-hub", "twisted", "jinja2", "kernels")
_NVIDIA_VERSION = re.compile(r"Kernel Module\s+(?:for \S+\s+)?(\d+[\d.]*)|\b(\d{3,}\.\d+[\d.]*)\b")
_TCP = re.compile(r"tcp6?:(?:port=)?(\d+)")
_INTERFACE = re.compile(r"interface=((?:\\:|[^:])+)")


@dataclass(frozen=True)
class Place:
    """A file or folder."""

    what: str
    path: Path
    exists: bool = False
    mode: int = 0
    uid: int = 0
    writable: bool = False
    filesystem: str = ""
    free: int | None = None
    """Bytes, of a folder or of the one that it would be made in."""


@dataclass(frozen=True)
class Port:
    """Where the daemon is configured to listen."""

    endpoint: str
    host: str
    port: int
    taken: bool
    owner: str | None = None
    """Who listens there, where that can be known."""


@dataclass(frozen=True)
class Facts:
    """Everything that the checks look at."""

    system: str
    python: tuple[int, int, int]
    packages: dict[str, str | None]
    sqlite: str
    uid: int
    umask: int
    now: float
    configuration: Place
    configuration_problem: str | None
    token: Place | None
    places: tuple[Place, ...]
    socket: Place
    ports: tuple[Port, ...]
    holder: int | None
    """The pid in the lock, where somebody holds it."""
    status: dict[str, Any] | None
    """What the running daemon says of itself."""
    unanswered: str | None
    """Why it said nothing."""
    newest: float | None
    """When the state folder was last written to."""
    cgroup: str | None
    """Why there are no cgroups for workers; ``None`` where there are."""
    landlock: int | None
    seccomp: bool
    graphics: tuple[str, ...] = ()
    """Vendors of the graphics cards on the bus."""
    nvidia_driver: str | None = None
    devices: tuple[tuple[str, bool], ...] = ()
    """Device files of accelerators, and whether this user may open them."""
    orphans: tuple[tuple[int, str], ...] = ()
    """Processes that a daemon has left: pid and name."""
    database: dict[str, Any] | None = None
    """What a look through it has found, or ``error``: why it can't be read; ``None`` where
    there is none, or whoever holds it doesn't answer."""
    hub: str | None = None
    """How the hub answered, where that was asked for."""
    endpoint: str = field(default="")


def collect(
    folders: Folders,
    *,
    status: dict[str, Any] | None,
    unanswered: str | None,
    hub: str | None = None,
) -> Facts:
    """Look at the machine; takes a second or so."""
    settings, problem = config.Configuration(), None
    try:
        settings = config.load(None, folders.configuration)
    except ConfigurationError as error:
        problem = error.message
    token = settings.hub.token_file
    holder = _holder(folders.state)
    running = status is not None or holder is not None
    return Facts(
        system=platform.system(),
        python=sys.version_info[:3],
        packages={name: _version(name) for name in PACKAGES},
        sqlite=sqlite_version,
        uid=os.getuid(),
        umask=_umask(),
        now=time.time(),
        configuration=_place("configuration", folders.configuration),
        configuration_problem=problem,
        token=_place("token file", Path(token)) if token else None,
        places=tuple(
            _place(what, path)
            for what, path in (
                ("state folder", folders.state),
                ("runtime folder", folders.runtime),
                ("cache folder", folders.cache),
                ("logs folder", folders.logs),
                ("database", folders.database),
            )
        ),
        socket=_place("control socket", folders.socket),
        ports=() if running else tuple(_ports(settings)),
        holder=holder,
        status=status,
        unanswered=unanswered,
        newest=_newest(folders.state),
        cgroup=_cgroup(),
        landlock=sandbox.landlock_version(),
        seccomp=sandbox.sockets_deniable(),
        graphics=tuple(_graphics()),
        nvidia_driver=_nvidia_driver(),
        devices=tuple(
            (path, os.access(path, os.R_OK | os.W_OK))
            for pattern in ("/dev/nvidia[0-9]*", "/dev/nvidia-uvm", "/dev/kfd", "/dev/dri/render*")
            for path in sorted(glob.glob(pattern))  # noqa: PTH207 - as strings
        ),
        orphans=() if running else tuple(_orphans(folders.state)),
        hub=hub,
        endpoint=settings.hub.endpoint,
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _umask() -> int:
    text = _read("/proc/self/status")
    found = re.search(r"^Umask:\s*([0-7]+)", text, re.MULTILINE)
    return int(found[1], 8) if found else 0o022


def _place(what: str, path: Path) -> Place:
    there = next((each for each in (path, *path.parents) if each.exists()), Path("/"))
    known = usage = None
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(there)
    with contextlib.suppress(OSError):
        known = path.lstat()
    return Place(
        what,
        path,
        exists=known is not None,
        mode=known.st_mode if known else 0,
        uid=known.st_uid if known else 0,
        writable=os.access(there, os.W_OK),
        filesystem=mounts.file_system(_read(mounts.MOUNTS), there.resolve()),
        free=usage.free if usage else None,
    )


def _newest(state: Path) -> float | None:
    try:
        return max((entry.stat().st_mtime for entry in os.scandir(state)), default=None)
    except OSError:
        return None


def _holder(state: Path) -> int | None:
    """Who holds the lock on the state folder, as far as this user may know."""
    try:
        return StateLock(state).holder()
    except (ConfigurationError, OSError):
        return None


def _ports(settings: config.Configuration) -> Iterator[Port]:
    for listener in settings.http.listeners:
        found = _TCP.search(listener.endpoint)
        if found is None:
            continue
        named = _INTERFACE.search(listener.endpoint)
        host, number = (named[1].replace("\\", "") if named else "0.0.0.0"), int(found[1])  # noqa: S104 - what Twisted does
        taken = _taken(host, number)
        yield Port(listener.endpoint, host, number, taken, _listening(number) if taken else None)


def _taken(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _listening(port: int) -> str | None:
    """The process that listens on a port, if this user may know."""
    import psutil

    try:
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                return f"{psutil.Process(each.pid).name()} (pid {each.pid})"
    except (psutil.Error, OSError):
        return None
    return None


def _cgroup() -> str | None:
    own = [line for line in _read("/proc/self/cgroup").splitlines() if line.startswith("0::")]
    if not own or not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return "this system has no cgroup v2 alone"
    folder = Path("/sys/fs/cgroup") / own[0].removeprefix("0::").lstrip("/")
    if not os.access(folder, os.W_OK):
        return f"{folder} isn't delegated to this user"
    missing = {"memory", "pids", "cpu"} - set(_read(folder / "cgroup.controllers").split())
    return f"the controllers {', '.join(sorted(missing))} aren't delegated" if missing else None


def _graphics() -> Iterator[str]:
    vendors = {"0x10de": "NVIDIA", "0x1002": "AMD"}
    for device in glob.glob("/sys/bus/pci/devices/*"):  # noqa: PTH207 - as strings
        if _read(f"{device}/class").startswith("0x03"):
            vendor = vendors.get(_read(f"{device}/vendor").strip())
            if vendor:
                yield vendor


def _nvidia_driver() -> str | None:
    found = _NVIDIA_VERSION.search(_read("/proc/driver/nvidia/version"))
    return (found[1] or found[2]) if found else None


def _orphans(state: Path) -> Iterator[tuple[int, str]]:
    for pid, environment in mark.bearers(mark.of_state(state)):
        # A shell that has the variable set is nobody's orphan.
        if any(each.startswith(mark.of_worker("")) for each in environment):
            yield pid, _read(f"/proc/{pid}/comm").strip()


def _read(path: str | Path) -> str:
    """The text of a small file; empty if it can't be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return ""
