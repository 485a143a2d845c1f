"""A wall clock that jumps: no timer comes early or late, and nobody is killed for it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from clock_daemon import set_clock
from daemon import Daemon
from patience import until

BACKOFF = 2.0
SETTINGS = f"""
[workers]
backoff_initial = {BACKOFF}
backoff_max = {BACKOFF}
backoff_jitter = 0.0
max_failures = 100
beat_seconds = 0.5
ping_seconds = 0.5
ping_timeout = 0.5
load_stall_seconds = 2.0
good_seconds = 3600.0
"""
HOUR = 3600.0


@pytest.fixture
def clock() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="tursi-clock-"))
    set_clock(folder / "clock", 0.0)
    yield folder / "clock"
    shutil.rmtree(folder)


@pytest.fixture
def running(clock: Path) -> Iterator[Daemon]:
    folder = Path(tempfile.mkdtemp(prefix="tursi-"))
    program = Path(__file__).with_name("clock_daemon.py")
    one = Daemon(folder, scripted=True, settings=SETTINGS, program=program)
    try:
        one.start({"TURSI_TEST_CLOCK": str(clock)})
        yield one
    finally:
        one.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_an_hour_forth_and_back_moves_no_timer_and_kills_nobody(
    running: Daemon, clock: Path
) -> None:
    running.deploy("calm", running.script("calm", echo=True))
    before = running.wait("calm")["workers"][0]
    running.deploy("loads", running.script("loads", load_seconds=2.5 * BACKOFF))
    running.deploy("broken", running.script("broken", exit=3))

    def tries() -> int:
        return int(running.status("broken")["workers"][0]["restarts"])

    def backs_off(number: int) -> bool:
        status = running.status("broken")
        return status["phase"] == "backoff" and tries() == number

    for number, shift in enumerate((HOUR, 0.0, -HOUR)):
        until(lambda number=number: backs_off(number), f"end {number}")  # type: ignore[misc]  # bound early
        began = time.monotonic()
        set_clock(clock, shift)
        until(lambda number=number: tries() > number, "its next try", BACKOFF + 1.0)  # type: ignore[misc]  # bound early
        assert abs(time.monotonic() - began - BACKOFF) < 1.0
        # The daemon has seen the jump.
        event = running.control.get("/events", params={"limit": 1}).json()["events"][0]
        at = datetime.fromisoformat(event["at"]).timestamp()
        assert abs(at - time.time() - shift) < 60
        body = {"model": "calm", "input": "hello"}
        assert running.client.post("/v1/embeddings", json=body).status_code == 200
    after = running.status("calm")["workers"][0]
    assert (after["uuid"], after["restarts"]) == (before["uuid"], 0)
    assert running.wait("loads")["workers"][0]["restarts"] == 0
    kinds = {
        (event["deployment"], event["kind"])
        for event in running.control.get("/events", params={"limit": 1000}).json()["events"]
    }
    assert (
        not {
            (name, f"worker.{phase}")
            for name in ("calm", "loads")
            for phase in ("suspect", "killing", "backoff")
        }
        & kinds
    )
