"""What the system refuses while a worker is started: nothing leaks, and it starts when it can."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_twisted
from daemon import daemon
from fakes import RecordedSink
from patience import until as wait
from processes import marked, zombies
from test_worker_processes import ASK, House, reach, until

from tursi.lifecycle import verdict
from tursi.model import Phase

SEAM: tuple[tuple[Any, str], ...] = (
    (os, "open"),
    (os, "pipe"),
    (os, "posix_spawnp"),
    (os, "fork"),
    (socket, "socketpair"),
    (socket, "fromfd"),
)
"""The calls that a spawn makes of the system."""
ERRORS = (errno.EMFILE, errno.ENOMEM, errno.EAGAIN)
MOST = 30
"""Calls; one spawn makes fewer."""


@pytest_twisted.async_yield_fixture()
async def house(tmp_path: Path) -> AsyncIterator[House]:
    one = House(tmp_path)
    yield one
    await one.close()


class Refusal:
    """Counts the calls of the seam, and lets the ``nth`` fail."""

    def __init__(self, nth: int, number: int) -> None:
        self.calls = 0
        self.refused = ""
        self._nth = nth
        self._number = number

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self._nth:
                self.refused = name
                raise OSError(self._number, os.strerror(self._number))
            return call(*arguments, **options)

        return wrapped


@contextmanager
def refusing(nth: int, number: int) -> Iterator[Refusal]:
    refusal = Refusal(nth, number)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in SEAM:
            patch.setattr(module, name, refusal.wrap(name, getattr(module, name)))
        yield refusal


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest_twisted.ensureDeferred
async def test_whichever_call_fails_nothing_leaks_and_the_next_try_succeeds(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "HOST_SECONDS", 0.05)
    old = house.start("--echo")
    await reach(old, Phase.READY)
    before = descriptors()
    refused = set()
    for nth in range(1, MOST):
        house.observer.phases.clear()
        house.observer.causes.clear()
        number = ERRORS[nth % len(ERRORS)]
        # Its first admission, and with that its spawn, is in the next turn.
        worker = house.start("--echo", backoff_initial=0.05)
        with refusing(nth, number) as refusal:
            await until(
                lambda worker=worker: worker.phase not in {Phase.QUEUED, Phase.STOPPED},  # type: ignore[misc]  # bound early
                "it was tried",
            )
        await reach(worker, Phase.READY)
        if refusal.refused:
            refused.add(refusal.refused)
        if Phase.BACKOFF in house.observer.phases:
            assert worker.status().restarts == 1
            assert any(os.strerror(number) in cause for cause in house.observer.causes)
        # What is there goes on, whatever another is refused.
        sink = RecordedSink()
        old.submit(ASK, sink)
        await until(lambda sink=sink: sink.done, "the old one answers")  # type: ignore[misc]  # bound early
        await worker.stop()
        await until(lambda: descriptors() == before, f"no descriptor leaks after call {nth}")
        assert not zombies(os.getpid())
        if not refusal.refused:
            break
    else:
        pytest.fail(f"a spawn makes more than {MOST} calls")
    assert refused >= {"open", "pipe", "posix_spawnp", "socketpair", "fromfd"}
    assert old.phase is Phase.READY


@contextmanager
def exhausted(process: psutil.Process) -> Iterator[None]:
    """Have the process not get a single descriptor more."""
    limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    # One that it has freed meanwhile must not be of use either.
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (process.num_fds() // 2, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)


def test_without_descriptors_nothing_is_given_up_and_no_orphan_forgotten() -> None:
    with daemon(scripted=True, settings="[workers]\nbackoff_initial = 0.2\n") as running:
        running.deploy("calm", running.script("calm", echo=True))
        running.deploy("hit", running.script("hit", echo=True, fork=3))
        running.wait("calm")
        (worker,) = running.wait("hit")["workers"]
        mark = f"TURSI_WORKER={worker['uuid']}"
        assert len(marked(mark)) == 2 + 3
        assert running.process is not None
        process = psutil.Process(running.process.pid)
        body = {"model": "calm", "input": "hello"}
        assert running.client.post("/v1/embeddings", json=body).status_code == 200
        with exhausted(process):
            os.kill(psutil.Process(worker["pid"]).ppid(), signal.SIGKILL)
            running.deploy("new", running.script("new", echo=True))
            status = running.wait("new", "backoff", 10)
            assert "Too many open files" in status["reason"]
            assert running.client.post("/v1/embeddings", json=body).status_code == 200
        wait(lambda: not marked(mark), "no orphan is left", 5)
        running.wait("hit", seconds=20)
        running.wait("new", seconds=20)
        assert running.wait("calm")["workers"][0]["restarts"] == 0


def test_without_descriptors_connections_are_refused_and_those_there_served() -> None:
    with daemon(scripted=True) as running:
        running.deploy("echo", running.script("echo", echo=True))
        running.wait("echo")
        assert running.process is not None
        body = {"model": "echo", "input": "hello"}
        assert running.client.post("/v1/embeddings", json=body).status_code == 200
        process = psutil.Process(running.process.pid)
        turned_away = []
        with exhausted(process):
            used = sum(process.cpu_times()[:2])
            began = time.monotonic()
            for _ in range(20):
                address = ("127.0.0.1", running.port)
                with suppress(ConnectionError), socket.create_connection(address, timeout=5) as one:
                    one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    turned_away.append(one.recv(100))
                assert running.client.post("/v1/embeddings", json=body).status_code == 200
            wait(lambda: time.monotonic() - began > 1, "a second has passed")
            busy = (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - began)
        assert not any(turned_away)
        assert busy < 0.8
        with socket.create_connection(("127.0.0.1", running.port), timeout=5) as one:
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert one.recv(100).startswith(b"HTTP/1.1 200")
        assert running.wait("echo")["workers"][0]["restarts"] == 0
