"""What the facts mean: each check gives a finding with one line of advice. Pure."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from tursi.doctor.facts import Facts, Place
from tursi.model import mebibytes


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """Works, and could be better."""
    WARNING = "warning"
    """Works, and will bite one day."""
    PROBLEM = "problem"
    """Something doesn't work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Level
    message: str
    advice: str | None = None


_LEAST_DISK = 1024**3
_LARGE_DATABASE = 1024**3
_SMALL_DISK = 10 * 1024**3
_FLOORS = {"torch": (2, 10), "transformers": (5, 5)}
"""Below these, known holes let a model run code."""
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "afs",
     "fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "ocfs2", "gfs2"}
)  # fmt: skip


def examine(facts: Facts) -> list[Finding]:
    """Every finding, in the order to read them in."""
    found: list[Finding] = []
    for check in (
        _system, _packages, _sqlite, _configuration, _token, _places, _database, _umask, _daemon,
        _socket,
        _ports, _orphans, _clock, _confinement, _accelerators, _hub,
    ):  # fmt: skip
        found += check(facts)
    return found


def _ok(name: str, message: str) -> Finding:
    return Finding(name, Level.OK, message)


def _system(facts: Facts) -> Iterator[Finding]:
    shown = ".".join(map(str, facts.python[:2]))
    if facts.system != "Linux":
        yield Finding(
            "system", Level.PROBLEM, f"{facts.system} is no Linux",
            "Run the daemon on Linux; it needs its way to watch and end processes.",
        )  # fmt: skip
    if facts.python < (3, 11, 0):
        yield Finding("python", Level.PROBLEM, shown, "Install Python 3.11 or newer.")
    else:
        yield _ok("python", shown)


def _packages(facts: Facts) -> Iterator[Finding]:
    for name, floor in _FLOORS.items():
        installed = facts.packages.get(name)
        wanted = ".".join(map(str, floor))
        if installed is None:
            yield Finding(name, Level.PROBLEM, "not installed", f"pip install '{name}>={wanted}'")
        elif _numbers(installed) < floor:
            yield Finding(
                name, Level.PROBLEM, f"{installed} has known holes by which a model runs code",
                f"pip install --upgrade '{name}>={wanted}'",
            )  # fmt: skip
        else:
            yield _ok(name, installed)
    if facts.packages.get("kernels"):
        yield Finding(
            "kernels", Level.WARNING, f"{facts.packages['kernels']} is installed",
            "pip uninstall kernels: with it, transformers fetches and runs code that models name.",
        )  # fmt: skip


def _sqlite(facts: Facts) -> Iterator[Finding]:
    if _numbers(facts.sqlite) < (3, 51, 3):
        yield Finding(
            "sqlite", Level.NOTE, f"{facts.sqlite} is older than 3.51.3",
            "Keep other programs away from the database while the daemon runs: before 3.51.3 "
            "two that write can damage it. Tursi itself writes by one connection only.",
        )  # fmt: skip
    else:
        yield _ok("sqlite", facts.sqlite)


def _configuration(facts: Facts) -> Iterator[Finding]:
    place = facts.configuration
    if facts.configuration_problem is not None:
        yield Finding(
            "configuration", Level.PROBLEM, facts.configuration_problem,
            "Correct the file; a running daemon keeps the configuration that it has.",
        )  # fmt: skip
    elif not place.exists:
        yield _ok("configuration", f"there is no {place.path}: the defaults hold")
    elif place.mode & 0o022:
        yield Finding(
            "configuration", Level.PROBLEM, f"others may write {place.path}",
            f"chmod go-w {place.path}",
        )  # fmt: skip
    else:
        yield _ok("configuration", f"{place.path} is valid")


def _token(facts: Facts) -> Iterator[Finding]:
    place = facts.token
    if place is None:
        return
    if not place.exists:
        yield Finding(
            "hub token", Level.PROBLEM, f"there is no {place.path}",
            "Correct token_file under [hub], or write the token there.",
        )  # fmt: skip
    elif place.mode & 0o077:
        yield Finding(
            "hub token", Level.PROBLEM, f"others may read {place.path}", f"chmod 600 {place.path}"
        )
    else:
        yield _ok("hub token", f"{place.path} is the owner's only")


def _places(facts: Facts) -> Iterator[Finding]:
    for place in facts.places:
        problems = [*_place(place, facts)]
        yield from problems
        if problems:
            continue
        shown = str(place.path) if place.exists else f"{place.path} will be made"
        if place.free is not None:
            shown += f", {mebibytes(place.free)} free"
        yield _ok(place.what, shown)


def _place(place: Place, facts: Facts) -> Iterator[Finding]:
    name, path = place.what, place.path
    if place.exists and stat.S_ISLNK(place.mode) and name == "database":
        yield Finding(
            name, Level.WARNING, f"{path} is a link", "Put the file itself there; backups copy it."
        )
    if not place.writable and facts.status is None:
        who = "root" if facts.uid == 0 else f"uid {facts.uid}"
        yield Finding(
            name, Level.PROBLEM, f"{who} can't write to {path}",
            "chown it to the daemon's user, or run this as that user: sudo -u USER tursi doctor",
        )  # fmt: skip
    if place.exists and place.mode & 0o002 and not stat.S_ISLNK(place.mode):
        yield Finding(name, Level.PROBLEM, f"everybody may write {path}", f"chmod o-w {path}")
    elif place.exists and name == "database" and place.mode & 0o077:
        yield Finding(name, Level.WARNING, f"others may read {path}", f"chmod 600 {path}")
    if place.filesystem in _NETWORK and name in {"state folder", "database"}:
        yield Finding(
            name, Level.PROBLEM, f"{path} is on a network file system ({place.filesystem})",
            "Move the state folder to a local disk (--state): SQLite's log needs shared memory.",
        )  # fmt: skip
    if place.free is not None and name != "database":
        if place.free < _LEAST_DISK:
            yield Finding(
                name, Level.PROBLEM, f"only {mebibytes(place.free)} are free for {path}",
                "Free some space; `tursi ps` shows which models are in use.",
            )  # fmt: skip
        elif place.free < _SMALL_DISK and name == "cache folder":
            yield Finding(
                name, Level.NOTE, f"{mebibytes(place.free)} are free for {path}",
                "Few models fit there; --cache or TURSI_CACHE_DIR names another disk.",
            )  # fmt: skip


def _database(facts: Facts) -> Iterator[Finding]:
    found = facts.database
    if found is None:
        return
    if "error" in found:
        yield Finding(
            "integrity", Level.PROBLEM, str(found["error"]),
            "`tursi db check` reads all of it; `tursi db restore FILE` puts a copy back.",
        )  # fmt: skip
        return
    shown = f"schema {found['schema']}, {mebibytes(found['size'])}"
    if found["problems"]:
        yield Finding(
            "integrity", Level.PROBLEM, f"the database is damaged: {found['problems'][0]}",
            "Stop the daemon, and put a copy back with `tursi db restore FILE`; "
            "`tursi db check` lists those from before upgrades.",
        )  # fmt: skip
    elif waiting := found.get("waiting"):
        yield Finding(
            "integrity", Level.NOTE, f"{shown}: {waiting} upgrade{'s' * (waiting > 1)} to come",
            "Nothing to do: the next start keeps a copy of it and upgrades it.",
        )  # fmt: skip
    elif found["size"] > _LARGE_DATABASE:
        yield Finding(
            "integrity", Level.NOTE, f"the database is whole and large: {shown}",
            "Keep less (events, lives, crashes and the audit, under [storage]); "
            "starts and backups read all of it.",
        )  # fmt: skip
    else:
        yield _ok("integrity", f"the database is whole: {shown}")


def _umask(facts: Facts) -> Iterator[Finding]:
    shown = f"{facts.umask:03o}"
    if facts.umask & 0o002:
        yield _ok("umask", shown)
    else:
        yield Finding(
            "umask", Level.WARNING, f"{shown} lets everybody write new files",
            "Start the daemon with umask 027 (twistd --umask 027, UMask= in a unit).",
        )  # fmt: skip


def _daemon(facts: Facts) -> Iterator[Finding]:
    if facts.status is not None:
        installed, running = facts.packages.get("tursi"), str(facts.status.get("version"))
        shown = f"{running} answers (pid {facts.status.get('pid')})"
        if installed is not None and installed != running:
            yield Finding(
                "daemon", Level.WARNING, f"{shown}, but {installed} is installed",
                "Restart the daemon to bring it to the version that is installed.",
            )  # fmt: skip
        else:
            yield _ok("daemon", shown)
    elif facts.holder is not None:
        yield Finding(
            "daemon", Level.PROBLEM,
            f"process {facts.holder} holds the state folder, but nothing answers"
            + (f" ({facts.unanswered})" if facts.unanswered else ""),
            f"Look at its log; `kill -QUIT {facts.holder}` may tell where it stands.",
        )  # fmt: skip
    else:
        yield Finding(
            "daemon", Level.NOTE, "isn't running", "Start it: twistd -n tursi, or its service."
        )


def _socket(facts: Facts) -> Iterator[Finding]:
    place = facts.socket
    if len(str(place.path).encode()) > 107:
        yield Finding(
            "control socket", Level.PROBLEM, f"{place.path} is longer than 107 bytes",
            "Name a shorter runtime folder (--runtime or TURSI_RUNTIME_DIR).",
        )  # fmt: skip
    elif place.exists and not stat.S_ISSOCK(place.mode):
        yield Finding(
            "control socket", Level.PROBLEM, f"{place.path} is no socket", f"rm {place.path}"
        )
    elif place.exists and place.mode & 0o007:
        yield Finding(
            "control socket", Level.PROBLEM, f"everybody may use {place.path}",
            "Restart the daemon, which makes it anew for its user and group only.",
        )  # fmt: skip
    elif place.exists and facts.holder is None and facts.status is None:
        yield Finding(
            "control socket", Level.NOTE, f"{place.path} is a stale one",
            "Nothing to do: the next daemon removes it.",
        )  # fmt: skip
    elif place.exists:
        yield _ok("control socket", str(place.path))


def _ports(facts: Facts) -> Iterator[Finding]:
    for port in facts.ports:
        where = f"{port.host}:{port.port}"
        if port.taken:
            yield Finding(
                "port", Level.PROBLEM, f"{where} is in use by {port.owner or 'another process'}",
                f"End that, or change the endpoint {port.endpoint!r} under [[http.listeners]].",
            )  # fmt: skip
        else:
            yield _ok("port", f"{where} is free")


def _orphans(facts: Facts) -> Iterator[Finding]:
    if facts.orphans:
        shown = ", ".join(f"{name} {pid}" for pid, name in facts.orphans[:5])
        more = f" and {len(facts.orphans) - 5} more" if len(facts.orphans) > 5 else ""
        yield Finding(
            "orphans", Level.PROBLEM, f"{shown}{more} belong to a daemon that is gone",
            "Start the daemon, which ends them first; or kill -9 them.",
        )  # fmt: skip
    elif facts.status is None and facts.holder is None:
        yield _ok("orphans", "no process of an earlier daemon is left")


def _clock(facts: Facts) -> Iterator[Finding]:
    if facts.newest is not None and facts.newest > facts.now + 60:
        hours = (facts.newest - facts.now) / 3600
        yield Finding(
            "clock", Level.WARNING, f"the state folder was written {hours:.1f} h in the future",
            "Set the clock and keep it set (systemd-timesyncd, chrony): times of events are wrong.",
        )  # fmt: skip
    elif not 1_700_000_000 < facts.now < 4_100_000_000:
        yield Finding(
            "clock", Level.PROBLEM, "the clock can't be right",
            "Set it: certificates of the hub are refused, and times of events are wrong.",
        )  # fmt: skip
    else:
        yield _ok("clock", "plausible")


def _confinement(facts: Facts) -> Iterator[Finding]:
    level = (facts.status or {}).get("containment") or {}
    because = level.get("because", facts.cgroup) if level else facts.cgroup
    if because:
        yield Finding(
            "cgroups", Level.NOTE, f"workers get none: {because}",
            "Run the daemon as a systemd service with Delegate=memory pids cpu, for hard limits.",
        )  # fmt: skip
    else:
        yield _ok("cgroups", "workers get groups of their own")
    if facts.landlock is None:
        yield Finding(
            "landlock", Level.WARNING, "this kernel has none, so workers can read other files",
            "Use Linux 5.13 or newer with lsm=landlock,... among the kernel's parameters.",
        )  # fmt: skip
    elif facts.landlock < 4:
        yield Finding(
            "landlock", Level.NOTE, f"version {facts.landlock} confines files only",
            "Linux 6.7 or newer keeps workers from TCP, too.",
        )  # fmt: skip
    else:
        yield _ok("landlock", f"version {facts.landlock}")
    if facts.seccomp:
        yield _ok("seccomp", "workers are kept from the network")
    else:
        yield Finding(
            "seccomp", Level.WARNING, "not to be had here, so workers can reach the network",
            "Use a kernel with seccomp filters on x86_64 or aarch64.",
        )  # fmt: skip


def _accelerators(facts: Facts) -> Iterator[Finding]:
    if "NVIDIA" in facts.graphics and facts.nvidia_driver is None:
        yield Finding(
            "gpu", Level.PROBLEM, "there is an NVIDIA card, but no driver is loaded",
            "Install NVIDIA's driver, then check with nvidia-smi.",
        )  # fmt: skip
    closed = [path for path, may in facts.devices if not may]
    if closed:
        yield Finding(
            "gpu", Level.PROBLEM, f"this user can't open {closed[0]}",
            "Add the daemon's user to the groups video and render, and restart the daemon.",
        )  # fmt: skip
    elif facts.nvidia_driver is not None and not any("nvidia" in path for path, _ in facts.devices):
        yield Finding(
            "gpu", Level.PROBLEM, "the driver is loaded, but there are no /dev/nvidia*",
            "Run nvidia-modprobe -u -c 0 once as root, or pass the devices to the container.",
        )  # fmt: skip
    elif facts.nvidia_driver is not None:
        yield _ok("gpu", f"NVIDIA, driver {facts.nvidia_driver}")
    elif facts.devices:
        yield _ok("gpu", ", ".join(path for path, _ in facts.devices))
    elif not facts.graphics:
        yield _ok("gpu", "none; models run on the processor")


def _hub(facts: Facts) -> Iterator[Finding]:
    if facts.hub is None:
        return
    if facts.hub:
        yield Finding(
            "hub", Level.PROBLEM, f"{facts.endpoint} can't be reached ({facts.hub})",
            "Check the network, the proxy (HTTPS_PROXY) and endpoint under [hub].",
        )  # fmt: skip
    else:
        yield _ok("hub", f"{facts.endpoint} answers")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part)  # type: ignore[index]  # it always matches
