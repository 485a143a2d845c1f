"""The monitor of workers: who is running, who comes back, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IProcessTransport
from twisted.runner.procmon import ProcessMonitor

from tursi.supervision.life import (
    Exit,
    KeeperProtocol,
    Keepers,
    Launch,
    Life,
)

__all__ = ["Child", "Exit", "Keepers", "Launch", "Life", "WorkerMonitor"]


class Child(Protocol):
    """What the monitor looks after: it owns the decisions, the monitor the timers."""

    @property
    def name(self) -> str:
        """Unique within the monitor."""

    def may_spawn(self) -> bool:
        """Whether to spawn now; if not, the child calls ``startProcess`` once it may."""

    def launch(self) -> Launch:
        """What to start; asked right before each spawn."""

    def spawned(self, life: Life) -> None:
        """The keeper has been spawned."""

    def worker_started(self, pid: int) -> None:
        """The keeper has reported the worker's pid."""

    def spawn_failed(self, error: Exception) -> float | None:
        """There is no process; seconds until the next try, or None to stay down."""

    def exited(self, exit: Exit) -> float | None:  # noqa: A002 - the field's word
        """The whole tree is gone, once per life; the answer is as above."""


class WorkerMonitor(ProcessMonitor):
    """A ProcessMonitor whose processes are workers, each under a keeper.

    What the stock class does with processes this one does with children, added by
    ``addChild``: the words keep their meaning. It differs in this: a child, not
    the length of its life, decides whether and when it comes back; a process is
    gone when its whole tree is; stopping the service and removing a process can
    be waited for; a spawn that fails for whatever reason concerns its child only.
    """

    # One dictionary for each fact of a process is the stock class's way.
    protocols: dict[str, KeeperProtocol]  # type: ignore[assignment]  # its own protocol there

    def __init__(
        self, reactor: Any, *, keepers: Keepers | None = None, kill_time: float = 10.0
    ) -> None:
        """``kill_time``: seconds between SIGTERM and SIGKILL in ``stopProcess``."""
        super().__init__(reactor)
        self.killTime = kill_time  # type: ignore[assignment]  # an int there
        self._keepers = keepers or Keepers(reactor)
        self._children: dict[str, Child] = {}
        self._waiting: dict[str, list[Deferred[None]]] = {}

    def addChild(self, child: Child) -> None:  # noqa: N802 - beside addProcess
        """Monitor ``child``; ask it at once whether to start if the service runs.

        Its name may be that of a removed child whose process isn't gone yet; it
        starts when it is. Raises KeyError if the name is taken.
        """
        if child.name in self._processes:
            raise KeyError(f"remove {child.name} first")
        self._children[child.name] = child
        self.addProcess(child.name, [])

    def removeProcess(self, name: str) -> Deferred[None]:  # type: ignore[override]  # noqa: N802
        """Stop the process for good; fires when its whole tree is gone."""
        super().removeProcess(name)
        self._forget_restart(name)
        del self._children[name]
        return self._when_gone(name)

    def startProcess(self, name: str) -> None:  # noqa: N802 - Twisted's
        """Start the process if it isn't running, the service is, and the child agrees."""
        if name in self.protocols or not self.running:
            return
        self._forget_restart(name)
        child = self._children[name]
        try:
            if not child.may_spawn():
                return
            if name in self.protocols or self._children.get(name) is not child:
                return
            protocol = KeeperProtocol(self._keepers, _Watcher(self, child), child.launch())
            self.protocols[name] = protocol
            self.timeStarted[name] = self._clock.seconds()
            protocol.spawn()
        except Exception as error:  # noqa: BLE001 - a NUL in argv is a ValueError, and so on
            reason = error
            self.log.warn("{name} can't be started: {error}", name=name, error=error)
            self._ended(name, child, lambda: child.spawn_failed(reason))

    def stopProcess(self, name: str) -> None:  # noqa: N802 - Twisted's
        """SIGTERM, and SIGKILL to the whole tree after ``killTime``; the child may come back."""
        murder = self.murder.get(name)
        if murder is not None and murder.active():
            # Whoever asks again must not put off the kill.
            self.terminate(name)
        else:
            super().stopProcess(name)

    def terminate(self, name: str) -> None:
        """SIGTERM, then SIGCONT, to the worker's process group; nothing if it isn't running."""
        if name in self.protocols:
            self.protocols[name].terminate()

    def examine(self, name: str) -> None:
        """Have the worker tell where its threads stand; nothing if it isn't running."""
        if name in self.protocols:
            self.protocols[name].examine()

    def kill(self, name: str) -> None:
        """SIGKILL to the whole tree; nothing if it isn't running."""
        if name in self.protocols:
            self.protocols[name].kill()

    def stopService(self) -> Deferred[None]:  # type: ignore[override]  # noqa: N802
        """Stop every process; fires when all trees are gone, or could not be killed in time."""
        super().stopService()
        gone = DeferredList([self._when_gone(name) for name in self.protocols])
        stopped: Deferred[None] = Deferred()

        def give_up() -> None:
            self.log.error("Still there after SIGKILL: {names}", names=sorted(self.protocols))
            stopped.callback(None)

        deadline = self._clock.callLater(self.killTime + 2 * self._keepers.last_resort, give_up)

        def all_gone(_: object) -> None:
            if deadline.active():
                deadline.cancel()
                stopped.callback(None)

        gone.addCallback(all_gone)
        return stopped

    def _forceStopProcess(self, proc: IProcessTransport) -> None:  # noqa: N802 - Twisted's
        # To kill the keeper, as the stock class would, leaves its tree to others.
        for protocol in self.protocols.values():
            if protocol.transport is proc:
                protocol.kill()

    def _ended(self, name: str, child: Child, decide: Callable[[], float | None]) -> None:
        """There is no process (any more): ask the child what comes next."""
        murder = self.murder.pop(name, None)
        if murder is not None and murder.active():
            murder.cancel()
        self.protocols.pop(name, None)
        delay = None
        try:
            delay = decide()
        except Exception:  # noqa: BLE001 - its defect must not cost the others their monitor
            self.log.failure("{name} could not decide what comes next", name=name)
        if self._children.get(name) not in (child, None):
            delay = 0.0  # another of that name waits for its turn
        if (
            delay is not None
            and self.running
            and name in self._processes
            # While deciding it may already have been started.
            and name not in self.protocols
        ):
            self._forget_restart(name)
            self.restart[name] = self._clock.callLater(delay, self.startProcess, name)
        for waiting in self._waiting.pop(name, []):
            waiting.callback(None)

    def _forget_restart(self, name: str) -> None:
        restart = self.restart.pop(name, None)
        if restart is not None and restart.active():
            restart.cancel()

    def _when_gone(self, name: str) -> Deferred[None]:
        gone: Deferred[None] = Deferred()
        if name in self.protocols:
            self._waiting.setdefault(name, []).append(gone)
        else:
            gone.callback(None)
        return gone


class _Watcher:
    """Passes on to a child what happens in its life."""

    def __init__(self, monitor: WorkerMonitor, child: Child) -> None:
        self._monitor = monitor
        self._child = child

    def spawned(self, life: Life) -> None:
        self._child.spawned(life)

    def started(self, pid: int) -> None:
        self._child.worker_started(pid)

    def ended(self, exit: Exit) -> None:  # noqa: A002 - the field's word
        self._monitor._ended(  # noqa: SLF001 - the two are one
            self._child.name, self._child, lambda: self._child.exited(exit)
        )
