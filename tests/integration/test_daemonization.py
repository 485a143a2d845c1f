"""What twistd gets wrong when it goes into the background, and Tursi puts right."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from daemon import Daemon, daemon
from patience import gone, until


@pytest.fixture
def idle() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="tursi-", ignore_cleanup_errors=True) as folder:
        one = Daemon(Path(folder), scripted=True)
        yield one
        one.close()


def test_umask_folder_log_and_descriptors(idle: Daemon) -> None:
    rundir = idle.folder / "rundir"
    rundir.mkdir()
    reader, writer = os.pipe()
    started = subprocess.run(
        idle.arguments("--umask=027", f"--rundir={rundir}", "--logfile=own.log"),
        stdin=subprocess.DEVNULL, timeout=60, check=False, cwd=idle.folder,
        env=idle.environment(), pass_fds=[writer],
    )  # fmt: skip
    os.close(writer)
    assert started.returncode == 0
    idle.daemonized = process = psutil.Process(int((idle.runtime / "tursi.pid").read_text()))
    # It ends although the daemon lives: who waits for it doesn't wait for ever.
    os.set_blocking(reader, False)
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert "Umask:\t0027" in Path(f"/proc/{process.pid}/status").read_text()
    assert process.cwd() == str(rundir)
    assert process.ppid() != os.getpid()
    log = idle.folder / "own.log"
    assert log.stat().st_mode & 0o777 == 0o640
    assert "serves on" in until(lambda: "serves on" in log.read_text() and log.read_text(), "log")
    for descriptor in (0, 1, 2):
        assert Path(f"/proc/{process.pid}/fd/{descriptor}").readlink() == Path("/dev/null")
    assert not (idle.folder / "twistd.log").exists()
    assert not (idle.folder / "twistd.pid").exists()
    for folder in (idle.state, idle.runtime):
        assert folder.stat().st_mode & 0o777 == 0o750
    assert (idle.state / "tursi.sqlite").stat().st_mode & 0o777 == 0o600


def test_in_the_foreground_too_it_keeps_nothing_of_who_started_it(idle: Daemon) -> None:
    reader, writer = os.pipe()
    idle.handed_over = [writer]
    idle.start()
    os.close(writer)
    os.set_blocking(reader, False)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_who_started_it_does_not_wait_for_a_daemon_that_was_killed(idle: Daemon) -> None:
    starting = subprocess.Popen(
        idle.arguments(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        cwd=idle.folder, env=idle.environment({"TURSI_TEST_FAULT": "hang before it listens"}),
    )  # fmt: skip
    pid_file = idle.runtime / "tursi.pid"
    until(lambda: pid_file.exists() and pid_file.read_text(), "the daemon is there")
    assert starting.poll() is None
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    began = time.monotonic()
    _, said = starting.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert (starting.returncode, said) == (
        70, "tursi: the daemon ended before it served; see its log.\n"
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["-n", "--umask=027"])
@pytest.mark.parametrize("fault", ["fail before it listens", "fail after it listens"])
def test_a_start_that_fails_is_no_success(idle: Daemon, mode: str, fault: str) -> None:
    ended = subprocess.run(
        idle.arguments(mode), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60, check=False, cwd=idle.folder, env=idle.environment({"TURSI_TEST_FAULT": fault}),
    )  # fmt: skip
    late = fault == "fail after it listens"
    if mode == "-n":
        assert ended.returncode == (70 if late else 1)
        log = ended.stdout
    else:
        # It listened: that it can't serve comes to light later.
        assert ended.returncode == (0 if late else 1)
        log_file = idle.state / "tursi.log"
        until(lambda: "a defect" in log_file.read_text(), "the log says why")
        log = log_file.read_text()
    assert "a defect" in log + ended.stderr
    until(lambda: not (idle.runtime / "control.sock").exists(), "nothing is left")


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
def test_it_becomes_another_user_who_owns_what_it_writes(idle: Daemon) -> None:
    nobody = pwd.getpwnam("nobody")
    try:
        subprocess.run(
            [sys.executable, "-c", "import tursi"], user=nobody.pw_uid, check=True, timeout=60
        )
    except (PermissionError, subprocess.CalledProcessError):
        pytest.skip("another user can't read this installation")
    # Its own folder is in one where it may write nothing.
    idle.folder.chmod(0o755)
    pid_file = idle.folder / "given.pid"
    settings = idle.configuration.read_text() + "[log]\nmax_bytes = 1024\nold_files = 2\n"
    idle.configuration.write_text(settings)
    process = idle.daemonize("--uid=nobody", "--umask=077", f"--pidfile={pid_file}")
    assert process.uids().effective == nobody.pw_uid
    assert pid_file.read_text() == (idle.runtime / "tursi.pid").read_text()
    idle.deploy("echo", idle.script(echo=True))
    idle.wait("echo")
    for _ in range(5):
        idle.control.post("/deployments/echo/restart")
        idle.wait("echo")
    files = [*idle.state.glob("tursi.log*"), idle.state, idle.runtime, idle.state / "tursi.sqlite"]
    assert len(files) == 6
    assert {each.stat().st_uid for each in files} == {nobody.pw_uid}
    process.terminate()
    until(lambda: gone(process), "it has ended", 60)
    assert not list(idle.runtime.iterdir())
    # It may not remove this one, and leaves it empty.
    assert pid_file.read_text() == ""
    idle.daemonize("--uid=nobody", f"--pidfile={pid_file}")


def test_the_log_as_json() -> None:
    with daemon(scripted=True, settings="[log]\nformat = 'json'\n") as running:
        until(lambda: '"message": "tursi' in running.log.read_text(), "it serves")
