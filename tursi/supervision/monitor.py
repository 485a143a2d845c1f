"""The monitor of workers: who is running, who comes back, and when."""

from __future__ import annotations

from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.runner.procmon import ProcessMonitor

from tursi.supervision.life import Exit, Launch, Life

__all__ = ["Child", "Exit", "Launch", "Life", "WorkerMonitor"]


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
    """A ProcessMonitor that keeps workers, each under a keeper."""

    def __init__(self, reactor: Any) -> None:
        super().__init__(reactor)

    def addChild(self, child: Child) -> None:  # noqa: N802 - beside addProcess
        """Monitor ``child``; start it at once if the service runs."""
        raise NotImplementedError

    def removeProcess(self, name: str) -> Deferred[None]:  # type: ignore[override]  # noqa: N802
        """Stop the process; fires when its whole tree is gone."""
        raise NotImplementedError

    def terminate(self, name: str) -> None:
        """SIGTERM, then SIGCONT, to the worker's process group."""
        raise NotImplementedError

    def kill(self, name: str) -> None:
        """SIGKILL to the whole tree."""
        raise NotImplementedError

    def stopService(self) -> Deferred[None]:  # type: ignore[override]  # noqa: N802
        """Stop every process; fires when all trees are gone."""
        raise NotImplementedError
