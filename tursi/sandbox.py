"""What a worker is kept from by the kernel: Landlock, a filter of system calls, no capabilities.

For the keeper, which applies it in the worker's process right before exec, and
for the daemon, which asks what this kernel has. Standard library only.

Landlock's interface has versions, each of which can restrict more; what this
kernel's can't is left out. It knows the contents of files, but (as of version 7)
neither their modes and owners nor who connects to a Unix socket by its path, hence
the filter of system calls.
"""

# ruff: noqa: PTH119, PTH120
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


def handled(version: int, *, network: bool = False) -> tuple[int, int, int]:
    """What a ruleset of this version can restrict: files, network, scopes.

    Not the network, where that is to be left alone (``network``).
    """
    files = (1 << 13) - 1
    for since, right in ((2, REFER), (3, TRUNCATE), (5, IOCTL_DEV)):
        if version >= since:
            files |= right
    ports = BIND_TCP | CONNECT_TCP if version >= 4 and not network else 0
    scopes = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL if version >= 6 else 0
    return files, ports, scopes


def ruleset(version: int, *, network: bool = False) -> bytes:
    """A struct landlock_ruleset_attr, as long as this version knows it."""
    size = 8 if version < 4 else 16 if version < 6 else 24
    return struct.pack("=QQQ", *handled(version, network=network))[:size]


def rule(rights: int, parent: int) -> bytes:
    """A struct landlock_path_beneath_attr, which is packed."""
    return struct.pack("=Qi", rights, parent)


def restrict(version: int, rights: Iterable[tuple[str, int]], *, network: bool = False) -> None:
    """Allow this process and its descendants the ``rights`` below these paths, and no other.

    No TCP unless ``network`` says so, no abstract Unix sockets and no signals to others,
    as far as the version goes. A path that isn't there is left out. Needs no_new_privs.
    """
    attribute = ruleset(version, network=network)
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
    """To read a model's folder and, in the hub's cache, the blobs that its files are links to.

    No other links: they may have come with the model, to where its author would like
    to look.
    """
    if not folder:
        return []  # which would be the working directory
    real = os.path.realpath(folder)
    snapshots, repository = os.path.dirname(real), os.path.dirname(os.path.dirname(real))
    in_cache = os.path.basename(repository).startswith("models--")
    if in_cache and os.path.basename(snapshots) == "snapshots":
        return [(repository, READ)]
    return [(real, READ)]


# -- system calls -------------------------------------------------------------------

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x00050000 | 13, 0x00050000 | 38  # EACCES, ENOSYS
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in struct seccomp_data, whose arguments are of 64 bits in this machine's order."""
_ANY_OTHER_INTERFACE = 0x40000000
"""Numbers from here on are x32's, by which all calls could be made a second time."""
_NEW_NAMESPACES = 0x7E020080
"""The flags of clone() that would give a process capabilities over a world of its own."""
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_MACHINES = tuple(_ARCHITECTURES)

_REFUSED = {
    # name: its number on x86_64, on aarch64 (where old calls don't exist)
    "connect": (42, 203),
    "io_uring_setup": (425, 425),  # a ring could connect without the system call of that name
    # What Landlock leaves open: the modes, owners, attributes and times of all files.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    # Other processes, where it may not be us who keep them apart.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "migrate_pages": (256, 238),
    # What processes of one user share.
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "mq_open": (240, 180), "mq_unlink": (241, 181),
    # Large parts of the kernel that no model needs, and that break-outs went through.
    "bpf": (321, 280), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "fanotify_init": (300, 262),
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41),
    "mount": (165, 40), "umount2": (166, 39), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_tree_attr": (467, 467),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "syslog": (103, 116), "iopl": (172, None), "ioperm": (173, None),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
}  # fmt: skip
_REFUSED_FOR_OTHERS = {
    # and which of its arguments is 0 where it is meant for the caller itself
    "prlimit64": (302, 261, 0),
    "sched_setparam": (142, 118, 0), "sched_setscheduler": (144, 119, 0),
    "sched_setaffinity": (203, 122, 0), "sched_setattr": (314, 274, 0),
    "move_pages": (279, 239, 0), "setpriority": (141, 140, 1), "ioprio_set": (251, 30, 1),
    "utimensat": (280, 88, 1),
}  # fmt: skip
_SOCKET, _SOCKETPAIR, _CLONE, _CLONE3 = (41, 198), (53, 199), (56, 220), (435, 435)

_Instruction = tuple[int, int, int, int]
"""The operation, how many to skip if true and if false, and its operand."""


def sockets_deniable() -> bool:
    """Whether this kernel can keep a worker from the network, and whatever else is refused."""
    # A filter at address 0 is a fault where filters are known, and else an invalid argument.
    libc = ctypes.CDLL(None, use_errno=True)
    answer = libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0)
    return answer == -1 and ctypes.get_errno() == 14 and os.uname().machine in _MACHINES


def call_filter(machine: str) -> bytes:
    """A BPF program that refuses the system calls above, all sockets but some Unix ones included.

    Unix sockets with a connection stay, for pairs; others could send to any path.
    """
    which = _MACHINES.index(machine)
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, _NUMBER),
        (_GREATER, 0, 1, _ANY_OTHER_INTERFACE),
        (_RETURN, 0, 0, _REFUSE),
    ]
    for numbers in _REFUSED.values():
        program += _where(numbers[which], [(_RETURN, 0, 0, _REFUSE)])
    for *others, argument in _REFUSED_FOR_OTHERS.values():
        program += _where(others[which], _unless_zero(argument))
    for call in (_SOCKET, _SOCKETPAIR):
        program += _where(call[which], _CONNECTED_UNIX)
    program += _where(_CLONE[which], _WITHIN_NAMESPACES)
    # Its flags can't be seen from here; without it the C library takes clone().
    program += _where(_CLONE3[which], [(_RETURN, 0, 0, _UNKNOWN)])
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _where(number: int | None, body: list[_Instruction]) -> list[_Instruction]:
    """Do ``body``, which returns, for the system call of that number."""
    return [] if number is None else [(_EQUAL, 0, len(body), number), *body]


def _argument(index: int, half: int = 0) -> _Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index + 4 * half)


def _unless_zero(index: int) -> list[_Instruction]:
    return [
        _argument(index),
        (_EQUAL, 0, 2, 0),
        _argument(index, half=1),
        (_EQUAL, 1, 0, 0),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]


_CONNECTED_UNIX: list[_Instruction] = [
    _argument(0),
    (_EQUAL, 0, 4, 1),  # AF_UNIX
    _argument(1),
    (_AND, 0, 0, 0xF),
    (_EQUAL, 2, 0, 1),  # SOCK_STREAM
    (_EQUAL, 1, 0, 5),  # SOCK_SEQPACKET
    (_RETURN, 0, 0, _REFUSE),
    (_RETURN, 0, 0, _ALLOW),
]
_WITHIN_NAMESPACES: list[_Instruction] = [
    _argument(0),
    (_ANY_BIT, 0, 1, _NEW_NAMESPACES),
    (_RETURN, 0, 0, _REFUSE),
    (_RETURN, 0, 0, _ALLOW),
]


def filter_calls() -> None:
    """Put this process and its descendants behind that filter. Needs no_new_privs."""
    program = call_filter(os.uname().machine)
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, padded, and where they are.
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_SECCOMP): {os.strerror(number)}")


# -- capabilities -------------------------------------------------------------------

_PR_CAPBSET_DROP = 24
_CAPABILITIES_VERSION = 0x20080522
_READ_ANYTHING = 1 << 2  # CAP_DAC_READ_SEARCH
"""The one that root's worker keeps, for models of other users; Landlock holds it to the model."""


def drop_capabilities() -> None:
    """Give up what root may do, for good; nothing to do for everyone else."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", _CAPABILITIES_VERSION, 0)
    held = ctypes.create_string_buffer(24)
    if libc.capget(header, held) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"capget(): {os.strerror(number)}")
    # The low halves of effective, permitted and inheritable, then the high ones.
    effective, permitted, _, *_high = struct.unpack("=6I", held.raw)
    for capability in range(64):
        if 1 << capability != _READ_ANYTHING:
            # Fails for those that the kernel doesn't know, and for who may not: then there
            # are none that a set-uid program could give, by no_new_privs.
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    kept = struct.pack("=6I", effective & _READ_ANYTHING, permitted & _READ_ANYTHING, 0, 0, 0, 0)
    if libc.capset(header, kept) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"capset(): {os.strerror(number)}")


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
