"""The keeper: the process between the daemon and one worker, so that nothing is ever orphaned.

Run as ``python -I -S -c "from tursi import keeper; ..." ORDER ARGV...``
(``supervision.life.KEEPER``), with nothing but the standard library,
``tursi.sandbox`` and ``tursi.removal``. ORDER is JSON: the daemon's pid as
``parent``, and the fields of ``supervision.life.Confinement``. ARGV is the
worker's command, whose first element is an absolute path.

Descriptors: 0 stdin, 1 stdout, 2 stderr, 3 the worker's data socket, all of
which the worker inherits; 4 the lifeline, a pipe whose end means "kill"; 5 the
status pipe, onto which go JSON lines::

    {"event": "started", "pid": 71, "start_time": 123456}
    {"event": "exited", "exit_status": null, "signal": 9, "peak_rss": 9437184, "cpu_seconds": 0.4}
    {"event": "cleared", "killed": 2}
    {"event": "refused", "number": 11, "message": "Resource temporarily unavailable"}

The last one says why there is no worker: what the worker should be confined by, or
the worker itself, could not be had.

SIGTERM is passed on to the worker's process group, SIGUSR2 to the worker itself,
which then writes down where its threads stand; both also continue it, should it
be stopped. When the worker ends, the
lifeline ends, or SIGHUP arrives (the daemon is dead), everything below the
keeper is killed, and the keeper ends when all of it is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import time

from tursi import sandbox
from tursi.removal import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    # typing is slow to import.
    from typing import Any

DATA, LIFELINE, STATUS = 3, 4, 5
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
HANDLED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCHLD, signal.SIGUSR2)
MAX_PAUSE = 0.05
"""Seconds between two rounds of killing what doesn't die."""


def main(argv: list[str]) -> int:
    """Keep one worker; the answer is the keeper's exit status."""
    try:
        return keep(argv)
    except OSError as error:
        refuse(error)
        raise


def keep(argv: list[str]) -> int:
    """From the first preparation until nothing is left."""
    order, command = json.loads(argv[0]), argv[1:]
    for fd in (LIFELINE, STATUS):
        os.set_inheritable(fd, False)
    # Whatever else the daemon has open is no business of the worker.
    os.closerange(STATUS + 1, os.sysconf("SC_OPEN_MAX"))
    wakeups = listen()
    os.setsid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    # With SIGKILL here the keeper would die before it could clear the tree.
    prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
    if os.getppid() != order["parent"]:
        return 0  # the daemon died before the line above
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_files(order["files"])
    os.umask(0o077)
    os.chdir(order["directory"])
    children(os.getpid())  # a kernel that can't tell fails here, not when it matters
    if order["temporary"]:
        os.mkdir(order["temporary"])  # noqa: PTH102 - pathlib is slow to import
        os.environ["TMPDIR"] = os.environ["HOME"] = order["temporary"]
    worker = start(command, order)
    report(event="started", pid=worker, start_time=start_time(worker))
    alive = wait(worker, wakeups)
    kill_group(order["group"])
    killed = clear(worker if alive else None)
    remove(order["temporary"])
    report(event="cleared", killed=killed)
    return 0


def listen() -> int:
    """Have every handled signal arrive as its number on the descriptor returned."""
    reading, writing = os.pipe()
    for fd in (reading, writing):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in HANDLED:
        signal.signal(number, lambda *_: None)
    return reading


def start(command: list[str], order: dict[str, Any]) -> int:
    """Fork the worker and return its pid."""
    keeper = os.getpid()
    # A signal that hit the child between fork and exec would only call the
    # handler that it has inherited, and be lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    pid = os.fork()
    if pid == 0:
        try:
            become_worker(keeper, command, order)
        except BaseException as error:  # noqa: BLE001 - a forked child never returns
            os.write(2, f"{command[0]} can't be started: {error}\n".encode())
            refuse(error)
        os._exit(127)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
    # The daemon must see the end of the worker's socket at once.
    os.close(DATA)
    return pid


def become_worker(keeper: int, command: list[str], order: dict[str, Any]) -> None:
    """In the forked child: turn into the worker."""
    os.setsid()
    # Against a kill -9 of the keeper: the daemon sees to the rest of the tree.
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        return
    # Best effort: a lower score than the daemon's may need privileges.
    with (
        contextlib.suppress(OSError),
        open("/proc/self/oom_score_adj", "w") as file,  # noqa: PTH123 - pathlib is slow to import
    ):
        file.write(str(order["oom_score_adj"]))
    if order["group"]:
        write(f"{order['group']}/cgroup.procs", "0")
    signal.set_wakeup_fd(-1)
    for number in (*HANDLED, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    # The daemon waits for SIGQUIT in a thread, so all others hold it back.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*HANDLED, signal.SIGQUIT))
    confine(order)
    os.execve(command[0], command, os.environ)  # noqa: S606 - no shell is the point


def confine(order: dict[str, Any]) -> None:
    """Give up what the worker doesn't need."""
    if order["drop_capabilities"]:
        sandbox.drop_capabilities()
    if order["landlock"]:
        rights = [(path, sandbox.READ) for path in order["read"]]
        rights += [(path, sandbox.LIST) for path in order["listed"]]
        rights += [(path, sandbox.WRITE) for path in (*order["write"], order["temporary"])]
        rights += sandbox.model_rights(order["model"])
        sandbox.restrict(order["landlock"], rights, network=order["network"])
    if order["deny_sockets"]:
        sandbox.filter_calls()


def wait(worker: int, wakeups: int) -> bool:
    """Wait until the worker has ended or must; whether it still lives."""
    poll = select.poll()
    poll.register(wakeups, select.POLLIN)
    poll.register(LIFELINE, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if wakeups in ready:
            numbers = os.read(wakeups, 4096)
            # The exit first: a pid that has been reaped must not be signalled.
            if signal.SIGCHLD in numbers and reap(worker):
                return False
            if signal.SIGTERM in numbers:
                pass_on(worker)
            if signal.SIGUSR2 in numbers:
                examine(worker)
            if signal.SIGHUP in numbers:
                return True
        if LIFELINE in ready and not os.read(LIFELINE, 4096):
            return True


def pass_on(worker: int) -> None:
    """SIGTERM to the worker's process group, and SIGCONT so that a stopped one sees it."""
    for number in (signal.SIGTERM, signal.SIGCONT):
        try:
            os.killpg(worker, number)
        except ProcessLookupError:
            os.kill(worker, number)  # it has no group of its own yet; not reaped, so it's there


def examine(worker: int) -> None:
    """SIGUSR2 to the worker, and SIGCONT: a stopped one takes the first before it goes on."""
    for number in (signal.SIGUSR2, signal.SIGCONT):
        os.kill(worker, number)  # not reaped, so it's there


def reap(worker: int | None) -> bool:
    """Collect whoever has ended, and report the worker's end; whether that was among them."""
    found = False
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == worker:
            found = True
            report(
                event="exited",
                exit_status=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
                signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
                peak_rss=usage.ru_maxrss * 1024,
                cpu_seconds=round(usage.ru_utime + usage.ru_stime, 3),
            )


def clear(worker: int | None) -> int:
    """Kill everything below this process until nothing is left; how many besides the worker.

    What loses its parent becomes a child of ours, whatever session it is in, so
    killing our children again and again reaches everything. Only children are
    killed: until we collect them nobody else can get their pid.
    """
    killed: set[int] = set()
    pause = 0.001
    while True:
        for pid in children(os.getpid()):
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        if reap(worker):
            killed.discard(worker or 0)
            worker = None
        if not waitable():
            return len(killed)
        time.sleep(pause)
        pause = min(pause * 2, MAX_PAUSE)


def kill_group(group: str) -> None:
    """Kill all of the worker's cgroup at once; older kernels can't."""
    if group:
        with contextlib.suppress(OSError):
            write(f"{group}/cgroup.kill", "1")


def remove(temporary: str) -> None:
    """Remove the worker's private folder with what it has left there."""
    if temporary:
        # The next daemon tries again.
        with contextlib.suppress(OSError):
            remove_tree(temporary)


def waitable() -> bool:
    """Whether there are children at all, dead ones included."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def children(pid: int) -> list[int]:
    """The children of a process of one thread."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123 - pathlib is slow to import
        return [int(word) for word in file.read().split()]


def start_time(pid: int) -> int:
    """Field 22 of ``/proc/PID/stat``; with the pid it names a process for good."""
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - pathlib is slow to import
        # The second field, the name, may hold blanks and parentheses.
        return int(file.read().rpartition(")")[2].split()[19])


def write(path: str, text: str) -> None:
    """Write to a file of the kernel's."""
    with open(path, "w") as file:  # noqa: PTH123 - pathlib is slow to import
        file.write(text)


def limit_files(count: int) -> None:
    """Let this process and the worker open ``count`` files, or as many as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def prctl(option: int, value: int) -> None:
    """The system call of that name."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def report(**event: int | float | str | None) -> None:
    """Tell the daemon, if it is still there."""
    with contextlib.suppress(OSError):
        os.write(STATUS, json.dumps(event).encode() + b"\n")


def refuse(error: BaseException) -> None:
    """Tell the daemon why there is no worker."""
    report(event="refused", number=getattr(error, "errno", None) or 0, message=str(error)[:500])
