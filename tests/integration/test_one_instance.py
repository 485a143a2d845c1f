"""One daemon per state folder, whatever its PID file says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from daemon import Daemon
from patience import gone, until


@pytest.fixture
def idle() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="tursi-", ignore_cleanup_errors=True) as folder:
        one = Daemon(Path(folder), scripted=True)
        yield one
        one.close()


@contextmanager
def zombie() -> Iterator[int]:
    """A process that has ended and that nobody has collected."""
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    yield process.pid
    process.wait()


def test_no_pid_file_keeps_it_from_starting(idle: Daemon) -> None:
    """Two at a time: the one that twistd would look at, and our own."""
    given, own = idle.folder / "given.pid", idle.runtime / "tursi.pid"
    precious = idle.folder / "precious"
    precious.write_text("1\n")
    idle.runtime.mkdir(parents=True)
    with subprocess.Popen(["sleep", "600"]) as sleeper, zombie() as dead:
        other = str(sleeper.pid)
        for first, second in [("", other), ("0", str(dead)), ("-1", "x"), (str(2**22), None)]:
            for file, text in ((given, first), (own, second)):
                file.unlink(missing_ok=True)
                if text is None:
                    file.symlink_to(precious)
                else:
                    file.write_text(text)
            with idle.log.open("ab") as log:
                idle.process = process = subprocess.Popen(
                    idle.arguments("-n", f"--pidfile={given}"), stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, cwd=idle.folder, env=idle.environment(),
                )  # fmt: skip
            until(idle._answers, "the daemon answers", 60)
            assert given.read_text() == own.read_text() == f"{process.pid}\n"
            assert not own.is_symlink()
            assert idle.stop() == 0
            assert not given.exists()
            assert not own.exists()
        assert sleeper.poll() is None
        sleeper.kill()
    assert precious.read_text() == "1\n"


def test_of_twenty_that_start_at_once_one_is_left_and_the_others_say_so(idle: Daemon) -> None:
    text = idle.configuration.read_text()
    # Only the lock may decide, not who has the port.
    idle.configuration.write_text(text.replace(f"tcp:{idle.port}:", "tcp:0:"))
    starting = [
        subprocess.Popen(
            idle.arguments(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=idle.folder,
            env=idle.environment(),
        )
        for _ in range(20)
    ]
    said = [each.communicate(timeout=100)[1] for each in starting]
    statuses = sorted(each.returncode for each in starting)
    idle.daemonized = process = psutil.Process(int((idle.runtime / "tursi.pid").read_text()))
    assert statuses == [0] + [75] * 19, said
    assert sum(f"already running (pid {process.pid})" in each for each in said) == 19
    arguments = idle.arguments()
    alive = [
        each.pid
        for each in psutil.process_iter(["cmdline"])
        if (each.info["cmdline"] or [])[-len(arguments) :] == arguments
    ]
    assert alive == [process.pid]


def test_the_status_file_says_what_runs(idle: Daemon) -> None:
    process = idle.daemonize()
    status = json.loads((idle.runtime / "tursi.json").read_text())
    shown = idle.control.get("/status").json()
    assert status["pid"] == process.pid == shown["pid"]
    assert status["version"] == shown["version"]
    assert status["configuration"] == str(idle.configuration)
    assert status["listeners"] == [each["endpoint"] for each in shown["listeners"]]
    assert status["log"] == str(idle.state / "tursi.log")
    assert status["foreground"] is False
    process.send_signal(signal.SIGKILL)
    until(lambda: gone(process), "it is gone")
    # What it has left behind is in nobody's way.
    assert idle.daemonize().pid != process.pid


def test_another_state_folder_does_not_take_the_runtime_folder(idle: Daemon) -> None:
    first = idle.daemonize()
    files = {
        each: each.read_text() for each in (idle.runtime / "tursi.pid", idle.runtime / "tursi.json")
    }
    arguments = [
        str(idle.folder / "other") if each == str(idle.state) else each for each in idle.arguments()
    ]
    text = idle.configuration.read_text()
    idle.configuration.write_text(text.replace(f"tcp:{idle.port}:", "tcp:0:"))
    refused = subprocess.run(
        arguments, capture_output=True, text=True, cwd=idle.folder, env=idle.environment(),
        timeout=60, check=False,
    )  # fmt: skip
    assert refused.returncode == 75
    assert "choose another runtime folder with --runtime" in refused.stderr
    assert {each: each.read_text() for each in files} == files
    assert idle.control.get("/status").json()["pid"] == first.pid
