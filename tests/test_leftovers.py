from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from patience import until
from pytest_twisted import ensureDeferred

from twisted.internet import reactor as _reactor
from twisted.internet.task import Clock

from tursi.model import WorkerLife
from tursi.supervision.leftovers import (
    Leftover,
    bury,
    clear_orphans,
    read_boot_id,
    read_start_time,
    sweep,
)

reactor: Any = _reactor
BOOT_ID = read_boot_id()

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def spawn(environment: dict[str, str], program: str = "") -> subprocess.Popen[bytes]:
        text = f"{program}\nprint('up', flush=True)\nimport time; time.sleep(300)"
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", text], env=environment, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.read(2) == b"up"
        return process

    yield spawn
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def life(uuid: str, keeper: int | None = None, start_time: int | None = None) -> WorkerLife:
    return WorkerLife(
        uuid=uuid,
        deployment="mini",
        generation=1,
        replica=0,
        boot_id=BOOT_ID,
        spawned_at=0.0,
        keeper_pid=keeper,
        keeper_start_time=start_time,
    )


def test_start_time_names_a_process() -> None:
    started = read_start_time(os.getpid())
    assert started is not None
    assert started > 0
    assert read_start_time(2**22 + 1) is None


@ensureDeferred
async def test_what_carries_a_mark_is_killed_and_nothing_else(start: Start, tmp_path: Path) -> None:
    ours = start({"TURSI_WORKER": f"{tmp_path}/1"})
    ended = start({"TURSI_WORKER": f"{tmp_path}/2"})
    of_state = start({"TURSI_STATE": str(tmp_path)})
    other_state = start({"TURSI_STATE": f"{tmp_path}-other"})
    plain = start({})
    killed = await sweep(
        reactor, [life(f"{tmp_path}/1")], boot_id=BOOT_ID, state=tmp_path, seconds=10
    )
    assert {each.pid for each in killed} == {ours.pid, of_state.pid}
    assert ours.wait(10) == of_state.wait(10) == -signal.SIGKILL
    assert [each.poll() for each in (ended, other_state, plain)] == [None] * 3


@ensureDeferred
async def test_a_keeper_is_known_by_its_start_time_within_one_boot(
    start: Start, tmp_path: Path
) -> None:
    keepers = [start({}) for _ in range(3)]
    times = [read_start_time(keeper.pid) or 0 for keeper in keepers]
    lives = [
        life("a", keepers[0].pid, times[0]),
        life("b", keepers[1].pid, times[1] - 1),
        life("c", 2**22 + 1, 5),
        life("d"),
    ]
    killed = await sweep(reactor, lives, boot_id=BOOT_ID, state=tmp_path)
    assert killed == [Leftover(keepers[0].pid, times[0])]
    another = [life("e", keepers[2].pid, times[2])]
    assert await sweep(reactor, another, boot_id="another boot", state=tmp_path) == []
    assert keepers[0].wait(10) == -signal.SIGKILL
    assert [keeper.poll() for keeper in keepers[1:]] == [None, None]


@ensureDeferred
async def test_a_stopped_process_goes_with_what_has_cleaned_its_environment(
    start: Start, tmp_path: Path
) -> None:
    program = """
import os, signal, sys
if os.fork() == 0:
    os.setsid()
    os.execve("/bin/sleep", ["/bin/sleep", "300"], {})
"""
    keeper = start({"TURSI_STATE": str(tmp_path)}, program)
    child = _only_child(keeper.pid)
    keeper.send_signal(signal.SIGSTOP)
    killed = await sweep(reactor, [], boot_id=BOOT_ID, state=tmp_path)
    assert {each.pid for each in killed} == {keeper.pid, child}
    assert keeper.wait(10) == -signal.SIGKILL
    until(lambda: _state(child) == "Z", "the child has ended", 10)


def test_the_daemon_and_its_ancestors_are_never_killed(tmp_path: Path) -> None:
    # A user may start the daemon from a shell inside a worker.
    text = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from twisted.internet import reactor
from twisted.internet.defer import ensureDeferred
from tursi.supervision.leftovers import sweep
found = ensureDeferred(sweep(reactor, [], boot_id="", state=Path({str(tmp_path)!r})))
found.addBoth(lambda result: (print(result), reactor.stop()))
reactor.run()
"""
    shell = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {text!r}])"
    done = subprocess.run(
        [sys.executable, "-c", shell],
        env={"TURSI_STATE": str(tmp_path)},
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.decode().strip() == "[]"


@ensureDeferred
async def test_nothing_to_sweep(tmp_path: Path) -> None:
    assert await sweep(reactor, [], boot_id=BOOT_ID, state=tmp_path) == []
    assert await clear_orphans(reactor, str(tmp_path)) == 0


@ensureDeferred
async def test_what_cannot_be_killed_ends_the_sweep_after_its_time(tmp_path: Path) -> None:
    # A folder that looks like /proc, with a process that our kill doesn't reach.
    pid = 2**22 + 7
    folder = tmp_path / str(pid)
    folder.mkdir()
    (folder / "stat").write_text(f"{pid} (a) b) D 1 " + " ".join(map(str, range(5, 40))))
    (folder / "environ").write_bytes(b"A=1\0TURSI_STATE=/state\0")
    before = time.monotonic()
    killed = await sweep(
        reactor, [], boot_id=BOOT_ID, state=Path("/state"), proc=tmp_path, seconds=0.2
    )
    assert killed == [Leftover(pid, 22)]
    assert 0.2 <= time.monotonic() - before < 2


def _only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_the_dead_of_others_are_buried() -> None:
    clock = Clock()
    loop = bury(clock)
    pid = os.posix_spawn("/bin/true", ["true"], {})
    try:
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "it has ended", 30)
        clock.advance(5)
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    finally:
        loop.stop()
