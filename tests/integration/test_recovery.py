"""How fast a daemon recovers from what kills a part of it, with nothing left of that part."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import psutil
import pytest
from daemon import Daemon, daemon
from patience import until
from processes import marked

SETTINGS = """
[workers]
drain_seconds = 1.0
stop_seconds = 1.0
"""
LOAD_SECONDS = 1.0
ESCAPEES = 5


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon(scripted=True, settings=SETTINGS) as one:
        yield one


def asking(running: Daemon, name: str) -> Callable[[], httpx.Response]:
    """A request that is under way; whoever calls the answer waits for it."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {"model": name, "input": "hello"}
        answers.append(httpx.post(f"{running.url}/v1/embeddings", json=body, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()

    def answer() -> httpx.Response:
        thread.join(60)
        return answers[0]

    until(lambda: running.status(name)["in_flight"], "it is in flight")
    return answer


class Load(threading.Thread):
    """Asks a deployment all the time; ``statuses`` are the answers."""

    def __init__(self, running: Daemon, name: str) -> None:
        super().__init__()
        self.statuses: list[int] = []
        self._running = running
        self._body = {"model": name, "input": "hello"}
        self._ending = threading.Event()
        self.start()

    def run(self) -> None:
        with httpx.Client(base_url=self._running.url, timeout=60) as client:
            while not self._ending.wait(0.01):
                try:
                    answer = client.post("/v1/embeddings", json=self._body)
                except httpx.TransportError:
                    self.statuses.append(0)
                else:
                    self.statuses.append(answer.status_code)

    def end(self) -> set[int]:
        """Ask no more; which answers there were."""
        self._ending.set()
        self.join(60)
        return set(self.statuses)


def events(running: Daemon, name: str) -> list[str]:
    found = running.control.get(f"/deployments/{name}/events", params={"limit": 1000}).json()
    return [event["kind"].removeprefix("worker.") for event in found["events"]]


@pytest.mark.parametrize("victim", ["worker", "keeper"])
def test_what_is_killed_with_a_request_is_back_in_time_and_leaves_nothing(
    running: Daemon, victim: str
) -> None:
    # What has escaped holds stdout, and the worker's data socket is all it has closed.
    model = running.script(victim, echo=True, delay=0.5, load_seconds=LOAD_SECONDS, fork=ESCAPEES)
    running.deploy(victim, model)
    running.deploy("other", running.script("other", echo=True))
    running.wait("other")
    (worker,) = running.wait(victim)["workers"]
    mark = f"TURSI_WORKER={worker['uuid']}"
    assert len(marked(mark)) == 2 + ESCAPEES
    keeper = psutil.Process(worker["pid"]).ppid()
    load = Load(running, "other")
    answer = asking(running, victim)
    killed = time.monotonic()
    os.kill(worker["pid"] if victim == "worker" else keeper, signal.SIGKILL)
    until(lambda: not marked(mark), "nothing carries its uuid", 1.0)
    until(
        lambda: (
            (status := running.status(victim))["ready"] == 1
            and status["workers"][0]["uuid"] != worker["uuid"]
        ),
        "another one is ready",
        LOAD_SECONDS + 2.5 - (time.monotonic() - killed),
    )
    assert answer().status_code == 200
    assert load.end() == {200}
    told = events(running, victim)
    assert told.index("ready") < told.index("settling") < told.index("backoff")
    (crash,) = running.control.get(f"/deployments/{victim}/crashes").json()["crashes"]
    assert crash["failure"] == "external-kill"


def test_a_stop_ends_in_time_whatever_the_worker_does(running: Daemon) -> None:
    running.deploy("deaf", running.script("deaf", ignore_term=True, delay=600, fork=ESCAPEES))
    (worker,) = running.wait("deaf")["workers"]
    answer = asking(running, "deaf")
    asked = time.monotonic()
    assert running.control.post("/deployments/deaf/stop").status_code == 202
    running.wait("deaf", "stopped", 10)
    # Draining and SIGTERM have a second each.
    assert 1.9 < time.monotonic() - asked < 1 + 1 + 0.5 + 0.5
    assert not marked(f"TURSI_WORKER={worker['uuid']}")
    assert answer().status_code in {502, 503}


def test_a_killed_daemon_leaves_nothing_and_the_next_one_has_each_worker_once() -> None:
    with daemon(scripted=True) as running:
        names = ("one", "two", "three")
        for name in names:
            running.deploy(name, running.script(name, echo=True, fork=ESCAPEES))
        for name in names:
            running.wait(name)
        mark = f"TURSI_STATE={running.state}"
        whole = len(names) * (2 + ESCAPEES)
        assert len(marked(mark)) == whole
        loads = [Load(running, name) for name in names]
        until(lambda: all(len(load.statuses) > 10 for load in loads), "all are asked")
        running.kill()
        # The keeper's own test has the tight bound.
        until(lambda: not marked(mark), "all are gone", 3.0)
        running.start()
        for name in names:
            running.wait(name)
        for load in loads:
            count = len(load.statuses)
            until(lambda load=load, count=count: len(load.statuses) > count + 10, "it is asked")  # type: ignore[misc]  # bound early
            assert load.end() <= {200, 0, 503}
            assert set(load.statuses[-5:]) == {200}
        assert len(marked(mark)) == whole


def test_sigterm_while_models_load_ends_in_time_and_leaves_nothing() -> None:
    with daemon(scripted=True, settings="[workers]\nstop_seconds = 2.0\n") as running:
        running.deploy("ready", running.script("ready", echo=True))
        running.wait("ready")
        for name in ("loads", "stalls", "waits"):
            folder = running.script(name, load_seconds=60, fork=1, ignore_term=name == "stalls")
            running.deploy(name, folder)
        for name in ("loads", "stalls"):
            running.wait(name, "loading")
        tree = running.tree()
        asked = time.monotonic()
        assert running.stop(30) == 0
        # With the ten seconds that are the default it would be twelve.
        assert time.monotonic() - asked < 4
        assert not [one for one in tree if one.is_running()]
        assert "Traceback" not in running.log.read_text()


def test_what_there_is_no_memory_for_is_not_tried_again_and_again(running: Daemon) -> None:
    running.deploy("large", running.script("large", fail="out_of_memory:There is no room for it."))
    status = running.wait("large", "backoff")
    assert (status["failure"], status["reason"]) == ("resource", "There is no room for it.")
    # A minute with its jitter.
    wait = datetime.fromisoformat(status["next_try_at"]) - datetime.now(UTC)
    assert 40 < wait.total_seconds() <= 72
    lives: list[Any] = running.control.get("/deployments/large/lives").json()["lives"]
    assert len(lives) == 1
    refused = running.control.delete("/deployments/large")
    assert refused.status_code == 202
