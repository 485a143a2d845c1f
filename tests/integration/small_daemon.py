"""A daemon that is nothing but a monitor, to be killed by tests.

``python small_daemon.py FOLDER PROGRAM COUNT`` keeps COUNT workers that run the
Python text PROGRAM, and prints what they are told as JSON lines.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor

from tursi.supervision.leftovers import become_subreaper
from tursi.supervision.life import Exit, Launch, Life
from tursi.supervision.logs import LifeLog
from tursi.supervision.monitor import WorkerMonitor

reactor: Any = _reactor
_numbers = itertools.count()


class ProgramChild:
    """Runs a Python program as its worker, and comes back after ``delay``."""

    def __init__(
        self,
        name: str,
        folder: Path,
        arguments: tuple[str, ...],
        tell: Callable[..., None] = lambda **event: None,
    ) -> None:
        self.name = name
        self.arguments = arguments
        self.delay: float | None = 0.0
        self.lives: list[Life] = []
        self.pids: list[int] = []
        self.exits: list[tuple[float, Exit]] = []
        self.failures: list[Exception] = []
        self.logs: list[Path] = []
        self._folder = folder
        self._tell = tell

    def may_spawn(self) -> bool:
        return True

    def launch(self) -> Launch:
        self.logs.append(self._folder / f"{self.name}-{len(self.logs)}.log")
        log = LifeLog(self.logs[-1], clock=time.time, size=1 << 20, rate=1 << 20)
        environment = {"TURSI_STATE": str(self._folder)}
        return Launch(f"{self.name}-{next(_numbers)}", self.arguments, environment, log)

    def spawned(self, life: Life) -> None:
        self.lives.append(life)
        life.socket.close()
        self._tell(event="spawned", name=self.name, keeper=life.keeper_pid, uuid=life.uuid)

    def worker_started(self, pid: int) -> None:
        self.pids.append(pid)
        self._tell(event="started", name=self.name, pid=pid)

    def spawn_failed(self, error: Exception) -> float | None:
        self.failures.append(error)
        return self.delay

    def exited(self, exit: Exit) -> float | None:  # noqa: A002 - the field's word
        self.exits.append((time.monotonic(), exit))
        self._tell(event="exited", name=self.name, **asdict(exit))
        return self.delay


def program(text: str) -> tuple[str, ...]:
    """The command that runs a Python text."""
    return (sys.executable, "-I", "-S", "-c", text)


def main(folder: str, text: str, count: str) -> None:
    """Run until killed."""
    become_subreaper()
    monitor = WorkerMonitor(reactor)
    for number in range(int(count)):
        child = ProgramChild(
            f"child{number}",
            Path(folder),
            program(text),
            lambda **event: print(json.dumps(event), flush=True),  # noqa: T201 - this is its product
        )
        child.delay = 0.05
        monitor.addChild(child)
    reactor.callWhenRunning(monitor.startService)
    reactor.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
