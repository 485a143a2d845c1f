"""Whatever changes what is in memory is interrupted at each of its stages.

A few of all combinations are tried by default, and all of them with TURSI_TEST_MATRIX=all
(``make faults``).
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from daemon import Daemon, daemon
from patience import gone, until

GIB = 2**30
SETTINGS = f"""
[workers]
backoff_initial = 0.2
backoff_max = 0.5
max_failures = 50
drain_seconds = 10.0
stop_seconds = 2.0
[memory]
limit_bytes = {4 * GIB}
reserve_bytes = 0
min_residency_seconds = 0.1
max_wait_seconds = 1.0
[requests]
load_wait_seconds = 40.0
"""
HELLO = {"TURSI_TEST_HELLO": "0.4"}
SLOW = {"load_seconds": 0.6, "warm_seconds": 0.5}
"""So that each stage of a load lasts long enough to be met."""
ANSWER_SECONDS = 3.0
"""So that draining does, too."""
LOADS = ("spawning", "loading", "warming")


class Case(NamedTuple):
    """What is going on, how far it has come, and what happens then."""

    change: str
    stage: str
    fault: str

    def __str__(self) -> str:
        return "-".join(self).replace(" ", "-")


class Stand:
    """A deployment in the midst of a change, and who asks it meanwhile."""

    def __init__(self, running: Daemon, name: str) -> None:
        self.running = running
        self.name = name
        self.model = ""
        """What is to be served in the end."""
        self.answers: list[int] = []
        self._threads: list[threading.Thread] = []

    def folder(self, number: int, **options: Any) -> str:
        folder = self.running.script(f"{self.name}-{number}", **{"echo": True, **options})
        return str(folder)

    def large(self, number: int, **options: Any) -> str:
        folder = self.folder(number, **options)
        with Path(folder, "model.safetensors").open("r+b") as file:
            file.truncate(int(1.5 * GIB))
        return folder

    def deploy(self, model: str, **fields: Any) -> None:
        self.running.deploy(self.name, model, **fields)
        self.model = model

    def post(self, what: str, **body: Any) -> None:
        path = f"/deployments/{self.name}/{what}"
        answer = self.running.control.post(path, json=body)
        assert answer.status_code in {200, 202}, answer.text

    def ask(self, name: str = "") -> int:
        body = {"model": name or self.name, "input": "hello"}
        try:
            answer = httpx.post(f"{self.running.url}/v1/embeddings", json=body, timeout=60)
        except httpx.TransportError:
            return 0
        return answer.status_code

    def ask_meanwhile(self, name: str = "") -> None:
        thread = threading.Thread(target=lambda: self.answers.append(self.ask(name)))
        thread.start()
        self._threads.append(thread)

    def busy(self) -> None:
        """Have a request under way."""
        self.ask_meanwhile()
        until(lambda: self.running.status(self.name)["in_flight"], "it is in flight")

    def answered(self) -> set[int]:
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "a request waits for ever"
        return set(self.answers)


# -- changes: each begins, and leaves in ``model`` what is to come of it


def up(stand: Stand) -> None:
    stand.deploy(stand.folder(1, **SLOW))


def rollout(stand: Stand) -> None:
    stand.deploy(stand.folder(1, delay=ANSWER_SECONDS))
    stand.running.wait(stand.name)
    stand.busy()
    stand.deploy(stand.folder(2, **SLOW))


def rollback(stand: Stand) -> None:
    first = stand.folder(1)
    for model in (first, stand.folder(2, delay=ANSWER_SECONDS)):
        stand.deploy(model)
        stand.running.wait(stand.name)
    stand.folder(1, **SLOW)
    stand.busy()
    stand.post("rollback")
    stand.model = first


def removal(stand: Stand) -> None:
    stand.deploy(stand.folder(1, delay=ANSWER_SECONDS))
    stand.running.wait(stand.name)
    stand.busy()
    assert stand.running.control.delete(f"/deployments/{stand.name}").status_code == 202
    stand.model = ""


def unload(stand: Stand) -> None:
    stand.deploy(stand.folder(1, delay=ANSWER_SECONDS), load="on_demand", keep_alive=-1)
    stand.running.wait(stand.name)
    stand.busy()
    stand.post("unload")


def eviction(stand: Stand) -> None:
    other = Stand(stand.running, stand.name + "-other")
    other.deploy(other.large(1), load="on_demand", keep_alive=-1)
    stand.running.wait(other.name)
    # Loaded at first too, for which the other one makes room.
    stand.deploy(stand.large(1, **SLOW), load="on_demand", keep_alive=-1)
    stand.ask_meanwhile()


def scale_down(stand: Stand) -> None:
    stand.deploy(stand.folder(1, delay=ANSWER_SECONDS), replicas=2)
    stand.running.wait(stand.name)
    for _ in range(2):
        stand.ask_meanwhile()
    until(lambda: stand.running.status(stand.name)["in_flight"] == 2, "both are at it")
    stand.post("scale", replicas=1)


CHANGES: dict[str, tuple[Callable[[Stand], None], tuple[str, ...]]] = {
    "up": (up, (*LOADS, "ready")),
    "rollout": (rollout, (*LOADS, "draining")),
    "rollback": (rollback, (*LOADS, "draining")),
    "removal": (removal, ("draining",)),
    "unload": (unload, ("draining",)),
    "eviction": (eviction, LOADS),
    "scale down": (scale_down, ("draining",)),
}


# -- faults


def kill_worker(running: Daemon, worker: dict[str, Any]) -> None:
    with suppress(ProcessLookupError):
        os.kill(worker["pid"], signal.SIGKILL)


def kill_keeper(running: Daemon, worker: dict[str, Any]) -> None:
    with suppress(psutil.NoSuchProcess):
        keeper = psutil.Process(worker["pid"]).parent()
        assert keeper is not None
        assert "keeper" in " ".join(keeper.cmdline()), keeper
        keeper.kill()


def kill_daemon(running: Daemon, worker: dict[str, Any]) -> None:
    running.kill()
    until(lambda: not running.tree(), "nothing is left of it", 10)
    running.start(HELLO)


def end_daemon(running: Daemon, worker: dict[str, Any]) -> None:
    assert running.stop() == 0
    assert not running.tree()
    running.start(HELLO)


FAULTS: dict[str, Callable[[Daemon, dict[str, Any]], None]] = {
    "worker killed": kill_worker,
    "keeper killed": kill_keeper,
    "daemon killed": kill_daemon,
    "daemon ended": end_daemon,
}
EVERY = [
    Case(change, stage, fault)
    for change, (_, stages) in CHANGES.items()
    for stage in stages
    for fault in FAULTS
]
QUICK = [
    Case("rollout", "warming", "keeper killed"),
    Case("rollback", "loading", "daemon killed"),
    Case("removal", "draining", "daemon killed"),
    Case("eviction", "loading", "worker killed"),
]
CASES = EVERY if os.environ.get("TURSI_TEST_MATRIX") == "all" else QUICK


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon(scripted=True, settings=SETTINGS, environment=HELLO) as one:
        yield one
        assert "Traceback" not in one.log.read_text()


def workers(running: Daemon) -> list[dict[str, Any]]:
    listed = running.control.get("/deployments").json()["deployments"]
    return [worker for each in listed for worker in each["workers"]]


def at(stand: Stand, stage: str) -> dict[str, Any] | None:
    answer = stand.running.control.get(f"/deployments/{stand.name}")
    assert answer.status_code == 200, f"{stand.name} was gone before it was {stage}"
    for worker in answer.json()["workers"]:
        if worker["phase"] == stage and worker["pid"]:
            found: dict[str, Any] = worker
            return found
    return None


def settled(stand: Stand) -> bool:
    answer = stand.running.control.get(f"/deployments/{stand.name}")
    if not stand.model:
        return answer.status_code == 404
    status = answer.json()
    return bool(
        status["model"] == stand.model
        and status["phase"] == "ready"
        and status["ready"] == status["replicas"] == len(status["workers"])
    )


def strangers(running: Daemon) -> list[psutil.Process]:
    """Processes of workers that the daemon doesn't know."""
    known = {worker["uuid"] for worker in workers(running)}
    found = []
    for process in running.tree():
        with suppress(psutil.NoSuchProcess):
            if process.environ().get("TURSI_WORKER") not in known and not gone(process):
                found.append(process)
    return found


@pytest.fixture
def stand(running: Daemon, request: pytest.FixtureRequest) -> Iterator[Stand]:
    one = Stand(running, re.sub(r"[^a-z]+", "-", request.node.callspec.id))
    yield one
    for each in running.control.get("/deployments").json()["deployments"]:
        running.control.delete(f"/deployments/{each['name']}")
    until(lambda: not workers(running), "all are gone", 30)


@pytest.mark.parametrize("case", CASES, ids=map(str, CASES))
def test_a_change_that_is_interrupted_comes_about(
    running: Daemon, stand: Stand, case: Case
) -> None:
    change, _ = CHANGES[case.change]
    change(stand)
    worker = until(lambda: at(stand, case.stage), f"a worker is {case.stage}", 30)
    FAULTS[case.fault](running, worker)
    if case.change == "unload" and "daemon" not in case.fault:
        until(lambda: not running.status(stand.name)["workers"], "it is out of memory", 30)
    if case.change in {"unload", "eviction"}:
        # It is there when it is asked for.
        until(lambda: stand.ask() == 200, "it answers", 45)
    until(
        lambda: settled(stand),
        f"{stand.model}: {running.control.get(f'/deployments/{stand.name}').text}",
        45,
    )
    answers = stand.answered()
    if "daemon" not in case.fault:
        # Who is asked to end twice as hard may lose what it is at; nobody else does.
        lost = {502, 503} if case.change in {"removal", "unload"} else set()
        assert answers <= {200} | lost, answers
    elif case.fault == "daemon ended":
        assert answers <= {200, 503, 0}, answers
    if stand.model:
        assert stand.ask() == 200
    until(lambda: not strangers(running), f"nobody is left over: {strangers(running)}", 15)
    private = running.state / "tmp"
    known = {worker["uuid"] for worker in workers(running)}
    until(
        lambda: {path.name for path in private.iterdir()} <= known,
        f"no private folder is left over: {known}",
        15,
    )


def test_what_waits_for_its_turn_is_found_by_the_next_daemon() -> None:
    with daemon(scripted=True, settings=SETTINGS) as running:
        for name in ("one", "two"):
            running.deploy(name, running.script(name, stall=True))
            running.wait(name, "loading")
        running.deploy("three", running.script("three", echo=True))
        running.wait("three", "queued")
        running.kill()
        until(lambda: not running.tree(), "nothing is left of it", 10)
        for name in ("one", "two"):
            running.script(name, echo=True)
        running.start()
        for name in ("one", "two", "three"):
            running.wait(name)
        began = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - began < 20
