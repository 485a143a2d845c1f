"""A real daemon under a service manager: what it tells it, and what it takes from it."""

from __future__ import annotations

import os
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import psutil
import pytest
from daemon import Daemon, daemon
from patience import until


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
        assert running.client.get("/live").status_code == 200
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    since = time.monotonic()
    until(lambda: manager.feeds(since) >= 2, "it is fed again")
    stuck.join(30)


# -- sockets that are handed over ---------------------------------------------------


HANDING_OVER = Path(__file__).with_name("handing_over.py")


class Activated(Daemon):
    """A daemon that is started with listening sockets, as systemd starts it."""

    def __init__(self, folder: Path, *, scripted: bool) -> None:
        self.sockets = {
            "control": socket.socket(socket.AF_UNIX),
            "ctl": socket.socket(socket.AF_UNIX),
            "web": socket.socket(socket.AF_INET),
            "spare": socket.socket(socket.AF_INET),
        }
        settings = (
            "[[http.listeners]]\n"
            'endpoint = "systemd:domain=UNIX:name=ctl"\n'
            'roles = ["control"]\n'
            "[[http.listeners]]\n"
            'endpoint = "systemd:domain=INET:name=web"\n'
            'roles = ["inference", "health"]\n'
        )
        super().__init__(folder, scripted=scripted, settings=settings)
        self.runtime.mkdir(mode=0o750)
        self.sockets["control"].bind(str(self.runtime / "control.sock"))
        (self.runtime / "control.sock").chmod(0o640)
        self.sockets["ctl"].bind(str(folder / "ctl"))
        for name in ("web", "spare"):
            self.sockets[name].bind(("127.0.0.1", 0))
        for each in self.sockets.values():
            each.listen()
        self.inodes = {os.fstat(each.fileno()).st_ino for each in self.sockets.values()}

    def arguments(self, *twistd: str) -> list[str]:
        pairs = ",".join(f"{name}={each.fileno()}" for name, each in self.sockets.items())
        return [sys.executable, str(HANDING_OVER), pairs, *super().arguments(*twistd)]

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """As systemd does: the program finds its descriptors from 3 on."""
        self.handed_over = [each.fileno() for each in self.sockets.values()]
        self.launch(environment)

    def wait_until_it_answers(self) -> None:
        until(self._answers, "the daemon answers", 60)

    def close(self) -> None:
        super().close()
        for each in self.sockets.values():
            each.close()


@pytest.fixture
def activated(request: pytest.FixtureRequest) -> Iterator[Activated]:
    with tempfile.TemporaryDirectory(prefix="tursi-") as folder:
        one = Activated(Path(folder), scripted=getattr(request, "param", False))
        yield one
        one.close()


@pytest.mark.parametrize("activated", [False, True], ids=["twistd", "scripted"], indirect=True)
def test_sockets_of_systemd_are_served_and_stay_its_own(activated: Activated) -> None:
    # Asked before anybody runs, answered by who comes.
    early: list[int] = []
    asking = threading.Thread(
        target=lambda: early.append(activated.control.get("/status").status_code), daemon=True
    )
    asking.start()
    activated.start()
    asking.join(60)
    assert early == [200], activated.log.read_text()
    # Who may connect is for systemd to say (SocketMode=).
    control = activated.runtime / "control.sock"
    assert control.stat().st_mode & 0o777 == 0o640

    listeners = activated.control.get("/status").json()["listeners"]
    assert listeners[0]["endpoint"] == "systemd:domain=UNIX:index=0"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(activated.folder / "ctl"))) as other:
        assert other.get("http://localhost/deployments").status_code == 200
        assert other.get("http://localhost/health").status_code == 403
    port = activated.sockets["web"].getsockname()[1]
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    assert httpx.get(f"http://127.0.0.1:{port}/deployments").status_code == 403
    assert activated.log.read_text().count("but no listener uses it") == 1

    # A reload looks at them again, leaves them as they are, and can let go of one and take it back.
    elsewhere = f"endpoint = 'tcp:{activated.port}:interface=127.0.0.1'"
    without = f"[[http.listeners]]\n{elsewhere}\nroles = ['health']\n"
    for settings in (activated.configuration.read_text(), without, None):
        before = activated.configuration.read_text()
        if settings is not None:
            activated.configuration.write_text(settings)
        answer = activated.control.post("/reload")
        assert answer.status_code == 200, answer.text
        activated.configuration.write_text(before)
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(activated.folder / "ctl"))) as other:
        assert other.get("http://localhost/deployments").status_code == 200
    assert control.stat().st_mode & 0o777 == 0o640

    if activated.scripted:
        activated.deploy("echo", activated.script(echo=True))
        activated.wait("echo")
        assert activated.process is not None
        below = psutil.Process(activated.process.pid).children(recursive=True)
        assert len(below) == 2
        for process in below:
            held = {str(each.readlink()) for each in Path(f"/proc/{process.pid}/fd").iterdir()}
            assert not held & {f"socket:[{inode}]" for inode in activated.inodes}

    activated.stop()
    assert (activated.runtime / "control.sock").exists()
    assert (activated.folder / "ctl").exists()
    activated.start()
    activated.wait_until_it_answers()
    activated.stop()


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("systemd:domain=UNIX:name=nobody", "has handed over no socket"),
        ("systemd:domain=UNIX:index=7", "has handed over no socket"),
        ("systemd:domain=INET6:name=web", "the socket is of the domain INET"),
        ("systemd:domain=UNIX:name=control", "is the control socket itself"),
        ("systemd:domain=UNIX", "is not an endpoint"),
    ],
)
def test_what_was_not_handed_over_is_said(activated: Activated, endpoint: str, said: str) -> None:
    text = activated.configuration.read_text()
    activated.configuration.write_text(text.replace("systemd:domain=UNIX:name=ctl", endpoint))
    activated.start()
    assert activated.process is not None
    assert activated.process.wait(60) == 78
    (line,) = activated.log.read_text().splitlines()
    assert said in line
