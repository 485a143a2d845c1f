"""What a worker that has been taken over would try; run inside of it by ``scripted_worker``.

``args.json`` beside this file says where the daemon is. What came of each attempt
is left in ``found``, as JSON.
"""

# ruff: noqa: PTH115, PTH208, SIM115
# Short is better here.

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import resource
import socket
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

given = json.loads(Path(__file__).with_name("args.json").read_bytes())
daemon, keeper = given["daemon"], os.getppid()
files = {name: Path(given[name]) for name in ("database", "configuration", "socket", "state")}
mine = Path(os.environ["TMPDIR"])
libc = ctypes.CDLL(None, use_errno=True)
X86_64 = os.uname().machine == "x86_64"


def call(x86_64: int, aarch64: int, *arguments: int | bytes) -> None:
    """A system call as the kernel has it."""
    number = x86_64 if X86_64 else aarch64
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    if libc.syscall(ctypes.c_long(number), *words) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def in_a_child(attempt: Callable[[], object]) -> None:
    """What would change this process for good."""
    pid = os.fork()
    if pid == 0:
        try:
            attempt()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 255)
        except BaseException:  # noqa: BLE001 - a forked child never returns
            os._exit(255)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, "in the child")


def old_call() -> None:
    """getpid() by the 32-bit interface, whose numbers are others."""
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\x48\x98\xc3")
    answer = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    if answer < 0:
        raise OSError(-answer, os.strerror(-answer))


def datagram() -> None:
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", str(files["socket"]))


def datagram_of_a_pair() -> None:
    one, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    one.sendto(b"READY=1", str(files["socket"]))


def peek(pid: int) -> None:
    here = ctypes.create_string_buffer(8)
    mine_, theirs = struct.pack("PN", ctypes.addressof(here), 8), struct.pack("PN", 0x400000, 8)
    call(310, 270, pid, mine_, 1, theirs, 1, 0)


state = files.pop("state")
BY_LANDLOCK: dict[str, Callable[[], object]] = {
    **{f"read {name}": partial(open, path, "rb") for name, path in files.items()},
    **{f"change {name}": partial(open, path, "r+b") for name, path in files.items()},
    **{f"move {name}": partial(path.rename, f"{path}-moved") for name, path in files.items()},
    **{
        f"/proc/{who}/{file}": partial(open, f"/proc/{pid}/{file}", "rb")
        for who, pid in (("daemon", daemon), ("keeper", keeper))
        for file in ("environ", "mem", "maps", "cmdline", "status")
    },
    "list the state": partial(os.listdir, state),
    "move the state": partial(state.rename, f"{state}-moved"),
    "descriptors of the keeper": lambda: os.listdir(f"/proc/{keeper}/fd"),
    "all processes": lambda: os.listdir("/proc"),
    "groups": lambda: os.listdir("/sys/fs/cgroup"),
    "shared memory": lambda: Path("/dev/shm/tursi-attack").write_bytes(b"x"),
    "own memory by its file": lambda: Path("/proc/self/mem").open("r+b"),
    "spared by the kernel": lambda: Path("/proc/self/oom_score_adj").write_text("-1000"),
    "a device": lambda: os.mknod(mine / "disk", 0o60600, os.makedev(8, 0)),
}
BY_SCOPE: dict[str, Callable[[], object]] = {
    "signal the daemon": lambda: os.kill(daemon, 0),
    "signal the keeper": lambda: os.kill(keeper, 0),
    "signal all": lambda: os.killpg(os.getpgid(keeper), 0),
}
BY_FILTER: dict[str, Callable[[], object]] = {
    **{f"mode of {name}": partial(path.chmod, 0o777) for name, path in files.items()},
    **{f"owner of {name}": partial(os.chown, path, 1, 1) for name, path in files.items()},
    **{f"times of {name}": partial(os.utime, path, (0, 0)) for name, path in files.items()},
    "mode of the state": partial(state.chmod, 0o777),
    "attributes": lambda: os.setxattr(state, "user.x", b"1"),
    "mode of what may be read": lambda: os.fchmod(os.open(__file__, os.O_RDONLY), 0o777),
    "limits of the daemon": lambda: resource.prlimit(daemon, resource.RLIMIT_NOFILE, (0, 0)),
    "priority of the daemon": lambda: os.setpriority(os.PRIO_PROCESS, daemon, 19),
    "cores of the daemon": lambda: os.sched_setaffinity(daemon, {0}),
    "ioprio of the daemon": lambda: call(251, 30, 1, daemon, 3 << 13),
    "trace the daemon": lambda: call(101, 117, 0x4206, daemon, 0, 0),
    "trace the keeper": lambda: call(101, 117, 0x4206, keeper, 0, 0),
    "memory of the daemon": lambda: peek(daemon),
    "a descriptor of the keeper": lambda: call(438, 438, os.pidfd_open(keeper), 4, 0),
    "TCP": lambda: socket.socket(socket.AF_INET),
    "TCP 6": lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "the kernel's ciphers": lambda: socket.socket(38, socket.SOCK_SEQPACKET),
    "the control socket": lambda: socket.socket(socket.AF_UNIX).connect(str(files["socket"])),
    "an abstract socket": lambda: socket.socket(socket.AF_UNIX).connect("\0tursi-attacked"),
    "a datagram": datagram,
    "a datagram of a pair": datagram_of_a_pair,
    "io_uring": lambda: call(425, 425, 8, bytes(120)),
    "userfaultfd": lambda: call(323, 282, 1),
    "keys": lambda: call(250, 219, 0, -3 & 0xFFFFFFFF, 0),
    "shared memory of System V": lambda: call(29, 194, 0, 4096, 0o1600),
    "files by handle": lambda: call(304, 265, -100, bytes(64), 0),
    "programs in the kernel": lambda: call(321, 280, 0, bytes(112), 112),
    "performance counters": lambda: call(298, 241, bytes(112), 0, -1, -1, 0),
    "a world of its own": lambda: in_a_child(lambda: call(272, 97, 0x10000000)),
    "a clone in its own world": lambda: in_a_child(lambda: call(56, 220, 0x10000011, 0, 0, 0, 0)),
    "mount": lambda: call(165, 40, b"none", bytes(mine), b"tmpfs", 0, 0),
    "a mount by descriptor": lambda: call(430, 430, b"tmpfs", 0),
    "chroot": lambda: in_a_child(lambda: os.chroot(mine)),
    "the clock": lambda: call(164, 170, 0, 0),
    **(
        {"the 32-bit interface": old_call, "the x32 interface": lambda: call(0x40000027, 0)}
        if X86_64
        else {}
    ),
}
ALWAYS: dict[str, Callable[[], object]] = {
    "another user": lambda: in_a_child(lambda: os.setuid(os.getuid() + 1)),
    "more descriptors": lambda: raise_limit(resource.RLIMIT_NOFILE),
    "core dumps": lambda: raise_limit(resource.RLIMIT_CORE),
}


def raise_limit(which: int) -> None:
    try:
        resource.setrlimit(which, (1 << 19, 1 << 19))
    except ValueError as error:
        raise PermissionError(errno.EPERM, str(error)) from None


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return "refused" if error.errno in {errno.EPERM, errno.EACCES} else repr(error)
    return "done"


chosen = {**ALWAYS}
for name, attempts in (("landlock", BY_LANDLOCK), ("scope", BY_SCOPE), ("filter", BY_FILTER)):
    if given[name]:
        chosen |= attempts
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
found = json.dumps(
    {
        "attempts": {name: outcome(attempt) for name, attempt in chosen.items()},
        "descriptors": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in range(4)),
        "highest": max(map(int, os.listdir("/proc/self/fd"))),
        "capabilities": int(status["CapEff"], 16) | int(status["CapPrm"], 16),
        "bounding": int(status["CapBnd"], 16),
        "variables": sorted(os.environ),
    }
)
