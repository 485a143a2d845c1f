"""The supervisors that ``supervision.py`` compares, each with the same worker.

When an end was noticed is told by each supervisor's own record: Tursi's events,
supervisord's log (both to the millisecond), a line of the loop's. When a worker was
ready again is told by Tursi's events, and by the peers' workers themselves.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from calendar import timegm
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil

HERE = Path(__file__).parent
sys.path += [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "integration")]

from daemon import Daemon, daemon  # noqa: E402 - found by the line above
from patience import until  # noqa: E402 - the same

WORKER = (sys.executable, "-I", "-u", str(HERE / "peers" / "scripted.py"))
DEADLINE = 60.0
RESTART_SECONDS = 1.0
"""Of the plain restart loop; also Tursi's first back-off, which varies by 20 %."""


@dataclass(frozen=True, slots=True)
class Death:
    """What followed a ``kill -9``, in seconds from right before it."""

    noticed: float
    """Until the supervisor's own record of it."""
    ready: float
    """Until the next worker was ready."""
    delay: float
    """What the supervisor had decided to wait in between."""
    told: float | None = None
    """Until a client that follows the events had been told."""


class Supervisor(Protocol):
    """One that runs, with its workers ready."""

    name: str
    process: psutil.Process

    def helpers(self) -> list[psutil.Process]:
        """Its processes besides itself and the workers."""

    def workers(self) -> list[psutil.Process]:
        """Those."""

    def kill(self, number: int) -> Death:
        """Kill a worker that has not been killed before, and see what happens."""


class Tursi:
    """The daemon, with a deployment for each worker."""

    name = "tursi"

    def __init__(self, running: Daemon) -> None:
        assert running.process is not None
        self._daemon = running
        self._told: list[tuple[float, dict[str, Any]]] = []
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self.process = psutil.Process(running.process.pid)

    def deploy(self, count: int) -> None:
        script = self._daemon.script()
        for number in range(count):
            self._daemon.deploy(_name(number), script)
        for number in range(count):
            self._daemon.wait(_name(number), seconds=DEADLINE + count)
        self._follower.start()

    def helpers(self) -> list[psutil.Process]:
        return list(self.process.children())

    def workers(self) -> list[psutil.Process]:
        return [worker for keeper in self.helpers() for worker in keeper.children()]

    def kill(self, number: int) -> Death:
        name = _name(number)
        last = max(event["id"] for event in self._events(name, 0))
        pid = self._daemon.status(name)["workers"][0]["pid"]
        killed, killed_monotonic = time.time(), time.monotonic()
        os.kill(pid, signal.SIGKILL)
        waiting = until(lambda: self._waiting(name), f"{name} waits for its next try", DEADLINE)
        until(lambda: self._since(name, last).get("worker.ready"), f"{name} is ready", DEADLINE)
        found = self._since(name, last)
        told = [
            at for at, event in self._told if event["id"] > last and event["deployment"] == name
        ]
        return Death(
            noticed=min(found.values()) - killed,
            ready=found["worker.ready"] - killed,
            delay=waiting - found["worker.backoff"],
            told=min(told) - killed_monotonic if told else None,
        )

    def _waiting(self, name: str) -> float | None:
        at = self._daemon.status(name)["workers"][0]["next_try_at"]
        return _epoch(at) if at else None

    def _events(self, name: str, after: int) -> list[dict[str, Any]]:
        answer = self._daemon.control.get(f"/deployments/{name}/events", params={"after": after})
        events: list[dict[str, Any]] = answer.json()["events"]
        return events

    def _since(self, name: str, last: int) -> dict[str, float]:
        return {event["kind"]: _epoch(event["at"]) for event in self._events(name, last)}

    def _follow(self) -> None:
        transport = httpx.HTTPTransport(uds=str(self._daemon.runtime / "control.sock"))
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=None) as client:
            try:
                with client.stream("GET", "/events", params={"follow": "true"}) as stream:
                    for line in stream.iter_lines():
                        if line.startswith("data:"):
                            self._told.append((time.monotonic(), json.loads(line[5:])))
            except httpx.TransportError:
                return  # the daemon has ended


@contextmanager
def tursi(count: int) -> Iterator[Tursi]:
    with daemon(scripted=True) as running:
        ours = Tursi(running)
        ours.deploy(count)
        yield ours


class _Peer:
    """A supervisor whose workers stamp when they are ready."""

    name = ""
    delay = 0.0

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._count = count
        self._stamps = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._stamps.bind(str(folder / "stamps"))
        self._stamps.settimeout(DEADLINE)
        self.pids: list[int] = []

    def start(self) -> None:
        worker = (*WORKER, str(self._folder / "stamps"))
        started = subprocess.Popen(
            self.command(worker),
            cwd=self._folder,
            env={**os.environ, "TZ": "UTC"},
            stderr=subprocess.DEVNULL,
        )
        self.process = psutil.Process(started.pid)
        self._started = started
        try:
            self.pids = [self._next()[0] for _ in range(self._count)]
        except TimeoutError:
            self.close()
            raise

    def command(self, worker: tuple[str, ...]) -> list[str]:
        raise NotImplementedError

    def noticed(self, pid: int) -> float | None:
        """The monotonic time of its record of that worker's end."""
        raise NotImplementedError

    def helpers(self) -> list[psutil.Process]:
        return []

    def workers(self) -> list[psutil.Process]:
        return list(self.process.children())

    def kill(self, number: int) -> Death:
        pid = self.pids[number]
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        _, ready = self._next()
        noticed = until(lambda: self.noticed(pid), f"{self.name} has a record of the end")
        return Death(noticed - killed, ready - killed, self.delay)

    def _next(self) -> tuple[int, float]:
        pid, at = self._stamps.recv(100).split()
        return int(pid), float(at)

    def close(self) -> None:
        for process in (*self.process.children(recursive=True), self.process):
            process.kill()
        self._started.wait(10)
        self._stamps.close()


class Supervisord(_Peer):
    """supervisord, which starts a process that had been up again at once."""

    name = "supervisord"

    def __init__(self, folder: Path, count: int, python: str) -> None:
        super().__init__(folder, count)
        self._python = python
        # Its log has local time.
        self._ahead = time.time() - time.monotonic()

    def command(self, worker: tuple[str, ...]) -> list[str]:
        return supervisord_command(self._python, self._folder, worker, self._count, startsecs=1)

    def noticed(self, pid: int) -> float | None:
        text = (self._folder / "supervisord.log").read_text()
        started = re.search(rf"spawned: '(\S+)' with pid {pid}\n", text)
        assert started is not None
        ended = re.compile(rf"^(\S+ \S+),(\d+) \w+ exited: {started[1]} ", re.MULTILINE)
        found = ended.search(text, started.end())
        if found is None:
            return None
        at = timegm(time.strptime(found[1], "%Y-%m-%d %H:%M:%S")) + int(found[2]) / 1000
        return at - self._ahead


def supervisord_command(
    python: str, folder: Path, program: tuple[str, ...], count: int, startsecs: int
) -> list[str]:
    """The command line of a supervisord for so many copies of a program."""
    configuration = folder / "supervisord.conf"
    configuration.write_text(
        "[supervisord]\nnodaemon=true\nsilent=true\n"
        f"logfile={folder}/supervisord.log\npidfile={folder}/supervisord.pid\n"
        f"childlogdir={folder}\nuser={os.getuid()}\n"
        f"[program:worker]\ncommand={' '.join(program)}\nprocess_name=worker-%(process_num)02d\n"
        f"numprocs={count}\nautorestart=true\nstartsecs={startsecs}\n"
    )
    return [python, "-m", "supervisor.supervisord", "-c", str(configuration)]


class Plain(_Peer):
    """A loop that waits, sleeps and spawns: systemd's ``Restart=always`` without systemd."""

    name = "plain restart"
    delay = RESTART_SECONDS

    def command(self, worker: tuple[str, ...]) -> list[str]:
        return plain_command(self._folder, worker, self._count, self.delay)

    def noticed(self, pid: int) -> float | None:
        lines = (self._folder / "restarts").read_text().splitlines()
        return next((float(line.split()[1]) for line in lines if line.split()[0] == str(pid)), None)


def plain_command(folder: Path, program: tuple[str, ...], count: int, delay: float) -> list[str]:
    """The command line of the loop for so many copies of a program."""
    loop = str(HERE / "peers" / "plain_restart.py")
    return [
        sys.executable,
        "-I",
        "-S",
        loop,
        str(folder / "restarts"),
        str(count),
        str(delay),
        *program,
    ]


@contextmanager
def peer(one: _Peer) -> Iterator[_Peer]:
    """Start it, and end it."""
    one.start()
    try:
        yield one
    finally:
        one.close()


def _epoch(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _name(number: int) -> str:
    return f"worker-{number:02d}"
