"""Models that are loaded when they are asked for, on real processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from daemon import Daemon, daemon
from patience import until

GIB = 1024**3
# Each script passes for a model of 1 GiB, so that two of them have room.
SETTINGS = f"""
[memory]
limit_bytes = {3 * GIB}
reserve_bytes = 0
keep_alive_seconds = 60.0
min_residency_seconds = 0.1
max_wait_seconds = 2.0
"""


@pytest.fixture
def running() -> Iterator[Daemon]:
    with daemon(scripted=True, settings=SETTINGS) as one:
        yield one


def script(running: Daemon, name: str, size: int = GIB, **options: Any) -> str:
    folder = running.script(name, echo=True, **options)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(size)
    return str(folder)


def ask(running: Daemon, model: str) -> int:
    body = {"model": model, "input": "hello"}
    return running.client.post("/v1/embeddings", json=body).status_code


def kinds(running: Daemon, name: str) -> list[tuple[str, str]]:
    found = running.control.get(f"/deployments/{name}/events").json()["events"]
    return [(each["kind"], each["cause"]) for each in found if each["kind"] in {"load", "unload"}]


def test_the_first_request_loads_it_and_when_nobody_asks_it_goes(running: Daemon) -> None:
    model = script(running, "lazy")
    running.deploy("lazy", model, load="on_demand", keep_alive=0.5)
    # At first, to see whether it can be loaded.
    running.wait("lazy")
    status = running.wait("lazy", "stopped")
    assert (status["load"], status["desired"], status["workers"]) == ("on_demand", "running", [])
    assert running.client.get("/ready").status_code == 200
    assert [ask(running, "lazy") for _ in range(3)] == [200, 200, 200]
    assert running.status("lazy")["unloads_at"] is not None
    running.wait("lazy", "stopped")
    told = kinds(running, "lazy")
    assert told[0] == ("unload", "nobody has used it for 0.5 s")
    assert told[1] == ("load", "a request of 127.0.0.1")
    running.stop()
    running.start()
    assert running.status("lazy")["workers"] == []
    assert ask(running, "lazy") == 200
    why = running.control.get("/deployments/lazy/why").json()["sentences"]
    assert why[0].startswith("lazy is ready")


def test_what_is_needed_takes_the_place_of_what_is_not(running: Daemon) -> None:
    for name in ("one", "two", "three"):
        running.deploy(name, script(running, name), load="on_demand")
        running.wait(name)
    # The third has made one of the others go.
    ready = [name for name in ("one", "two", "three") if running.status(name)["ready"]]
    assert len(ready) == 2
    assert "three" in ready
    for name in ("one", "two", "three", "one", "two", "three"):
        assert ask(running, name) == 200
        assert sum(running.status(each)["ready"] for each in ("one", "two", "three")) <= 2
    causes = [cause for name in ("one", "two", "three") for _, cause in kinds(running, name)]
    assert any("needs about" in cause for cause in causes)


def test_a_busy_model_stays_and_whoever_waits_for_memory_is_told(running: Daemon) -> None:
    running.deploy("slow", script(running, "slow", 2 * GIB, delay=4.0), load="on_demand")
    running.wait("slow")
    running.deploy("other", script(running, "other", 2 * GIB), load="on_demand")
    running.wait("other")
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(ask(running, "slow")))
    thread.start()
    until(lambda: running.status("slow")["in_flight"], "slow is at it")
    began = time.monotonic()
    second = threading.Thread(target=lambda: answers.append(ask(running, "other")))
    second.start()
    until(
        lambda: "waits for memory" in (running.status("other")["reason"] or ""),
        "it is said why other has to wait",
    )
    for each in (thread, second):
        each.join()
    assert answers == [200, 200]
    assert time.monotonic() - began > 2


def test_manual_loads_when_it_is_told_to(running: Daemon) -> None:
    running.deploy("mine", script(running, "mine"), load="manual")
    running.wait("mine")
    assert running.control.post("/deployments/mine/unload").status_code == 202
    running.wait("mine", "stopped")
    refused = running.client.post("/v1/embeddings", json={"model": "mine", "input": "hello"})
    assert refused.status_code == 503
    assert "tursi load mine" in refused.json()["error"]["message"]
    running.control.post("/deployments/mine/load")
    running.wait("mine")
    assert ask(running, "mine") == 200
    running.deploy("mine", str(running.folder / "mine"), load="always")
    assert running.control.post("/deployments/mine/unload").status_code == 400


def fit(running: Daemon, model: str, **fields: Any) -> tuple[str, list[str]]:
    body = {"model": model, **fields}
    found = running.control.post("/deployments", json=body, params={"dry_run": 1}).json()
    assert found["memory"] > GIB
    return found["verdict"], found["evicts"]


def test_a_dry_run_tells_whether_it_would_find_room(running: Daemon) -> None:
    model = script(running, "model")
    assert fit(running, model) == ("fits", [])
    assert fit(running, model, replicas=2) == ("never", [])
    running.deploy("lazy", script(running, "lazy", 2 * GIB), load="on_demand")
    running.wait("lazy")
    assert fit(running, model) == ("evicts", ["lazy"])
    running.deploy("lazy", str(running.folder / "lazy"), load="always")
    assert fit(running, model) == ("waits", [])
    assert running.control.get("/deployments/model").status_code == 404


def test_what_can_never_fit_says_so(running: Daemon) -> None:
    running.deploy("huge", script(running, "huge", 64 * GIB))
    until(lambda: running.status("huge")["reason"], "there is a reason")
    status = running.status("huge")
    assert (status["phase"], status["failure"]) == ("failed", "resource")
    assert ask(running, "huge") == 503
    # It is not on its way, so that nobody waits for it.
    assert running.client.get("/ready").status_code == 200
    assert running.client.get("/health").json()["status"] == "degraded"
    assert "more than the 3.0 GiB that models may take here" in status["reason"]
    # Others don't wait behind it.
    running.deploy("small", script(running, "small", 1000))
    running.wait("small")
    assert ask(running, "small") == 200


def test_more_models_than_have_room_serve_everybody_in_the_end() -> None:
    settings = SETTINGS.replace(f"{3 * GIB}", f"{5 * GIB}")
    with daemon(scripted=True, settings=settings) as running:
        names = [f"m{number}" for number in range(6)]
        for name in names:
            running.deploy(name, script(running, name), load="on_demand", keep_alive=0)
        until(
            lambda: not any(running.status(name)["workers"] for name in names), "all are unloaded"
        )
        answers: dict[str, list[int]] = {name: [] for name in names}

        def client(name: str) -> None:
            with httpx.Client(base_url=running.url, timeout=120) as mine:
                for _ in range(3):
                    body = {"model": name, "input": "hello"}
                    answers[name].append(mine.post("/v1/embeddings", json=body).status_code)

        threads = [threading.Thread(target=client, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {name: [200] * 3 for name in names}
