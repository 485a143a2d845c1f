from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import alive, escapees, marked, wait_until, zombies
from pytest_twisted import ensureDeferred
from small_daemon import ProgramChild, program

from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater

from tursi.supervision.life import Exit
from tursi.supervision.logs import LifeLog, tail
from tursi.supervision.monitor import WorkerMonitor
from tursi.supervision.oneshot import OneShot
from tursi.wire import Frame

reactor: Any = _reactor
SLEEP = program("import time; time.sleep(300)")
DAEMON = Path(__file__).with_name("small_daemon.py")


async def until(condition: Callable[[], object], seconds: float = 15.0) -> float:
    """Let the reactor run until ``condition()``; how many seconds that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "waited in vain"
        await deferLater(reactor, 0.002)
    return time.monotonic() - start


@asynccontextmanager
async def monitoring(kill_time: float = 1.0) -> AsyncIterator[WorkerMonitor]:
    monitor = WorkerMonitor(reactor, kill_time=kill_time)
    monitor.startService()
    try:
        yield monitor
    finally:
        await monitor.stopService()


@ensureDeferred
async def test_a_killed_worker_is_reported_and_comes_back(tmp_path: Path) -> None:
    async with monitoring() as monitor:
        child = ProgramChild("one", tmp_path, program(escapees(2)))
        monitor.addChild(child)
        await until(lambda: _said(child, "escaped"))
        killed_at = time.monotonic()
        os.kill(child.pids[0], signal.SIGKILL)
        await until(lambda: len(child.pids) == 2)
        ended_at, end = child.exits[0]
        assert (end.signal, end.exit_status, end.reported) == (signal.SIGKILL, None, True)
        assert end.worker_pid == child.pids[0]
        assert end.tree == "killed 2"
        assert (end.peak_rss or 0) > 5_000_000
        assert ended_at - killed_at < 1.0
    assert not marked(f"TURSI_STATE={tmp_path}")
    assert len(child.exits) == 2


@ensureDeferred
async def test_stopping_waits_even_for_a_worker_that_ignores_sigterm(tmp_path: Path) -> None:
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True)\n"
    async with monitoring(kill_time=0.5) as monitor:
        child = ProgramChild("one", tmp_path, program(stubborn + "import time; time.sleep(300)"))
        monitor.addChild(child)
        await until(lambda: _said(child, "deaf"))
        asked_at = time.monotonic()
        await monitor.stopService()
        assert not marked(f"TURSI_STATE={tmp_path}")
        assert 0.5 <= time.monotonic() - asked_at < 1.5
        assert child.exits[0][1].signal == signal.SIGKILL


@ensureDeferred
async def test_terminate_and_kill(tmp_path: Path) -> None:
    polite = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: sys.exit(4)); print('ready', flush=True); time.sleep(300)"
    )
    async with monitoring() as monitor:
        child = ProgramChild("one", tmp_path, program(polite))
        monitor.addChild(child)
        await until(lambda: _said(child, "ready"))
        monitor.terminate("one")
        await until(lambda: child.exits)
        assert child.exits[0][1].exit_status == 4
        await until(lambda: len(child.pids) == 2)
        os.kill(child.lives[1].keeper_pid, signal.SIGSTOP)
        monitor.kill("one")
        await until(lambda: len(child.exits) == 2)
        assert child.exits[1][1].signal == signal.SIGKILL
        await monitor.removeProcess("one")
        assert not marked(f"TURSI_STATE={tmp_path}")


@ensureDeferred
async def test_an_escapee_that_holds_stdout_delays_nothing(tmp_path: Path) -> None:
    # It cleans its environment and outlives its keeper; this process is no
    # subreaper, so nothing of ours can find it.
    text = """
import os, sys, time
print("a partial line", end="", flush=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execve("/bin/sleep", ["/bin/sleep", "300"], {})
    os._exit(0)
os.wait()
time.sleep(300)
"""
    async with monitoring() as monitor:
        child = ProgramChild("one", tmp_path, program(text))
        monitor.addChild(child)
        await until(lambda: child.pids)
        keeper = child.lives[0].keeper_pid
        await until(lambda: len(_children(keeper)) == 2)
        (escapee,) = set(_children(keeper)) - set(child.pids)
        child.arguments = SLEEP
        try:
            os.kill(keeper, signal.SIGKILL)
            assert await until(lambda: len(child.pids) == 2) < 1.0
            assert alive(escapee)
            assert not child.exits[0][1].reported
            assert child.exits[0][1].worker_pid == child.pids[0]
            assert tail(child.logs[0], 9)[-1].endswith("out a partial line")
        finally:
            os.kill(escapee, signal.SIGKILL)


@ensureDeferred
async def test_a_long_line_without_an_end_kills_nobody(tmp_path: Path) -> None:
    text = """
import sys, time
for step in range(5000):
    sys.stderr.write("\\r%5d/5000" % step)
    sys.stdout.write("x" * 20)
sys.stdout.flush()
sys.exit(9)
"""
    async with monitoring() as monitor:
        child = ProgramChild("one", tmp_path, program(text))
        child.delay = None
        monitor.addChild(child)
        await until(lambda: child.exits)
        assert child.exits[0][1].exit_status == 9
        lines = child.logs[0].read_text().splitlines()
        assert len(lines) == 2
        assert any(line.endswith("err  4999/5000") for line in lines)
        assert any(line.endswith("xxx [cut]") for line in lines)


@ensureDeferred
async def test_the_last_words_are_never_lost(tmp_path: Path) -> None:
    text = "import os; os.write(2, b'x' * 60 + b'\\n' + b'last words\\n'); os.kill(os.getpid(), 11)"
    async with monitoring() as monitor:
        children = [ProgramChild(f"child{each}", tmp_path, program(text)) for each in range(4)]
        for child in children:
            monitor.addChild(child)
        await until(lambda: all(len(child.exits) >= 8 for child in children), 30)
    for child in children:
        for number, (_, end) in enumerate(child.exits[:8]):
            assert end.signal == signal.SIGSEGV
            assert child.logs[number].read_text().endswith("err last words\n")


@ensureDeferred
async def test_a_spawn_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    monitor = WorkerMonitor(reactor)
    good = [ProgramChild(name, tmp_path, SLEEP) for name in ("a", "c")]
    bad = ProgramChild("b", tmp_path, ("/bin/sh", "a\0b"))
    bad.delay = None
    before = _descriptors()
    for child in (good[0], bad, good[1]):
        monitor.addChild(child)
    monitor.startService()
    try:
        await until(lambda: all(child.pids for child in good))
        assert isinstance(bad.failures[0], ValueError)
    finally:
        await monitor.stopService()
    await until(lambda: _descriptors() == before)


@ensureDeferred
async def test_hundreds_of_lives_leave_no_descriptor_and_no_zombie(tmp_path: Path) -> None:
    async with monitoring() as monitor:
        children = [ProgramChild(f"child{each}", tmp_path, ("/bin/true",)) for each in range(4)]
        for child in children:
            monitor.addChild(child)
        await until(lambda: all(len(child.exits) >= 2 for child in children))
        open_descriptors = []
        for lives in (10, 60):
            for child in children:
                child.delay = 0.0
                monitor.startProcess(child.name)
            await until(lambda: all(len(child.exits) >= lives for child in children), 60)  # noqa: B023 - awaited here
            for child in children:
                child.delay = None
            await until(lambda: not monitor.protocols and not monitor.restart)
            await deferLater(reactor, 0.05)
            open_descriptors.append(_descriptors())
        assert open_descriptors[0] == open_descriptors[1]
        assert not zombies(os.getpid())
    for child in children:
        assert all((end.exit_status, end.reported) == (0, True) for _, end in child.exits)


# -- the one-shot ---------------------------------------------------------------


def _log(folder: Path) -> LifeLog:
    return LifeLog(folder / "fetcher.log", clock=time.time, size=100_000, rate=100_000)


@ensureDeferred
async def test_a_one_shot_hands_over_its_frames_and_its_end(tmp_path: Path) -> None:
    text = """
import os, struct
for number in range(200):
    body = b"x" * 4000
    os.write(3, struct.pack(">IBQ", 9 + len(body), 17, number) + body)
print("done")
raise SystemExit(5)
"""
    frames: list[Frame] = []
    end = await OneShot(reactor).run("f", program(text), {}, frames.append, _log(tmp_path)).finished
    assert end.exit_status == 5
    assert [frame.id for frame in frames] == list(range(200))
    assert all(len(frame.body) == 4000 for frame in frames)
    assert tail(tmp_path / "fetcher.log", 9)[-1].endswith("out done")


@ensureDeferred
async def test_a_cancelled_one_shot_is_gone_with_its_tree(tmp_path: Path) -> None:
    frames: list[Frame] = []
    environment = {"TURSI_STATE": str(tmp_path)}
    log = _log(tmp_path)
    running = OneShot(reactor).run("f", program(escapees(3)), environment, frames.append, log)
    await until(lambda: tail(tmp_path / "fetcher.log", 1))
    running.cancel()
    running.cancel()
    end: Exit = await running.finished
    assert (end.signal, end.tree) == (signal.SIGKILL, "killed 3")
    assert not marked(f"TURSI_STATE={tmp_path}")
    running.cancel()


@ensureDeferred
async def test_a_one_shot_that_breaks_the_protocol_is_ended(tmp_path: Path) -> None:
    text = "import os, time; os.write(3, b'\\xff' * 100); time.sleep(300)"
    end = await OneShot(reactor).run("f", program(text), {}, print, _log(tmp_path)).finished
    assert end.signal == signal.SIGKILL


@ensureDeferred
async def test_a_one_shot_that_cannot_start_says_so(tmp_path: Path) -> None:
    running = OneShot(reactor).run("f", ("/bin/sh", "a\0b"), {}, print, _log(tmp_path))
    with pytest.raises(ValueError, match="null"):
        await running.finished


# -- a daemon of its own, and its violent end -----------------------------------


class SmallDaemon:
    """That daemon, and what it prints."""

    def __init__(self, folder: Path, text: str, count: int) -> None:
        self.mark = f"TURSI_STATE={folder}"
        self.process = subprocess.Popen(
            [sys.executable, str(DAEMON), str(folder), text, str(count)],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.folder = folder
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._events.put(json.loads(line))

    def event(self, kind: str) -> dict[str, Any]:
        """The next event of that kind."""
        while True:
            event = self._events.get(timeout=15)
            if event["event"] == kind:
                return event

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[..., SmallDaemon]]:
    started: list[SmallDaemon] = []

    def start(text: str, count: int = 1) -> SmallDaemon:
        started.append(SmallDaemon(tmp_path, text, count))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        for pid in marked(each.mark):
            os.kill(pid, signal.SIGKILL)


def test_kill_9_of_the_daemon_leaves_nothing(daemon: Callable[..., SmallDaemon]) -> None:
    small = daemon(escapees(5), 3)
    wait_until(lambda: len(marked(small.mark)) == 3 * (1 + 1 + 5))
    small.process.kill()
    assert wait_until(lambda: not marked(small.mark)) < 1.0


def test_kill_9_of_the_daemon_right_after_a_spawn_leaves_nothing(
    daemon: Callable[..., SmallDaemon],
) -> None:
    for delay in range(0, 60, 12):
        small = daemon(escapees(2))
        small.event("spawned")
        due = time.monotonic() + delay / 1000
        wait_until(lambda due=due: time.monotonic() >= due)  # type: ignore[misc]  # bound early
        small.kill()
        assert wait_until(lambda: not marked(small.mark)) < 1.0  # noqa: B023 - called at once


def test_kill_9_of_a_keeper_leaves_nothing_of_its_life(daemon: Callable[..., SmallDaemon]) -> None:
    # The escapees clean their environment: only the adoption finds them.
    clean = "os.execve('/bin/sleep', ['/bin/sleep', '314159'], {})"
    small = daemon(escapees(5).replace("time.sleep(300)", clean, 1))
    for _ in range(3):
        spawned = small.event("spawned")
        small.event("started")
        wait_until(lambda: _count("/bin/sleep\x00314159\x00") == 5)
        os.kill(spawned["keeper"], signal.SIGKILL)
        mark = f"TURSI_WORKER={spawned['uuid']}"
        assert wait_until(lambda: not marked(mark)) < 1.0  # noqa: B023 - called at once
        end = small.event("exited")
        assert not end["reported"]
        assert end["tree"].endswith("after the keeper had died")
        assert not zombies(small.process.pid)
    small.kill()
    assert wait_until(lambda: _count("/bin/sleep\x00314159\x00") == 0) < 1.0


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def _count(command: str) -> int:
    found = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "cmdline").read_text() == command:
                found += 1
        except OSError:
            continue
    return found


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _said(child: ProgramChild, text: str) -> bool:
    return bool(child.logs) and any(text in line for line in tail(child.logs[0], 9))
