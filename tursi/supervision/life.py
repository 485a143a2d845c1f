"""One life of a child process, as the daemon sees it: the other end of ``tursi/keeper.py``."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall, IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi import mark
from tursi.removal import remove_tree
from tursi.supervision import leftovers, procfs
from tursi.supervision.logs import LifeLog

log = Logger()

_START_KEEPER = (
    "# tursi/keeper.py, from its bytecode: run by its path it is compiled for every worker\n"
    f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); "
    "from tursi import keeper; sys.exit(keeper.main(sys.argv[1:]))"
)
KEEPER = (sys.executable, "-I", "-S", "-c", _START_KEEPER)
"""The command of a keeper, but for its arguments."""
_STREAMS = {1: "out", 2: "err"}
_DATA, _LIFELINE, _STATUS = 3, 4, 5
FILES = 4096
"""Descriptors that a process under a keeper may have open, if nothing else is said."""
_MAX_STATUS = 4096
"""Bytes of an incomplete status line; a keeper never writes more."""
_MAX_READS = 16
"""Reads (8 KiB each) of what a dead tree has left in a pipe, which holds 64 KiB."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """What the keeper imposes on its worker."""

    files: int = FILES
    """Open descriptors."""
    oom_score_adj: int = 500
    """The kernel's out-of-memory killer shall take a worker before the daemon."""
    directory: str = "/"
    """The working directory."""
    group: str = ""
    """The folder of a cgroup for it alone."""
    temporary: str = ""
    """A folder for it alone, which the keeper makes and removes: its TMPDIR and HOME."""
    landlock: int = 0
    """The version of Landlock to apply, by the five fields below; 0 for none."""
    read: tuple[str, ...] = ()
    """What it may read and execute, each with all that is below it."""
    listed: tuple[str, ...] = ()
    """Folders that it may only list."""
    write: tuple[str, ...] = ()
    """What it may also change, besides ``temporary``."""
    model: str = ""
    """A model's folder to read."""
    network: bool = False
    """Whether Landlock leaves it the network."""
    deny_sockets: bool = False
    """Whether to keep it from the network, by a filter of system calls that closes more."""
    drop_capabilities: bool = False
    """Whether to take from root's worker what only root may do."""

    def order(self, parent: int) -> str:
        """The same for the keeper of a daemon with that pid."""
        return json.dumps({"parent": parent, **asdict(self)})


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start."""

    uuid: str
    """Of the life; the child finds it in its environment as TURSI_WORKER."""
    arguments: tuple[str, ...]
    """argv of the worker; the first is the absolute path of its executable."""
    environment: Mapping[str, str]
    """The whole environment, built from an allow-list."""
    log: LifeLog
    """Where stdout and stderr go; closed when the life has ended."""
    confinement: Confinement = Confinement()


@dataclass(frozen=True, slots=True)
class Life:
    """A keeper that has just been spawned."""

    uuid: str
    keeper_pid: int
    keeper_start_time: int
    """Field 22 of ``/proc/PID/stat``: clock ticks since boot."""
    boot_id: str
    socket: socket.socket
    """The daemon's end of the data socket; whoever receives this owns and closes it."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a keeper could not start its worker."""

    number: int
    """Of the error (``errno``); 0 if it is none of the system's."""
    message: str


@dataclass(frozen=True, slots=True)
class Exit:
    """What is known of an end."""

    exit_status: int | None = None
    signal: int | None = None
    worker_pid: int | None = None
    peak_rss: int | None = None
    """Bytes; never below the 8 MB or so of the keeper it was forked from."""
    cpu_seconds: float | None = None
    reported: bool = False
    """False: the keeper died before the worker, or before it had started one."""
    tree: str = "nothing left"
    """How the rest of the process tree was cleared."""
    refusal: Refusal | None = None
    """There never was a worker."""


class Watcher(Protocol):
    """Who wants to know of a life."""

    def spawned(self, life: Life) -> None:
        """The keeper is there; called before ``KeeperProtocol.spawn`` returns."""

    def started(self, pid: int) -> None:
        """The worker is there."""

    def ended(self, exit: Exit) -> None:  # noqa: A002 - the field's word
        """The whole tree is gone; called once if ``spawned`` was."""


class Keepers:
    """How to spawn keepers: what all lives of a daemon have in common.

    ``clear_orphans`` clears what a killed keeper has left of the life with that
    uuid, and answers how many processes that were. ``last_resort`` is how many
    seconds a keeper has to clear its tree before it is killed itself.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        proc: Path = procfs.PROC,
        clear_orphans: Callable[[str], Deferred[int]] | None = None,
        last_resort: float = 5.0,
    ) -> None:
        self.reactor = reactor
        self.proc = proc
        self.boot_id = leftovers.read_boot_id(proc)
        self.clear_orphans = clear_orphans or self._clear_orphans
        self.last_resort = last_resort

    def _clear_orphans(self, uuid: str) -> Deferred[int]:
        return Deferred.fromCoroutine(leftovers.clear_orphans(self.reactor, uuid, self.proc))


class KeeperProtocol(ProcessProtocol):
    """Speaks with one keeper, from its spawn until its whole tree is gone."""

    transport: IProcessTransport
    _socket: socket.socket

    def __init__(self, keepers: Keepers, watcher: Watcher, launch: Launch) -> None:
        self._keepers = keepers
        self._watcher = watcher
        self._launch = launch
        self._status = b""
        self._exit = Exit()
        self._cleared: int | None = None
        self._last_resort: IDelayedCall | None = None
        self._gone = False

    def spawn(self) -> None:
        """Start the keeper; raises whatever the system does, and then nothing has started."""
        try:
            self._spawn()
        except BaseException:
            self._launch.log.close()
            raise

    def _spawn(self) -> None:
        launch = self._launch
        order = launch.confinement.order(os.getpid())
        arguments = [*KEEPER, order, *launch.arguments]
        with ExitStack() as opened:
            null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, null)
            self._socket, theirs = socket.socketpair()
            opened.enter_context(theirs)
            fds = {0: null, 1: "r", 2: "r", _DATA: theirs.fileno(), _LIFELINE: "w", _STATUS: "r"}
            environment = {**launch.environment, mark.WORKER: launch.uuid}
            try:
                # Without path (the keeper changes the folder) the reactor uses
                # posix_spawn; with it, it would fork the whole daemon.
                self._keepers.reactor.spawnProcess(
                    self, arguments[0], arguments, env=environment, childFDs=fds
                )
            except BaseException:
                self._socket.close()
                raise

    def terminate(self) -> None:
        """SIGTERM, then SIGCONT, to the worker's process group; the keeper passes them on."""
        self._signal("TERM")

    def examine(self) -> None:
        """Have the worker write where its threads stand on its stderr; a stopped one goes on."""
        self._signal(signal.SIGUSR2)

    def kill(self) -> None:
        """SIGKILL to the whole tree, by the end of the lifeline."""
        if self._last_resort is None and not self._gone:
            self.transport.closeChildFD(_LIFELINE)
            # A stopped keeper doesn't see the lifeline end.
            self._signal(signal.SIGCONT)
            self._last_resort = self._keepers.reactor.callLater(
                self._keepers.last_resort, self._signal, "KILL"
            )

    def connectionMade(self) -> None:  # noqa: N802 - Twisted's name
        """Tell the watcher, who gets the data socket."""
        launch, keepers = self._launch, self._keepers
        pid = int(self.transport.pid or 0)
        try:
            started = leftovers.read_start_time(pid, keepers.proc) or 0
        except OSError:
            # The next daemon then knows it by what is in its environment only.
            started = 0
        try:
            self._watcher.spawned(Life(launch.uuid, pid, started, keepers.boot_id, self._socket))
        except Exception:  # noqa: BLE001 - the process is there and must be looked after
            log.failure("The spawn of {uuid} could not be announced", uuid=launch.uuid)
            self._socket.close()
            self.kill()

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: N802, N803 - Twisted's
        """Output goes to the log, status lines to us."""
        if childFD in _STREAMS:
            self._launch.log.feed(_STREAMS[childFD], data)
        elif childFD == _STATUS:
            *lines, rest = (self._status + data).split(b"\n")
            self._status = rest[:_MAX_STATUS]
            for line in lines:
                self._reported(line)

    def processExited(self, reason: Failure) -> None:  # noqa: N802, ARG002 - Twisted's
        """The keeper is gone, which it only is without being killed when its tree is gone.

        Not ``processEnded``, which waits until nobody holds a pipe any more.
        """
        self._gone = True
        if self._last_resort is not None and self._last_resort.active():
            self._last_resort.cancel()
        self._read_rest(_STATUS)
        if self._cleared is not None:
            self._finish(self._cleared, "killed {}")
            return
        clearing = self._keepers.clear_orphans(self._launch.uuid)
        clearing.addErrback(self._not_cleared)
        clearing.addCallback(self._tidied)
        clearing.addCallback(self._finish, "killed {} after the keeper had died")

    def processEnded(self, reason: Failure) -> None:  # noqa: N802, ARG002 - Twisted's
        """Nothing can come through the pipes any more."""
        self._launch.log.close()

    def _reported(self, line: bytes) -> None:
        try:
            report = json.loads(line)
            event = report.pop("event")
            if event == "started":
                self._exit = replace(self._exit, worker_pid=report["pid"])
                self._watcher.started(report["pid"])
            elif event == "exited":
                self._exit = replace(self._exit, reported=True, **report)
            elif event == "cleared":
                self._cleared = report["killed"]
            elif event == "refused":
                self._exit = replace(self._exit, refusal=Refusal(**report))
        except Exception:  # noqa: BLE001 - whatever it says, the life goes on to its end
            log.failure("The keeper's status line {line} could not be handled", line=line)

    def _not_cleared(self, failure: Failure) -> int:
        log.failure("Orphans could not be cleared", failure=failure)
        return 0

    def _tidied(self, killed: int) -> int:
        """Have the private folder removed, which the keeper would have done; nobody waits."""
        temporary, reactor = self._launch.confinement.temporary, self._keepers.reactor
        if temporary:
            removing = deferToThreadPool(reactor, reactor.getThreadPool(), remove_tree, temporary)
            # The next daemon tries again.
            removing.addErrback(lambda failure: failure.trap(OSError))
        return killed

    def _finish(self, killed: int, sentence: str) -> None:
        for fd in _STREAMS:
            self._read_rest(fd)
        self._launch.log.flush()
        for fd in (*_STREAMS, _LIFELINE, _STATUS):
            # Somebody outside the tree may hold them for ever.
            self.transport.closeChildFD(fd)
        if killed:
            self._exit = replace(self._exit, tree=sentence.format(killed))
        self._watcher.ended(self._exit)

    def _read_rest(self, fd: int) -> None:
        """Take what is in a pipe: closing it would lose that."""
        pipe = getattr(self.transport, "pipes", {}).get(fd)
        if pipe is None:
            return
        for _ in range(_MAX_READS):
            if pipe.doRead() is not None:
                return

    def _signal(self, number: str | int) -> None:
        with suppress(ProcessExitedAlready):
            self.transport.signalProcess(number)
