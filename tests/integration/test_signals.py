"""Every signal against a real twistd, in the foreground and as a daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from daemon import Daemon, daemon
from patience import gone, until

SOFT = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


@pytest.fixture
def idle() -> Iterator[Daemon]:
    """A daemon that has not been started."""
    with tempfile.TemporaryDirectory(prefix="tursi-", ignore_cleanup_errors=True) as folder:
        one = Daemon(Path(folder), scripted=True)
        yield one
        one.close()


@pytest.fixture(params=["foreground", "daemon"])
def running(request: pytest.FixtureRequest, idle: Daemon) -> Daemon:
    if request.param == "daemon":
        idle.daemonize()
        idle.log = idle.state / "tursi.log"
    else:
        idle.start()
    return idle


def pid(running: Daemon) -> int:
    return int((running.runtime / "tursi.pid").read_text())


def said(running: Daemon, text: str) -> Callable[[], bool]:
    return lambda: text in running.log.read_text()


def in_flight(running: Daemon, answers: list[httpx.Response]) -> threading.Thread:
    """A request that a worker works on; its answer comes into ``answers``."""
    body = {"model": "echo", "input": "hello"}
    thread = threading.Thread(
        target=lambda: answers.append(
            httpx.post(f"{running.url}/v1/embeddings", json=body, timeout=60)
        ),
        daemon=True,
    )
    thread.start()
    until(lambda: running.status("echo")["in_flight"] == 1, "the request is in flight")
    return thread


def test_no_signal_kills_and_each_does_what_it_is_for(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True))
    worker = running.wait("echo")["workers"][0]["pid"]
    daemon_pid = pid(running)
    moved = running.log.with_name("moved.log")

    os.kill(daemon_pid, signal.SIGUSR1)
    until(said(running, "deployment echo: ready"), "the status is in the log")
    assert f"ready, pid {worker}" in running.log.read_text()
    os.kill(daemon_pid, signal.SIGUSR2)
    until(said(running, "debug messages are on"), "it debugs")
    os.kill(daemon_pid, signal.SIGUSR2)
    until(said(running, "debug messages are off"), "it debugs no more")
    os.kill(daemon_pid, signal.SIGQUIT)
    until(said(running, "in runReactorWithLogging"), "the stacks are in the log")
    if running.daemonized is not None:
        running.log.rename(moved)
    os.kill(daemon_pid, signal.SIGHUP)
    until(lambda: running.log.exists() and said(running, "no change")(), "it has read its file")
    for number in SOFT * 5:
        os.kill(daemon_pid, number)
    assert running.status("echo")["workers"][0]["pid"] == worker
    assert pid(running) == daemon_pid

    process = psutil.Process(daemon_pid)
    process.terminate()
    if running.process is not None:
        assert running.process.wait(60) == 0
    until(lambda: gone(process), "it has ended")
    assert gone(worker)
    assert not list(running.runtime.iterdir())
    assert "Traceback" not in running.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_in_flight_is_finished(idle: Daemon, number: int) -> None:
    idle.start()
    idle.deploy("echo", idle.script(echo=True, delay=1.0))
    idle.wait("echo")
    answers: list[httpx.Response] = []
    thread = in_flight(idle, answers)
    assert idle.process is not None
    idle.process.send_signal(number)
    until(said(idle, "Closed"), "it listens no more")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{idle.url}/health")
    thread.join(30)
    assert [answer.status_code for answer in answers] == [200]
    assert idle.process.wait(30) == 0


def test_a_second_one_does_not_wait_for_what_is_in_flight(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True, delay=300.0))
    running.wait("echo")
    answers: list[httpx.Response] = []
    thread = in_flight(running, answers)
    process, tree = psutil.Process(pid(running)), running.tree()
    process.terminate()
    until(said(running, "stopping because of SIGTERM"), "it stops")
    assert process.is_running()
    began = time.monotonic()
    process.terminate()
    process.terminate()
    until(lambda: all(map(gone, [process, *tree])), "all has ended", 30)
    assert time.monotonic() - began < 20
    thread.join(30)
    assert answers[0].status_code == 502
    assert "Traceback" not in running.log.read_text()
    assert "ReactorNotRunning" not in running.log.read_text()


def test_sigterm_while_a_model_loads(idle: Daemon) -> None:
    idle.start()
    idle.deploy("echo", idle.script(load_seconds=300.0))
    until(lambda: idle.status("echo")["phase"] == "loading", "it loads")
    tree = idle.tree()
    assert tree
    began = time.monotonic()
    assert idle.stop() == 0
    assert time.monotonic() - began < 12
    assert all(map(gone, tree))


@pytest.mark.parametrize("fault", ["hang at the end", "block at the end"])
def test_an_end_that_hangs_is_ended_with_the_stacks_in_the_log(idle: Daemon, fault: str) -> None:
    settings = "[workers]\ndrain_seconds = 0.1\nstop_seconds = 0.1\nkill_seconds = 0.1\n"
    idle.configuration.write_text(idle.configuration.read_text() + settings)
    idle.start({"TURSI_TEST_FAULT": fault})
    idle.deploy("echo", idle.script(echo=True))
    idle.wait("echo")
    tree = idle.tree()
    assert idle.stop() == 70
    assert "where every thread stands" in idle.log.read_text()
    until(lambda: all(map(gone, tree)), "no worker is left")


@pytest.mark.parametrize("moment", ["start", "end"])
def test_signals_at_any_moment_of_start_and_end(idle: Daemon, moment: str) -> None:
    """From the moment on that whoever starts it has seen to it, as ``tursi start`` does."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SOFT}
    with idle.log.open("ab") as log:
        idle.process = process = subprocess.Popen(
            idle.arguments("-n"), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            cwd=idle.folder, env=idle.environment(),
        )  # fmt: skip
    for number, handler in before.items():
        signal.signal(number, handler)
    over = threading.Event()

    def disturb() -> None:
        while not over.wait(0.003):
            for number in SOFT:
                process.send_signal(number)

    thread = threading.Thread(target=disturb, daemon=True)
    if moment == "start":
        thread.start()
    until(idle._answers, "the daemon answers", 60)
    over.set()
    if moment == "end":
        over.clear()
        thread.start()
    assert idle.stop() == 0
    over.set()
    thread.join(10)


def test_a_broken_configuration_is_refused_a_hundred_times_and_then_a_good_one_applied() -> None:
    with daemon(scripted=True) as running:
        running.deploy("echo", running.script(echo=True))
        worker = running.wait("echo")["workers"][0]["pid"]
        good = running.configuration.read_text()
        process = psutil.Process(pid(running))
        running.configuration.write_text("[http]\nmax_bdy = 1\n")
        for _ in range(98):
            refused = running.control.post("/reload")
            assert refused.status_code == 422
            assert refused.json()["error"]["code"] == "configuration_error"
        for number in (1, 2):
            process.send_signal(signal.SIGHUP)
            until(
                lambda expected=number: (  # type: ignore[misc] # bound now
                    running.log.read_text().count("stays as it was") >= expected
                ),
                "it refuses",
            )
        assert "unknown field `max_bdy`" in running.log.read_text()
        running.configuration.write_text(f"{good}[log]\nlevel = 'debug'\n")
        process.send_signal(signal.SIGHUP)
        until(said(running, "was read: log.level"), "it has read the good one")
        status: dict[str, Any] = running.wait("echo")
        assert (status["workers"][0]["pid"], status["workers"][0]["restarts"]) == (worker, 0)
