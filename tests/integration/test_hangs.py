"""Hung workers on real processes: found, asked where they stand, killed and replaced."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from daemon import Daemon, daemon
from fakes import RecordedSink
from minilm import minilm_folder
from patience import until as wait
from processes import alive
from test_worker_processes import ASK, House, reach, until

from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater

from tursi.model import FailureClass, Phase
from tursi.supervision.stacks import QUIET_SECONDS
from tursi.supervision.worker import Worker

reactor: Any = _reactor
FAST: dict[str, Any] = {
    "beat_seconds": 0.5,
    "ping_seconds": 5.0,
    "ping_timeout": 5.0,
    "backoff_initial": 30.0,
}
SUSPECT_AFTER, HUNG_AFTER = 0.5, 1.5
SLACK = 1.0
"""Seconds for two observations and a busy machine."""


@pytest_twisted.async_yield_fixture()
async def house(tmp_path: Path) -> AsyncIterator[House]:
    one = House(tmp_path)
    yield one
    await one.close()


async def hang(house: House, worker: Worker) -> tuple[RecordedSink, float]:
    """Have the second request hang it; its sink, and when."""
    await reach(worker, Phase.READY)
    first, second = RecordedSink(), RecordedSink()
    worker.submit(ASK, first)
    await until(lambda: first.done, "the first is answered")
    # It beats for a while: nothing is found before there is something.
    await deferLater(reactor, 2 * SUSPECT_AFTER)
    assert worker.phase is Phase.READY
    assert Phase.SUSPECT not in house.observer.phases
    worker.submit(ASK, second)
    return second, time.monotonic()


FATES = {
    # Woken to be examined, its main thread may leave the place before the
    # handler runs; that every thread is shown is what can be counted on.
    "stop": ("its heartbeat has stood still for ", "<module>"),
    "gil": ("its heartbeat has stood still for ", "misbehave"),
    "nogil": (
        "its batch has neither come further nor used the processor for ",
        "hang_blocked",
    ),
    "spin": ("its batch has come no further for ", "hang_computing"),
}


@pytest.mark.parametrize("how", FATES)
@pytest_twisted.ensureDeferred
async def test_each_kind_of_hang_is_found_and_tells_where_it_stands(house: House, how: str) -> None:
    reason, frame = FATES[how]
    worker = house.start(f"--hang={how}", "--at=2", "--echo", first_seconds=1.0, **FAST)
    sink, began = await hang(house, worker)
    uuid = worker.uuid
    await reach(worker, Phase.SUSPECT)
    assert time.monotonic() - began < max(SUSPECT_AFTER, 1.0 if how == "spin" else 0) + SLACK
    await reach(worker, Phase.KILLING)
    assert time.monotonic() - began < HUNG_AFTER + SLACK
    await reach(worker, Phase.BACKOFF)
    assert time.monotonic() - began < HUNG_AFTER + QUIET_SECONDS + 2 * SLACK
    status = worker.status()
    assert status.failure is FailureClass.HUNG
    assert status.reason is not None
    assert status.reason.startswith(reason)
    # What stood still goes on to be examined, and may just have answered.
    lost = [error.code for error in sink.errors] == ["worker_lost"]
    assert lost or (sink.done and how in {"stop", "gil"})
    life = house.observer.lives[uuid]
    assert (life.intent, life.failure) == ("hung", FailureClass.HUNG)
    log = (house.folder / "logs" / f"{uuid}.log").read_text()
    assert " (most recent call first):" in log
    assert f" in {frame}" in log


@pytest_twisted.ensureDeferred
async def test_a_load_that_stalls_tells_where_it_stands(house: House) -> None:
    worker = house.start("--stall", load_stall_seconds=0.5, **FAST)
    await reach(worker, Phase.BACKOFF)
    assert worker.status().failure is FailureClass.HUNG
    log = (house.folder / "logs" / f"{worker.uuid}.log").read_text()
    assert " in run" in log


@pytest_twisted.ensureDeferred
async def test_what_can_not_tell_is_killed_after_three_seconds(house: House) -> None:
    worker = house.start("--mute", "--hang=stop", "--at=2", "--echo", **FAST)
    _, began = await hang(house, worker)
    await reach(worker, Phase.BACKOFF)
    assert 3 < time.monotonic() - began < HUNG_AFTER + 3 + 2 * SLACK
    assert worker.status().failure is FailureClass.HUNG


@pytest_twisted.ensureDeferred
async def test_a_worker_that_goes_on_in_time_is_saved(house: House) -> None:
    worker = house.start("--echo", beat_misses=20, **{**FAST, "ping_timeout": 20.0})
    await reach(worker, Phase.READY)
    pid, uuid = worker.status().pid, worker.uuid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await reach(worker, Phase.SUSPECT)
    os.kill(pid, signal.SIGCONT)
    await reach(worker, Phase.READY)
    assert worker.uuid == uuid


@pytest_twisted.ensureDeferred
async def test_honest_work_is_never_suspect(house: House) -> None:
    loading = house.start("--load-seconds=4", load_stall_seconds=1.0, **FAST)
    generating = house.start("--stream=8", "--interval=0.4", step_seconds=1.0, **FAST)
    await reach(generating, Phase.READY)
    sink = RecordedSink()
    generating.submit(ASK, sink)
    await until(lambda: sink.done, "the stream ends")
    await reach(loading, Phase.READY)
    assert not {Phase.SUSPECT, Phase.KILLING} & set(house.observer.phases)


SMALL = """
[workers]
beat_seconds = 0.4
ping_seconds = 0.5
ping_timeout = 0.5
load_stall_seconds = 1.0
"""


def test_a_stopped_daemon_kills_nobody_when_it_goes_on() -> None:
    with daemon(scripted=True, settings=SMALL) as running:
        running.deploy("idle", running.script("idle", echo=True))
        running.deploy("loads", running.script("loads", load_seconds=12))
        before = running.wait("idle")["workers"][0]
        wait(lambda: running.status("loads")["phase"] == "loading", "it loads")
        assert running.process is not None
        # Ten times as long as every window; what it loads takes longer than the stall.
        running.process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        running.process.send_signal(signal.SIGCONT)
        time.sleep(2)
        after = running.wait("idle")["workers"][0]
        assert (after["uuid"], after["restarts"]) == (before["uuid"], 0)
        loaded = running.wait("loads")["workers"][0]
        assert loaded["restarts"] == 0
        kinds = [event["kind"] for event in running.control.get("/events").json()["events"]]
        assert "worker.suspect" not in kinds
        assert "worker.killing" not in kinds


def answers(running: Daemon) -> bool:
    answer = running.client.post("/v1/embeddings", json={"model": "minilm", "input": "hello"})
    return answer.status_code == 200


def test_a_stopped_model_is_found_and_replaced_with_default_settings() -> None:
    with daemon() as running:
        running.deploy("minilm", minilm_folder())
        began = time.monotonic()
        before = running.wait("minilm")["workers"][0]
        loading = time.monotonic() - began
        assert answers(running)
        os.kill(before["pid"], signal.SIGSTOP)
        stopped = time.monotonic()
        running.wait("minilm", "suspect", 10)
        wait(lambda: not alive(before["pid"]), "it is killed", 25 - (time.monotonic() - stopped))
        after = running.wait("minilm", seconds=25 + 2 * loading + 5)["workers"][0]
        assert after["uuid"] != before["uuid"]
        assert answers(running)
        (life,) = (
            life
            for life in running.control.get("/deployments/minilm/lives").json()["lives"]
            if life["uuid"] == before["uuid"]
        )
        assert (life["failure"], life["intent"]) == ("hung", "hung")
        log = (running.state / "workers" / "minilm" / f"{before['uuid']}.log").read_text()
        assert "scheduler.py" in log
