"""A real daemon under a service manager: what it tells it, and what it takes from it."""

from __future__ import annotations

import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from daemon import Daemon, daemon, until


class Manager:
    """A service manager's socket, read by a thread of its own, and all that was said on it."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.told: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while message := self.socket.recv(4096):
            self.told.append((time.monotonic(), message.decode()))

    def lines(self) -> list[str]:
        return [line for _, message in self.told for line in message.splitlines()]

    def feeds(self, since: float) -> int:
        return sum(at > since and message == "WATCHDOG=1" for at, message in self.told)

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self.socket.close()


@pytest.fixture
def manager() -> Iterator[Manager]:
    with tempfile.TemporaryDirectory(prefix="tursi-") as folder:
        one = Manager(Path(folder) / "notify")
        yield one
        one.close()


@pytest.fixture
def running(manager: Manager) -> Iterator[Daemon]:
    environment = {"NOTIFY_SOCKET": manager.socket.getsockname(), "WATCHDOG_USEC": "1500000"}
    with daemon(scripted=True, environment=environment) as one:
        yield one


def test_it_says_when_it_serves_how_the_models_are_and_when_it_stops(
    manager: Manager, running: Daemon
) -> None:
    until(lambda: "STATUS=no deployments" in manager.lines(), "the first status")
    lines = manager.lines()
    assert lines.count("READY=1") == 1
    assert lines.index("READY=1") < lines.index("STATUS=no deployments")
    assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in lines[: lines.index("READY=1")])
    running.deploy("echo", running.script(echo=True))
    until(lambda: "STATUS=1 of 1 deployment ready" in manager.lines(), "the deployment is told of")
    begun = time.monotonic()
    until(lambda: manager.feeds(begun) >= 2, "the watchdog is fed")

    # Nobody below the daemon can speak in its name.
    assert running.process is not None
    below = psutil.Process(running.process.pid).children(recursive=True)
    assert below
    for process in below:
        names = set(process.environ())
        assert not names & {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS"}

    running.stop()
    until(lambda: "STOPPING=1" in manager.lines(), "it said that it stops")
    lines = manager.lines()
    assert lines.index("STOPPING=1") > lines.index("STATUS=1 of 1 deployment ready")
    assert lines[lines.index("STOPPING=1") + 1].startswith("EXTEND_TIMEOUT_USEC=")


def test_the_watchdog_is_not_fed_while_the_database_thread_is_stuck(
    manager: Manager, running: Daemon
) -> None:
    until(lambda: manager.feeds(0.0) >= 2, "the watchdog is fed")
    holder = sqlite3.connect(running.state / "tursi.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        body = {"model": str(running.script(echo=True))}
        stuck = threading.Thread(
            target=lambda: running.control.put("/deployments/echo", json=body), daemon=True
        )
        stuck.start()
        silent = 1.2  # seconds; it is fed every 0.5 s otherwise
        until(lambda: time.monotonic() - manager.told[-1][0] > silent, "it isn't fed", 5)
        # The reactor answers all the while, but that isn't all that must work.
        assert running.client.get("/health").status_code == 200
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    since = time.monotonic()
    until(lambda: manager.feeds(since) >= 2, "it is fed again")
    stuck.join(30)
