"""Processes that have lost whoever should have ended them: found, killed, collected.

After a ``kill -9`` of a keeper its tree falls to the daemon, which is a child
subreaper; after one of the daemon whatever its keepers could not clear (a
stopped keeper, say) is found by the next daemon. The marks are the keeper's pid
with its start time, valid within one boot, and those in the environment.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twisted.internet import process
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger

from tursi import mark
from tursi.model import WorkerLife
from tursi.supervision.procfs import PROC

log = Logger()

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_SLICE = 32
"""Processes looked at in one turn of the reactor: less than a millisecond."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""With these the system doesn't say that a process is gone, but nothing at all."""
_BURIAL_SECONDS = 5.0
_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.25
"""Seconds between two looks at what doesn't die."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A process that was killed; pid and start time name it for good within a boot."""

    pid: int
    start_time: int


def become_subreaper() -> None:
    """Have the orphans of killed keepers become children of this process.

    From then on nothing else in the process may start children but the reactor:
    others would be killed as orphans.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def bury(reactor: Any, proc: Path = PROC) -> LoopingCall:
    """Collect the dead that fall to this process, from now on; the loop that does it.

    Those of our own workers are found at once, but the first process of a
    container also gets what others leave there.
    """
    loop = LoopingCall(_collect, proc)
    loop.clock = reactor
    loop.start(_BURIAL_SECONDS)
    return loop


def read_boot_id(proc: Path = PROC) -> str:
    """What is different after each boot."""
    return (proc / "sys/kernel/random/boot_id").read_text().strip()


def read_start_time(pid: int, proc: Path = PROC) -> int | None:
    """Field 22 of ``/proc/PID/stat``, clock ticks since boot; None if there is no such process."""
    fields = _stat(pid, proc)
    return int(fields[19]) if fields else None


async def clear_orphans(reactor: Any, uuid: str, proc: Path = PROC) -> int:
    """Kill what the life ``uuid`` has left until nothing is left; how many there were.

    This has no deadline, because what can't be killed, or not even be looked for,
    must not be forgotten: whoever waits has one.
    """
    killed: set[Leftover] = set()
    pause = _FIRST_PAUSE
    told = False
    while True:
        try:
            found = _adopted(proc) | await _marked(reactor, {mark.of_worker(uuid)}, proc)
            for leftover in found:
                _kill(leftover, proc)
            killed |= found
            if not found:
                return len(killed)
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            if not told:
                told = True
                log.warn("Orphans can't be looked for at the moment: {error}", error=error)
        await deferLater(reactor, pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


async def sweep(
    reactor: Any,
    lives: Iterable[WorkerLife],
    *,
    boot_id: str,
    state: Path,
    proc: Path = PROC,
    seconds: float = 10.0,
) -> list[Leftover]:
    """Kill what an earlier daemon on the state folder ``state`` has left; what that was.

    ``lives`` are those without an end in the store. What is still there after
    ``seconds`` is logged.
    """
    unfinished = list(lives)
    marks = {mark.of_worker(life.uuid) for life in unfinished}
    marks.add(mark.of_state(state))
    keepers = {
        Leftover(life.keeper_pid, life.keeper_start_time)
        for life in unfinished
        if life.boot_id == boot_id
        and life.keeper_pid is not None
        and life.keeper_start_time is not None
    }
    killed: set[Leftover] = set()
    deadline = reactor.seconds() + seconds
    pause = _FIRST_PAUSE
    while True:
        found = {keeper for keeper in keepers if _lives(keeper, proc)}
        found |= await _marked(reactor, marks, proc)
        # What has cleaned its environment is still below what hasn't.
        found |= _below(found, proc)
        for leftover in found:
            _kill(leftover, proc)
        killed |= found
        if not found or reactor.seconds() > deadline:
            break
        await deferLater(reactor, pause)
        pause = min(pause * 2, _LONGEST_PAUSE)
    for leftover in killed:
        log.info("Killed process {pid}, which an earlier daemon had left", pid=leftover.pid)
    for leftover in found:
        log.error("Process {pid} of an earlier daemon can't be killed", pid=leftover.pid)
    return sorted(killed, key=lambda leftover: leftover.pid)


async def _marked(reactor: Any, marks: set[bytes], proc: Path) -> set[Leftover]:
    """Our user's living processes with one of ``marks`` in the environment."""
    spared = _line(proc)
    found: set[Leftover] = set()
    names = [name for name in os.listdir(proc) if name.isdecimal()]  # noqa: PTH208 - a third of the time
    for index, name in enumerate(names):
        if index % _SLICE == _SLICE - 1:
            await deferLater(reactor, 0)
        pid = int(name)
        start_time = read_start_time(pid, proc)
        try:
            if pid in spared or start_time is None or (proc / name).stat().st_uid != os.getuid():
                continue
            environment = (proc / name / "environ").read_bytes()
        except OSError as error:
            _check(error)
            continue  # it has gone, or isn't ours to look at
        if not marks.isdisjoint(environment.split(b"\0")):
            found.add(Leftover(pid, start_time))
    return found


def _adopted(proc: Path) -> set[Leftover]:
    """Children that the reactor hasn't started, the dead ones collected and left out."""
    if not _is_subreaper():
        return set()
    found: set[Leftover] = set()
    for pid in _children(os.getpid(), proc):
        if pid in process.reapProcessHandlers:
            continue
        start_time = read_start_time(pid, proc)
        try:
            ended, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue
        if not ended and start_time is not None:
            found.add(Leftover(pid, start_time))
    return found


def _collect(proc: Path) -> None:
    for pid in _children(os.getpid(), proc):
        if pid not in process.reapProcessHandlers:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _below(leftovers: set[Leftover], proc: Path) -> set[Leftover]:
    """Their descendants."""
    found: set[Leftover] = set()
    waiting = [leftover.pid for leftover in leftovers]
    while waiting:
        for pid in _children(waiting.pop(), proc):
            start_time = read_start_time(pid, proc)
            if start_time is not None:
                found.add(Leftover(pid, start_time))
                waiting.append(pid)
    return found


def _line(proc: Path) -> set[int]:
    """Our own process and its ancestors, which are never killed whatever their environment says."""
    line: set[int] = set()
    pid = os.getpid()
    while pid > 0 and pid not in line:
        line.add(pid)
        fields = _stat(pid, proc)
        pid = int(fields[1]) if fields else 0
    return line


def _lives(leftover: Leftover, proc: Path) -> bool:
    fields = _stat(leftover.pid, proc)
    return bool(fields) and int(fields[19]) == leftover.start_time and fields[0] != "Z"


def _kill(leftover: Leftover, proc: Path) -> None:
    try:
        # The descriptor holds the process; only then does the look at its
        # start time tell that the pid wasn't given to another one meanwhile.
        pidfd = os.pidfd_open(leftover.pid)
        try:
            if _lives(leftover, proc):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
    except ProcessLookupError:
        pass
    except OSError as error:
        _check(error)
        log.warn("Process {pid} can't be killed: {error}", pid=leftover.pid, error=error)


def _children(pid: int, proc: Path) -> list[int]:
    """The children of all threads of a process."""
    found: list[int] = []
    try:
        for task in (proc / str(pid) / "task").iterdir():
            found += [int(word) for word in (task / "children").read_text().split()]
    except OSError as error:
        _check(error)  # else it has gone
    return found


def _check(error: OSError) -> None:
    """Raise it if it doesn't tell that a process has gone."""
    if error.errno in _EXHAUSTED:
        raise error


def _stat(pid: int, proc: Path) -> list[str]:
    """The fields of ``/proc/PID/stat`` from the third (the state) on; empty if it has gone."""
    try:
        text = (proc / str(pid) / "stat").read_text(errors="replace")
    except OSError as error:
        _check(error)
        return []
    # The second field, the name, may hold blanks and parentheses.
    return text.rpartition(")")[2].split()


def _is_subreaper() -> bool:
    answer = ctypes.c_int()
    _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.addressof(answer))
    return bool(answer.value)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
