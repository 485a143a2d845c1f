"""What each life of a worker is confined to, by what this machine offers."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tursi.model import Containment, Limits
from tursi.removal import remove_tree
from tursi.supervision.cgroup import Groups, Leaf
from tursi.supervision.life import FILES, Confinement

_READ = (
    "/usr", "/lib", "/lib64", "/bin", "/opt/rocm",
    # Not all of /etc: it has secrets. What the C library and OpenSSL want at start:
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime",
    "/etc/nsswitch.conf", "/etc/passwd", "/etc/group", "/etc/ssl/openssl.cnf", "/etc/ssl/certs",
    "/etc/pki/tls/openssl.cnf", "/etc/crypto-policies", "/etc/alternatives", "/etc/OpenCL",
    # Not all of /proc: it has the other processes.
    "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version",
    "/proc/filesystems", "/proc/devices", "/proc/sys/kernel", "/proc/sys/vm",
    "/proc/driver/nvidia", "/sys/devices", "/sys/bus", "/sys/class", "/sys/module/nvidia",
    "/sys/kernel/mm", "/dev/urandom", "/dev/random",
)  # fmt: skip
_READ_TO_DOWNLOAD = (
    # Names of hosts, and whom to trust.
    "/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/gai.conf", "/etc/services",
    "/etc/protocols", "/run/systemd/resolve", "/run/nscd", "/etc/ssl", "/etc/pki",
    "/etc/ca-certificates", "/etc/mime.types",
)  # fmt: skip
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
_WRITE = ("/dev/null", "/dev/zero", "/dev/kfd", "/dev/dri")
_DEVICES = "/dev/nvidia*"
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - nothing of ours is put there
"""What every process of this user puts there; only a GPU's driver can't do without."""


class Enclosure:
    """What one life of a worker is confined to; ``end`` it when the life has ended."""

    def __init__(self, confinement: Confinement, groups: Groups | None, leaf: Leaf | None) -> None:
        self.confinement = confinement
        self._groups = groups
        self._leaf = leaf

    @property
    def limits_memory(self) -> bool:
        """Whether the kernel holds it to its limit, so that nobody has to watch."""
        return self._leaf is not None

    def killed_for_memory(self) -> bool | None:
        """Whether the kernel has killed any of it for want of memory; ``None``: can't be known."""
        return self._leaf.kills() > 0 if self._leaf else None

    def peak(self) -> int | None:
        """The most memory that it had, where the kernel counts that."""
        return self._leaf.peak() if self._leaf else None

    def end(self) -> None:
        """Remove its group."""
        if self._groups is not None and self._leaf is not None:
            self._groups.remove(self._leaf)


class Encloser:
    """Makes the enclosures.

    ``groups`` are our cgroups, if there are any, else ``because`` says why not.
    ``landlock`` is the version of Landlock, ``deny_sockets`` says whether the
    kernel can do that. ``temporary`` is the folder for the workers' private ones.
    """

    def __init__(
        self,
        *,
        groups: Groups | None = None,
        because: str | None = None,
        landlock: int | None = None,
        deny_sockets: bool = False,
        temporary: Path | None = None,
    ) -> None:
        self._groups = groups
        self._landlock = landlock or 0
        self._deny_sockets = deny_sockets
        self._temporary = temporary
        self.level = Containment(
            limits="cgroup v2" if groups else "rlimits and watch",
            because=None if groups else because,
            landlock=landlock,
            sockets=deny_sockets,
        )

    def sweep(self) -> None:
        """Remove what an earlier daemon has left; blocks, and may take a while."""
        if self._groups is not None:
            self._groups.sweep()
        if self._temporary is not None:
            with suppress(OSError):
                remove_tree(str(self._temporary))
            self._temporary.mkdir(mode=0o700, exist_ok=True)

    def enclose(
        self,
        uuid: str,
        limits: Limits,
        *,
        model: str,
        command: tuple[str, ...],
        environment: Mapping[str, str],
    ) -> Enclosure:
        """For a life of ``command`` with the model in that folder; raises ``OSError``."""
        leaf = self._groups.create(uuid, limits) if self._groups else None
        read, listed = _code(command)
        read += tuple(filter(None, environment.get("LD_LIBRARY_PATH", "").split(":")))
        devices = glob.glob(_DEVICES)  # noqa: PTH207 - as strings
        confinement = Confinement(
            files=limits.files or FILES,
            group=str(leaf.folder) if leaf else "",
            temporary=str(self._temporary / uuid) if self._temporary else "",
            landlock=self._landlock,
            read=(*_READ, *read),
            listed=listed,
            write=(*_WRITE, *devices, *([_SHARED_MEMORY] if devices else ())),
            model=model,
            deny_sockets=self._deny_sockets,
            drop_capabilities=True,
        )
        return Enclosure(confinement, self._groups, leaf)

    def enclose_fetcher(
        self, cache: Path, command: tuple[str, ...], environment: Mapping[str, str]
    ) -> Confinement:
        """For a download: it may write below ``cache`` only, and reach the network."""
        read, listed = _code(command)
        named = (environment.get(name, "") for name in _CERTIFICATES)
        return Confinement(
            landlock=self._landlock,
            read=(*_READ, *_READ_TO_DOWNLOAD, *read, *filter(None, named), *_tokens(environment)),
            listed=listed,
            write=(*_WRITE, str(cache)),
            network=True,
        )


def _tokens(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Where huggingface_hub looks for a token."""
    caches = environment.get("XDG_CACHE_HOME") or f"{environment.get('HOME', '')}/.cache"
    home = environment.get("HF_HOME") or f"{caches}/huggingface"
    tokens = (environment.get("HF_TOKEN_PATH") or f"{home}/token", f"{home}/stored_tokens")
    return tuple(os.path.expanduser(each) for each in tokens)  # noqa: PTH111 - as strings


def _code(command: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to read and what to list so that Python runs and finds its modules."""
    package = Path(__file__).parents[1]
    read = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, str(package)]
    read += [word for word in command if word.startswith("/")]
    # An import looks for the package's name among those beside it. In an
    # installation that may be read anyway; a checkout has more than its package.
    return tuple(dict.fromkeys(read)), (str(package.parent),)
