"""What a worker is kept from by the kernel: Landlock for files and TCP, a filter for sockets.

For the keeper, which applies it in the worker's process right before exec, and
for the daemon, which asks what this kernel has. Standard library only.

Landlock's interface has versions, each of which can restrict more; what this
kernel's can't is left out. It knows files, but (as of version 7) not who
connects to a Unix socket by its path, hence the filter of system calls.
"""

# ruff: noqa: PTH114, PTH118, PTH119, PTH120
# Because pathlib is slow to import, and the keeper starts once a life.

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
"""Flag of landlock_create_ruleset: only tell the version."""
_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE = 1 << 4, 1 << 5
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK = 1 << 6, 1 << 7, 1 << 8, 1 << 9
MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = 1 << 10, 1 << 11, 1 << 12
REFER = 1 << 13  # since version 2
TRUNCATE = 1 << 14  # 3
IOCTL_DEV = 1 << 15  # 5
BIND_TCP, CONNECT_TCP = 1 << 0, 1 << 1  # 4
SCOPE_ABSTRACT_UNIX_SOCKET, SCOPE_SIGNAL = 1 << 0, 1 << 1  # 6

LIST = READ_DIR
READ = EXECUTE | READ_FILE | READ_DIR
WRITE = (
    READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO
    | MAKE_SYM | REFER | TRUNCATE | IOCTL_DEV
)  # fmt: skip
_OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""The rights that a rule for anything but a folder may have."""


def landlock_version() -> int | None:
    """The version of this kernel's Landlock, if it has one that is switched on."""
    try:
        return _system_call(_CREATE_RULESET, None, 0, _VERSION)
    except OSError:
        return None


def handled(version: int) -> tuple[int, int, int]:
    """What a ruleset of this version can restrict: files, network, scopes."""
    files = (1 << 13) - 1
    for since, right in ((2, REFER), (3, TRUNCATE), (5, IOCTL_DEV)):
        if version >= since:
            files |= right
    network = BIND_TCP | CONNECT_TCP if version >= 4 else 0
    scopes = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL if version >= 6 else 0
    return files, network, scopes


def ruleset(version: int) -> bytes:
    """A struct landlock_ruleset_attr, as long as this version knows it."""
    size = 8 if version < 4 else 16 if version < 6 else 24
    return struct.pack("=QQQ", *handled(version))[:size]


def rule(rights: int, parent: int) -> bytes:
    """A struct landlock_path_beneath_attr, which is packed."""
    return struct.pack("=Qi", rights, parent)


def restrict(version: int, rights: Iterable[tuple[str, int]]) -> None:
    """Allow this process and its descendants the ``rights`` below these paths, and no other.

    No TCP, no abstract Unix sockets and no signals to others, as far as the
    version goes. A path that isn't there is left out. Needs no_new_privs.
    """
    attribute = ruleset(version)
    rules = _system_call(_CREATE_RULESET, attribute, len(attribute), 0)
    try:
        for path, allowed in rights:
            _add(rules, path, allowed & handled(version)[0])
        _system_call(_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)


def _add(rules: int, path: str, allowed: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not there: nothing to allow
    try:
        if not stat.S_ISDIR(os.fstat(parent).st_mode):
            allowed &= _OF_A_FILE
        _system_call(_ADD_RULE, rules, _PATH_BENEATH, rule(allowed, parent), 0)
    finally:
        os.close(parent)


def model_rights(folder: str) -> list[tuple[str, int]]:
    """To read a model's folder, and what its files are links to.

    In the hub's cache these are the blobs of the same repository. Elsewhere,
    whoever names a folder also means what it links to.
    """
    real = os.path.realpath(folder)
    snapshots, repository = os.path.dirname(real), os.path.dirname(os.path.dirname(real))
    in_cache = os.path.basename(repository).startswith("models--")
    if in_cache and os.path.basename(snapshots) == "snapshots":
        return [(repository, READ)]
    rights = [(real, READ)]
    for place, folders, files in os.walk(real):
        paths = [os.path.join(place, name) for name in (*folders, *files)]
        rights += [(os.path.realpath(path), READ) for path in paths if os.path.islink(path)]
    return rights


# -- sockets ------------------------------------------------------------------------

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 13  # EACCES
_LOAD, _EQUAL, _GREATER, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in struct seccomp_data, whose arguments are of 64 bits in this machine's order."""
_ANY_OTHER_INTERFACE = 0x40000000
"""Numbers from here on are x32's, by which all calls could be made a second time."""
_IO_URING_SETUP = 425
"""A ring could connect without the system call of that name."""
_MACHINES = {
    # architecture, socket, connect
    "x86_64": (0xC000003E, 41, 42),
    "aarch64": (0xC00000B7, 198, 203),
}


def sockets_deniable() -> bool:
    """Whether this kernel can keep a worker from the network."""
    # A filter at address 0 is a fault where filters are known, and else an invalid argument.
    libc = ctypes.CDLL(None, use_errno=True)
    answer = libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0)
    return answer == -1 and ctypes.get_errno() == 14 and os.uname().machine in _MACHINES


def socket_filter(machine: str) -> bytes:
    """A BPF program that refuses sockets but Unix ones, and to connect those."""
    architecture, socket, connect = _MACHINES[machine]
    program = (
        # (instruction, jump if true, jump if false, operand)
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 0, 7, architecture),
        (_LOAD, 0, 0, _NUMBER),
        (_GREATER, 5, 0, _ANY_OTHER_INTERFACE),
        (_EQUAL, 4, 0, connect),
        (_EQUAL, 3, 0, _IO_URING_SETUP),
        (_EQUAL, 0, 3, socket),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 1, 0, 1),  # AF_UNIX
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    )
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def deny_sockets() -> None:
    """Keep this process and its descendants from the network. Needs no_new_privs."""
    program = socket_filter(os.uname().machine)
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, padded, and where they are.
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_SECCOMP): {os.strerror(number)}")


def _system_call(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [
        ctypes.c_long(each) if isinstance(each, int) else ctypes.c_char_p(each)
        for each in arguments
    ]
    answer: int = libc.syscall(ctypes.c_long(number), *words)
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"system call {number}: {os.strerror(code)}")
    return answer
