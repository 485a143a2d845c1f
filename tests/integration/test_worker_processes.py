"""Workers on real processes: the monitor, the keeper and a scripted worker."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_twisted
from fakes import RecordedSink, Recorder

from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater

from tursi.config import Requests, Workers
from tursi.model import FailureClass, LoadOrder, Phase
from tursi.supervision.monitor import WorkerMonitor
from tursi.supervision.worker import Worker
from tursi.wire import Ask

reactor: Any = _reactor
SCRIPT = Path(__file__).parent.parent / "scripted_worker.py"
SETTINGS = Workers(
    backoff_initial=0.1,
    drain_seconds=2.0,
    stop_seconds=0.5,
    kill_seconds=2.0,
    load_stall_seconds=1.0,
    spawn_seconds=5.0,
    ping_seconds=0.3,
    ping_timeout=0.2,
)
ASK = Ask("openai.embeddings", "r1", "application/json", 10.0, b'{"input": "hello"}')

Start = Callable[..., Awaitable[Worker]]


class Admitting(Recorder):
    """An observer that admits whoever queues, as the fleet does, in a later turn."""

    def changed(self, worker: Worker, cause: str) -> None:
        super().changed(worker, cause)
        if worker.phase is Phase.QUEUED:
            reactor.callLater(0, worker.admit)


async def until(look: Callable[[], Any], what: str, seconds: float = 10.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await deferLater(reactor, 0.005)
    return found


async def reach(worker: Worker, phase: Phase, seconds: float = 10.0) -> None:
    await until(lambda: worker.phase is phase, f"{phase}; it is {worker.status()}", seconds)


class House:
    """Workers under one monitor; ``observer`` records what they tell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.monitor = WorkerMonitor(reactor)
        self.monitor.startService()
        self.observer = Admitting()
        self.workers: list[Worker] = []

    def start(self, *options: str, python: str = sys.executable, **settings: float) -> Worker:
        values = {name: getattr(SETTINGS, name) for name in SETTINGS.__struct_fields__}
        worker = Worker(
            name=f"echo.{len(self.workers)}",
            deployment="echo",
            replica=len(self.workers),
            generation=1,
            order=LoadOrder(
                "echo",
                str(self.folder),
                beat_seconds=settings.get("beat_seconds", SETTINGS.beat_seconds) / 5,
            ),
            command=(python, "-I", "-u", str(SCRIPT), *options),
            environment={"PATH": os.environ["PATH"]},
            logs=self.folder / "logs",
            settings=Workers(**{**values, **settings}),
            requests=Requests(),
            monitor=self.monitor,
            reactor=reactor,
            random=lambda: 0.5,
            now=time.time,
            observer=self.observer,
        )
        self.workers.append(worker)
        worker.start()
        return worker

    async def close(self) -> None:
        for worker in self.workers:
            await worker.stop()
        await self.monitor.stopService()


@pytest_twisted.async_yield_fixture()
async def house(tmp_path: Path) -> AsyncIterator[House]:
    one = House(tmp_path)
    yield one
    await one.close()


@pytest_twisted.ensureDeferred
async def test_it_becomes_ready_answers_and_stops(house: House) -> None:
    worker = house.start("--echo", "--load-seconds=0.3")
    await reach(worker, Phase.READY)
    assert house.observer.phases[:5] == [
        Phase.QUEUED, Phase.SPAWNING, Phase.LOADING, Phase.WARMING, Phase.READY,
    ]  # fmt: skip
    status = worker.status()
    assert status.rss is not None
    assert status.rss > 1_000_000
    assert status.cpu_seconds is not None
    assert status.cpu_seconds > 0
    assert (status.task, status.device, status.restarts) == ("feature-extraction", "cpu", 0)
    sinks = [RecordedSink() for _ in range(100)]
    for sink in sinks:
        worker.submit(ASK, sink)
    assert worker.in_flight == 100
    assert worker.queued_bytes == 100 * len(ASK.body)
    await until(lambda: all(sink.done for sink in sinks), "all are answered")
    assert {bytes(sink.data) for sink in sinks} == {ASK.body}
    assert (worker.in_flight, worker.queued_bytes) == (0, 0)
    pid = status.pid
    assert pid is not None
    await worker.stop()
    assert worker.phase is Phase.STOPPED
    assert not psutil.pid_exists(pid)
    life = house.observer.lives[worker.uuid]
    assert (life.worker_pid, life.intent, life.failure) == (pid, "stop", None)
    assert life.ready_at is not None
    assert life.ended_at is not None
    assert "scripted worker" in (house.folder / "logs" / f"{worker.uuid}.log").read_text()


@pytest_twisted.ensureDeferred
async def test_large_bodies_pass_both_ways(house: House) -> None:
    worker = house.start("--echo")
    await reach(worker, Phase.READY)
    sinks = [RecordedSink() for _ in range(4)]
    body = os.urandom(8 * 1024 * 1024)
    for sink in sinks:
        worker.submit(asking(body), sink)
    await until(lambda: all(sink.done for sink in sinks), "all are answered", 20)
    assert all(bytes(sink.data) == body for sink in sinks)


def asking(body: bytes) -> Ask:
    return ASK._replace(body=body)


@pytest_twisted.ensureDeferred
async def test_a_stream_arrives_in_pieces_and_can_be_cancelled(house: House) -> None:
    worker = house.start("--stream=5", "--interval=0.01")
    endless = house.start("--stream=100000", "--interval=0.01")
    await reach(worker, Phase.READY)
    await reach(endless, Phase.READY)
    whole, cut = RecordedSink(), RecordedSink()
    worker.submit(ASK, whole)
    id_ = endless.submit(ASK, cut)
    await until(lambda: whole.done, "the stream ends")
    assert whole.pieces == [b"data: %d\n\n" % number for number in range(5)]
    await until(lambda: len(cut.pieces) > 2, "the other has begun")
    endless.cancel(id_)
    assert endless.in_flight == 0
    had = len(cut.pieces)
    await deferLater(reactor, 0.1)
    assert len(cut.pieces) == had
    assert not cut.done
    assert endless.phase is Phase.READY


@pytest_twisted.ensureDeferred
async def test_kill_9_fails_what_is_in_flight_at_once_and_it_comes_back(house: House) -> None:
    worker = house.start("--delay=60")
    await reach(worker, Phase.READY)
    sinks = [RecordedSink() for _ in range(3)]
    for sink in sinks:
        worker.submit(ASK, sink)
    await deferLater(reactor, 0.05)
    first, pid = worker.uuid, worker.status().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: all(sink.errors for sink in sinks), "they fail", 1)
    assert {error.code for sink in sinks for error in sink.errors} == {"worker_lost"}
    assert sinks[0].errors[0].reference == first
    await reach(worker, Phase.BACKOFF)
    assert worker.status().reason == "killed by signal 9 (SIGKILL) from outside"
    assert worker.status().failure is FailureClass.EXTERNAL_KILL
    assert worker.status().next_try_at is not None
    await reach(worker, Phase.READY)
    assert worker.uuid != first
    assert worker.status().restarts == 1
    life = house.observer.lives[first]
    assert (life.signal, life.intent) == (9, None)
    assert life.peak_rss is not None


@pytest_twisted.ensureDeferred
async def test_stop_drains(house: House) -> None:
    worker = house.start("--echo", "--delay=0.3")
    await reach(worker, Phase.READY)
    sink = RecordedSink()
    worker.submit(ASK, sink)
    stopped = worker.stop()
    assert Phase.DRAINING in house.observer.phases
    await stopped
    assert sink.done
    assert bytes(sink.data) == ASK.body
    assert worker.phase is Phase.STOPPED


@pytest_twisted.ensureDeferred
async def test_what_ignores_sigterm_and_what_has_escaped_is_killed(house: House) -> None:
    worker = house.start("--ignore-term", "--fork=3")
    await reach(worker, Phase.READY)
    keeper = house.observer.lives[worker.uuid].keeper_pid
    assert keeper is not None
    tree = psutil.Process(keeper).children(recursive=True)
    assert len(tree) == 4
    began = time.monotonic()
    await worker.stop()
    assert 0.5 <= time.monotonic() - began < 2
    assert not [process for process in tree if process.is_running()]
    assert house.observer.lives[worker.uuid].intent == "stop"


@pytest_twisted.ensureDeferred
async def test_restart_comes_back_without_counting_a_failure(house: House) -> None:
    worker = house.start("--echo")
    await reach(worker, Phase.READY)
    first = worker.uuid
    worker.restart()
    await until(lambda: worker.uuid != first and worker.phase is Phase.READY, "it is back")
    assert Phase.BACKOFF not in house.observer.phases
    assert house.observer.lives[first].intent == "restart"


FATES: dict[str, tuple[list[str], dict[str, Any], Phase, FailureClass, str]] = {
    "never-says-hello": (
        ["--no-hello"],
        {"spawn_seconds": 0.6},
        Phase.BACKOFF,
        FailureClass.TRANSIENT,
        "the worker didn't say hello within 0.6 s",
    ),
    "stalls": (
        ["--stall"],
        {"load_stall_seconds": 0.3},
        Phase.BACKOFF,
        FailureClass.HUNG,
        "loading made no progress for 0.3 s",
    ),
    "other-version": (
        ["--protocol=99"],
        {},
        Phase.FAILED,
        FailureClass.PROTOCOL,
        "the worker speaks version 99 of the protocol and the daemon version 1",
    ),
    "garbage": (
        ["--garbage"],
        {},
        Phase.BACKOFF,
        FailureClass.PROTOCOL,
        "the worker broke the protocol: a frame announces 1213486160 bytes",
    ),
    "frame-of-2-gigabytes": (
        [f"--announce={2**31}"],
        {},
        Phase.BACKOFF,
        FailureClass.PROTOCOL,
        "the worker broke the protocol: a frame announces 2147483648 bytes",
    ),
    "closes-its-socket": (
        ["--close"],
        {"stop_seconds": 0.3},
        Phase.BACKOFF,
        FailureClass.PROTOCOL,
        "the worker closed its data socket without ending",
    ),
    "says-why": (
        ["--fail=weights_corrupt:The weights are damaged."],
        {},
        Phase.FAILED,
        FailureClass.WEIGHTS,
        "The weights are damaged.",
    ),
    "no-memory": (
        ["--fail=out_of_memory:There is no room for it."],
        {},
        Phase.BACKOFF,
        FailureClass.RESOURCE,
        "There is no room for it.",
    ),
    "crashes": (
        ["--signal=11"],
        {},
        Phase.BACKOFF,
        FailureClass.CRASH,
        "crashed with signal 11 (SIGSEGV)",
    ),
    "exits": (
        ["--exit=0"],
        {},
        Phase.BACKOFF,
        FailureClass.TRANSIENT,
        "the worker ended by itself with exit status 0",
    ),
    "too-slow": (
        ["--load-seconds=60"],
        {"load_seconds": 0.6},
        Phase.BACKOFF,
        FailureClass.HUNG,
        "loading took longer than 0.6 s",
    ),
}


@pytest.mark.parametrize("fate", FATES)
@pytest_twisted.ensureDeferred
async def test_every_bad_start_is_a_state_with_its_reason(house: House, fate: str) -> None:
    options, settings, phase, failure, reason = FATES[fate]
    worker = house.start(*options, **{"backoff_initial": 30.0, **settings})
    await reach(worker, phase)
    status = worker.status()
    assert status.failure is failure
    assert status.reason is not None
    assert status.reason.startswith(reason)
    life = house.observer.lives[worker.uuid]
    assert (life.failure, life.reason) == (failure, status.reason)
    assert life.worker_pid is not None
    assert not psutil.pid_exists(life.worker_pid)


@pytest_twisted.ensureDeferred
async def test_a_program_that_is_not_there_is_the_hosts_fault(house: House) -> None:
    worker = house.start()
    await reach(worker, Phase.READY)
    missing = house.start(python="/nonexistent/python")
    await reach(missing, Phase.BACKOFF)
    assert missing.status().failure is FailureClass.HOST
    assert worker.phase is Phase.READY


@pytest_twisted.ensureDeferred
async def test_crashes_in_a_row_end_in_quarantine_and_reset_leads_out(house: House) -> None:
    worker = house.start("--exit=3", backoff_initial=0.02, max_failures=3)
    await reach(worker, Phase.QUARANTINED)
    assert worker.status().reason == (
        "the worker ended by itself with exit status 3 (3 failures in a row)"
    )
    assert worker.status().restarts == 2
    first = worker.uuid
    worker.reset()
    await until(lambda: worker.uuid != first, "it tries again")
    await worker.stop()
    assert worker.phase is Phase.STOPPED


@pytest_twisted.ensureDeferred
async def test_options_come_from_the_models_folder(house: House) -> None:
    (house.folder / "scripted.json").write_text('{"fail": "model_refused:It is a pickle."}')
    worker = house.start("--echo")
    await reach(worker, Phase.FAILED)
    assert (worker.status().reason, worker.status().failure) == (
        "It is a pickle.",
        FailureClass.REFUSED,
    )
