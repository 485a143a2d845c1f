from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import alive, escapees, marked, wait_until

from tursi import sandbox
from tursi.supervision.life import KEEPER, Confinement


class Kept:
    """A keeper that this test has started, with its worker."""

    def __init__(self, mark: str, *argv: str, parent: int | None = None, **confined: Any) -> None:
        self.started_at = time.monotonic()
        lifeline, self.lifeline = os.pipe()
        self.status, status = os.pipe()
        self.output, output = os.pipe()
        self.socket, theirs = socket.socketpair()
        inherited = {1: output, 2: output, 3: theirs.fileno(), 4: lifeline, 5: status}
        order = Confinement(**{"files": 256, **confined}).order(parent or os.getpid())
        # Beyond the reach of the numbers that they get in the child.
        away = {fd: os.dup2(old, 200 + fd, inheritable=False) for fd, old in inherited.items()}
        name, _, value = mark.partition("=")
        self.pid = os.posix_spawn(
            sys.executable,
            [*KEEPER, order, *argv],
            {name: value, "PATH": os.environ["PATH"]},
            file_actions=[(os.POSIX_SPAWN_DUP2, old, fd) for fd, old in away.items()],
        )
        theirs.close()
        for fd in (lifeline, status, output, *away.values()):
            os.close(fd)
        self.reports: list[dict[str, Any]] = []
        self._line = b""
        self._ended = False

    def report(self, event: str) -> dict[str, Any]:
        """Wait for the report of that event."""
        while True:
            for report in self.reports:
                if report["event"] == event:
                    return report
            assert select.select([self.status], [], [], 15)[0], f"no report of {event}"
            data = os.read(self.status, 4096)
            assert data, f"the keeper ended without a report of {event}: {self.reports}"
            *lines, self._line = (self._line + data).split(b"\n")
            self.reports += map(json.loads, lines)

    def read(self, enough: Callable[[str], bool] = lambda _: False) -> str:
        """What the worker writes, up to ``enough`` or the end."""
        text = ""
        while not enough(text):
            assert select.select([self.output], [], [], 15)[0], f"no more than {text!r}"
            data = os.read(self.output, 65536)
            if not data:
                break
            text += data.decode()
        return text

    def wait(self) -> int:
        """Wait for the keeper; its exit status (negative: the signal)."""
        wait_until(lambda: not alive(self.pid))
        self._ended = True
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        """Leave nothing."""
        if self.lifeline >= 0:
            os.close(self.lifeline)
        if not self._ended:
            os.kill(self.pid, signal.SIGCONT)
            self.wait()
        os.close(self.status)
        os.close(self.output)
        self.socket.close()

    def cut_lifeline(self) -> None:
        os.close(self.lifeline)
        self.lifeline = -1


@pytest.fixture
def mark(tmp_path: Path) -> str:
    return f"TURSI_WORKER={tmp_path}"


@pytest.fixture
def keep(mark: str) -> Iterator[Callable[..., Kept]]:
    started: list[Kept] = []

    def start(*argv: str, **options: Any) -> Kept:
        started.append(Kept(mark, *argv, **options))
        return started[-1]

    yield start
    for kept in started:
        kept.close()
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)


def python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", program)


Keep = Callable[..., Kept]


def test_reports_start_and_end(keep: Keep) -> None:
    kept = keep(*python("b = b'x' * 50_000_000; sum(range(3_000_000)); raise SystemExit(7)"))
    started, exited, cleared = (kept.report(event) for event in ("started", "exited", "cleared"))
    assert started["start_time"] > 0
    assert (exited["exit_status"], exited["signal"]) == (7, None)
    assert 50_000_000 < exited["peak_rss"] < 100_000_000
    assert 0.02 < exited["cpu_seconds"] < 10
    assert cleared["killed"] == 0
    assert kept.wait() == 0


def test_reports_the_signal(keep: Keep) -> None:
    kept = keep("/bin/sleep", "300")
    os.kill(kept.report("started")["pid"], signal.SIGSEGV)
    exited = kept.report("exited")
    assert (exited["exit_status"], exited["signal"]) == (None, signal.SIGSEGV)


def test_the_worker_is_contained(keep: Keep, tmp_path: Path) -> None:
    program = """
import json, os, resource, signal
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1],
    "ids": [os.getpid(), os.getsid(0), os.getpgid(0)],
    "keeper": os.getsid(os.getppid()),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "status": [status[name].strip() for name in ("NoNewPrivs", "Umask", "SigBlk")],
    "oom": open("/proc/self/oom_score_adj").read().strip(),
    "cwd": os.getcwd(),
    "term": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
}))
"""
    kept = keep(*python(program), directory=str(tmp_path))
    seen = json.loads(kept.read())
    assert seen["fds"] == [0, 1, 2, 3]
    assert len(set(seen["ids"])) == 1, "it leads a session and a group of its own"
    assert seen["keeper"] == kept.pid
    assert seen["core"] == [0, 0]
    assert seen["files"] == [256, 256]
    assert seen["status"] == ["1", "0077", "0" * 16]
    assert seen["oom"] == "500"
    assert seen["cwd"] == str(tmp_path)
    assert seen["term"]


def test_the_data_socket_ends_with_the_worker(keep: Keep) -> None:
    kept = keep(*python("import os; os.write(3, b'hello'); os.kill(os.getpid(), 9)"))
    kept.socket.settimeout(15)
    assert kept.socket.recv(100) == b"hello"
    assert kept.socket.recv(100) == b""


@pytest.mark.parametrize("how", ["lifeline", "SIGHUP", "the worker ends"])
def test_nothing_survives_not_even_what_has_left_the_session(
    keep: Keep, mark: str, how: str
) -> None:
    kept = keep(*python(escapees(5)))
    kept.read(lambda text: "escaped" in text)
    assert len(marked(mark)) == 7
    if how == "lifeline":
        kept.cut_lifeline()
    elif how == "SIGHUP":
        os.kill(kept.pid, signal.SIGHUP)
    else:
        os.kill(kept.report("started")["pid"], signal.SIGKILL)
    assert wait_until(lambda: not marked(mark)) < 1.0
    assert kept.report("exited")["signal"] == signal.SIGKILL
    assert kept.report("cleared")["killed"] == 5
    assert kept.wait() == 0


HIDES = """
import ctypes, os, sys, time
prctl = ctypes.CDLL(None).prctl
prctl(1, 0, 0, 0, 0)   # no signal at the death of its parent
prctl(36, 1, 0, 0, 0)  # whoever is below it stays so
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with open(sys.argv[1], "a") as file:
                file.write(f"{os.getpid()} ")
            os.closerange(0, 256)
            # Neither its environment nor its name tell where it is from.
            os.execve("/bin/sleep", ["harmless", "300"], {})
        os._exit(0)
for _ in range(3):
    os.wait()
# Its end is theirs: until then they must have said who they are.
while not os.path.exists(sys.argv[1]) or len(open(sys.argv[1]).read().split()) < 3:
    time.sleep(0.01)
os.write(1, b"hidden")
"""


@pytest.mark.parametrize("how", ["lifeline", "the worker ends"])
def test_who_hides_is_found(keep: Keep, tmp_path: Path, how: str) -> None:
    names = tmp_path / "pids"
    then = "time.sleep(300)" if how == "lifeline" else "os._exit(0)"
    kept = keep(*python(HIDES + then), str(names))
    kept.read(lambda text: "hidden" in text)
    pids = [int(word) for word in names.read_text().split()]
    if how == "lifeline":
        assert all(alive(pid) for pid in pids)
        kept.cut_lifeline()
    assert wait_until(lambda: not any(map(alive, pids))) < 1.0
    assert kept.report("cleared")["killed"] == 3


def test_a_tree_that_keeps_forking_is_cleared(keep: Keep, mark: str) -> None:
    program = """
import os, time
print("escaped", flush=True)
for _ in range(2000):
    if os.fork():
        time.sleep(0.005)
        os._exit(0)
    os.setsid()
"""
    kept = keep(*python(program))
    kept.read(lambda text: "escaped" in text)
    kept.wait()
    assert not marked(mark)
    assert kept.report("exited")["exit_status"] == 0
    assert kept.report("cleared")["killed"] > 0


def test_sigterm_reaches_the_whole_group_and_a_stopped_worker(keep: Keep, mark: str) -> None:
    program = """
import os, signal, sys, time
def leave(*_):
    # Not print: the signal may come while that of "ready" hasn't returned.
    os.write(1, f"asked {os.getpid() == first}\\n".encode())
    os._exit(3)
first = os.getpid()
signal.signal(signal.SIGTERM, leave)
child = os.fork()
print("ready", flush=True)
time.sleep(300)
"""
    kept = keep(*python(program))
    kept.read(lambda text: text.count("ready") == 2)
    worker = kept.report("started")["pid"]
    for pid in marked(mark) - {kept.pid}:
        os.kill(pid, signal.SIGSTOP)
    os.kill(kept.pid, signal.SIGTERM)
    assert kept.report("exited")["exit_status"] == 3
    assert "asked True" in kept.read()
    assert not alive(worker)


def test_sigusr2_has_a_stopped_worker_tell_where_it_stands(keep: Keep) -> None:
    program = """
import faulthandler, os, signal, time
faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
def stand_still():
    os.write(1, b"ready\\n")
    time.sleep(300)
stand_still()
"""
    kept = keep(*python(program))
    kept.read(lambda text: "ready" in text)
    worker = kept.report("started")["pid"]
    os.kill(worker, signal.SIGSTOP)
    for _ in range(2):
        os.kill(kept.pid, signal.SIGUSR2)
        kept.read(lambda text: "in stand_still" in text and "in <module>" in text)
    assert alive(worker)


def test_sigterm_that_is_ignored_changes_nothing(keep: Keep) -> None:
    program = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("x", flush=True)
time.sleep(300)
"""
    kept = keep(*python(program))
    kept.read(lambda text: "x" in text)
    os.kill(kept.pid, signal.SIGTERM)
    os.kill(kept.pid, signal.SIGINT)
    kept.cut_lifeline()
    assert kept.report("exited")["signal"] == signal.SIGKILL


def test_kill_9_of_the_keeper_takes_the_worker(keep: Keep) -> None:
    kept = keep("/bin/sleep", "300")
    worker = kept.report("started")["pid"]
    os.kill(kept.pid, signal.SIGKILL)
    assert kept.wait() == -signal.SIGKILL
    assert wait_until(lambda: not alive(worker)) < 1.0


def test_a_keeper_whose_parent_is_gone_starts_nothing(keep: Keep) -> None:
    kept = keep("/bin/sleep", "300", parent=1)
    assert kept.wait() == 0
    assert kept.read() == ""
    assert os.read(kept.status, 100) == b""


def test_a_command_that_is_not_there(keep: Keep) -> None:
    kept = keep("/nowhere/worker")
    assert kept.report("exited")["exit_status"] == 127
    assert kept.report("refused")["number"] == 2
    assert "/nowhere/worker can't be started: [Errno 2] No such file" in kept.read()


def test_a_folder_that_is_not_there(keep: Keep) -> None:
    kept = keep("/bin/true", directory="/nowhere")
    refused = kept.report("refused")
    assert (refused["number"], "/nowhere" in refused["message"]) == (2, True)
    assert kept.wait() == 1
    assert "No such file or directory: '/nowhere'" in kept.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_at_any_moment_of_the_start_leaves_nothing(
    keep: Keep, mark: str, number: int
) -> None:
    for delay in range(0, 60, 6):
        kept = keep("/bin/sleep", "300")
        wait_until(lambda due=kept.started_at + delay / 1000: time.monotonic() >= due)  # type: ignore[misc]  # bound early
        os.kill(kept.pid, number)
        kept.wait()
        assert wait_until(lambda: not marked(mark)) < 1.0


# -- confinement ----------------------------------------------------------------------


def test_a_private_folder_lives_as_long_as_the_worker(keep: Keep, tmp_path: Path) -> None:
    private = tmp_path / "private"
    program = """
import os, sys
os.mkdir(os.environ["TMPDIR"] + "/left")
print(os.environ["TMPDIR"], os.environ["HOME"], oct(os.stat(os.environ["TMPDIR"]).st_mode & 0o777))
"""
    kept = keep(*python(program), temporary=str(private))
    assert kept.read().split() == [str(private), str(private), "0o700"]
    kept.report("cleared")
    assert not private.exists()


def test_the_worker_joins_its_group_and_the_group_is_killed(keep: Keep, tmp_path: Path) -> None:
    (tmp_path / "cgroup.kill").touch()
    kept = keep(*python("print(open('cgroup.procs').read())"), group=str(tmp_path),
                directory=str(tmp_path))  # fmt: skip
    assert kept.read().strip() == "0", "the kernel takes 0 for whoever writes it"
    kept.report("cleared")
    assert (tmp_path / "cgroup.kill").read_text() == "1"


def test_without_its_group_the_worker_does_not_start(keep: Keep) -> None:
    kept = keep("/bin/echo", "hello", group="/nowhere")
    text = kept.read()
    assert "hello" not in text
    assert "can't be started" in text
    assert kept.report("exited")["exit_status"] == 127
    assert "/nowhere/cgroup.procs" in kept.report("refused")["message"]


def test_a_confinement_that_fails_lets_nothing_start(keep: Keep) -> None:
    # No kernel has this version of Landlock.
    kept = keep("/bin/echo", "hello", landlock=-1)
    text = kept.read()
    assert "hello" not in text
    assert "can't be started" in text


def test_only_the_worker_is_confined(keep: Keep, tmp_path: Path) -> None:
    version = sandbox.landlock_version()
    program = """
import os
def tried(what):
    try:
        what()
        return "done"
    except OSError as error:
        return type(error).__name__
import socket
print(tried(lambda: os.listdir("/etc")), tried(lambda: socket.socket(socket.AF_INET)))
"""
    kept = keep(
        *python(program),
        landlock=version or 0,
        deny_sockets=sandbox.sockets_deniable(),
        read=["/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix],
        temporary=str(tmp_path / "private"),
        model=str(tmp_path),
    )
    denied = "PermissionError"
    assert kept.read().split() == [
        denied if version else "done",
        denied if sandbox.sockets_deniable() else "done",
    ]
    # Its folder is gone, so the keeper could still remove it.
    kept.report("cleared")
    assert not (tmp_path / "private").exists()
