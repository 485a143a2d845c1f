"""Workers that die with requests: what clients get, and what is known afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemon import Daemon, daemon
from patience import until

SETTINGS = "[workers]\nbackoff_initial = 0.2\nmax_failures = 50\n"
TURSI = Path(sys.executable).with_name("tursi")
BODY = {"model": "echo", "input": "hello"}


@pytest.fixture
def running() -> Iterator[Daemon]:
    with daemon(scripted=True, settings=SETTINGS) as one:
        yield one


class Asking(threading.Thread):
    """A client with a request of its own."""

    def __init__(self, running: Daemon, text: str = "hello", **fields: Any) -> None:
        super().__init__()
        self.url = running.url
        self.body = {**BODY, "input": text, **fields}
        self.answer: httpx.Response | None = None
        self.answered = 0.0
        self.start()

    def run(self) -> None:
        with suppress(httpx.HTTPError):
            self.answer = httpx.post(
                f"{self.url}/v1/embeddings",
                json=self.body,
                headers={"x-request-id": self.body["input"]},
                timeout=40,
            )
        self.answered = time.monotonic()

    def status(self) -> int:
        self.join(40)
        assert self.answer is not None
        return self.answer.status_code

    def error(self) -> Any:
        self.join(40)
        assert self.answer is not None
        return self.answer.json()["error"]


def pids(running: Daemon, name: str = "echo") -> list[int]:
    return [worker["pid"] for worker in running.status(name)["workers"]]


def busy(running: Daemon, number: int, name: str = "echo") -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        status = running.status(name)
        return status if status["in_flight"] == number else None

    return until(look, f"{number} requests are in flight")


def crashes(running: Daemon, name: str = "echo") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = running.control.get(f"/deployments/{name}/crashes").json()[
        "crashes"
    ]
    return found


def tursi(running: Daemon, *arguments: str) -> str:
    ended = subprocess.run(
        [str(TURSI), "--socket", str(running.runtime / "control.sock"),
         *arguments],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    return ended.stdout


def test_a_request_whose_worker_dies_is_answered_by_the_next_one(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True, delay=1.0))
    running.wait("echo")
    asking = Asking(running)
    busy(running, 1)
    os.kill(pids(running)[0], 9)
    assert asking.status() == 200
    assert asking.answer is not None
    assert asking.answer.json() == asking.body
    [crash] = crashes(running)
    assert crash["requests"] == ["hello"]


def test_with_two_replicas_the_other_one_answers_at_once(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True, delay=1.0, load_seconds=0.5), replicas=2)
    running.wait("echo")
    asking = Asking(running)
    status = busy(running, 1)
    [pid] = [worker["pid"] for worker in status["workers"] if worker["in_flight"]]
    killed = time.monotonic()
    os.kill(pid, 9)
    assert asking.status() == 200
    # The answer itself takes one second; loading would take more.
    assert asking.answered - killed < 1.5


def test_a_second_death_is_a_502_with_its_cause_within_a_second(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True, delay=30))
    running.wait("echo")
    asking = Asking(running)
    busy(running, 1)
    first = pids(running)
    os.kill(first[0], 9)
    until(
        lambda: (
            (status := running.status("echo"))["in_flight"] == 1
            and status["workers"][0]["pid"] not in first
        ),
        "it is sent once more",
    )
    killed = time.monotonic()
    os.kill(pids(running)[0], 9)
    assert asking.status() == 502
    assert asking.answered - killed < 1.0
    error = asking.error()
    [last, _] = crashes(running)
    assert error["code"] == "worker_lost"
    assert "killed by signal 9 (SIGKILL) from outside" in error["message"]
    assert f"`tursi crashes echo {last['id']}`" in error["message"]
    assert error["reference"] == str(last["id"])


def test_a_stream_that_had_begun_ends_with_the_error(running: Daemon) -> None:
    running.deploy("stream", running.script(stream=1000, interval=0.05))
    running.wait("stream")
    body = {"model": "stream", "prompt": "x", "stream": True}
    with running.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
        os.kill(pids(running, "stream")[0], 9)
        killed = time.monotonic()
        rest = "\n".join(lines)
    assert time.monotonic() - killed < 1.0
    assert '"code":"worker_lost"' in rest
    assert "killed by signal 9 (SIGKILL) from outside" in rest
    running.wait("stream")
    assert running.status("stream")["in_flight"] == 0


@pytest.mark.parametrize("replicas", [1, 2])
def test_poison_kills_two_workers_and_no_more_and_costs_nobody_else_an_answer(
    running: Daemon, replicas: int
) -> None:
    model = running.script(echo=True, delay=0.3, die_on="poison", die_after=0.1)
    running.deploy("echo", model, replicas=replicas)
    running.wait("echo")
    innocents = [Asking(running, f"innocent {number}") for number in range(6)]
    poison = Asking(running, "poison")
    innocents += [Asking(running, f"another {number}") for number in range(6)]
    assert [one.status() for one in innocents] == [200] * 12
    assert poison.status() == 502
    assert "the same request is refused for an hour" in poison.error()["message"]
    until(lambda: running.status("echo")["ready"] == replicas, "all are there again")
    found = crashes(running)
    assert [crash["failure"] for crash in found] == ["crash", "crash"]
    # The second time it was alone.
    assert found[0]["requests"] == ["poison"]
    for _ in range(3):
        refused = Asking(running, "poison")
        assert refused.status() == 422
        assert refused.error()["code"] == "poison_request"
        assert refused.error()["reference"] == str(found[0]["id"])
    assert len(crashes(running)) == 2
    assert running.client.post("/v1/embeddings", json=BODY).status_code == 200
    kinds = [
        event["kind"] for event in running.control.get("/deployments/echo/events").json()["events"]
    ]
    assert kinds.count("request.refused") == 1


def test_the_dossier_and_what_is_told_of_it(running: Daemon) -> None:
    model = running.script(fail="weights_corrupt:The weights are damaged.")
    running.deploy("echo", model, device="cpu")
    running.wait("echo", "failed")
    [short] = crashes(running)
    assert "log" not in short
    whole = running.control.get(f"/deployments/echo/crashes/{short['id']}").json()
    life = running.control.get("/deployments/echo/lives").json()["lives"][0]
    assert {key: whole[key] for key in short} == short
    assert (short["failure"], short["exit_status"], short["signal"]) == ("weights", 65, None)
    assert short["phase"] in {"loading", "warming"}
    assert short["error"] == "Traceback: as scripted"
    assert short["worker"] == life["uuid"]
    assert whole["order"]["folder"] == str(model)
    assert whole["order"]["device"] == "cpu"
    assert whole["traceback"] == "Traceback: as scripted"
    assert any("scripted worker" in line for line in whole["log"])
    assert whole["usage"][0]["rss"] > 0
    for wrong in ("999", "x", "-1", "9" * 30):
        answer = running.control.get(f"/deployments/echo/crashes/{wrong}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "crash_not_found")
    refused = running.client.post("/v1/embeddings", json=BODY)
    assert refused.status_code == 503
    assert refused.json()["error"]["reference"] == str(short["id"])
    assert "The weights are damaged." in refused.json()["error"]["message"]
    story = running.control.get("/deployments/echo/why").json()
    assert story["crash"] == short["id"]
    told = tursi(running, "why", "echo")
    for part in (
        "echo is down, and not tried again, since ",
        "before it was ready: The weights are damaged.",
        f"`tursi crashes echo {short['id']}`",
        "Nothing is tried by itself any more",
    ):
        assert part in told, told
    assert "weights" in tursi(running, "crashes", "echo")
    assert "scripted worker" in tursi(running, "crashes", "echo", str(short["id"]))


def test_a_serving_worker_leaves_its_versions_and_its_curve(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True, load_seconds=2.5))
    running.wait("echo")
    os.kill(pids(running)[0], 11)
    [crash] = until(lambda: crashes(running), "the crash is recorded")
    whole = running.control.get(f"/deployments/echo/crashes/{crash['id']}").json()
    assert whole["phase"] == "ready"
    assert whole["versions"] == {"scripted": "1"}
    assert len(whole["usage"]) >= 3
    assert whole["peak_rss"] > 0
    running.wait("echo")
    assert "crashed with signal 11 (SIGSEGV)" in tursi(running, "why", "echo")


def test_who_is_asked_to_end_has_no_crash_and_the_healthy_have_a_story_too(
    running: Daemon,
) -> None:
    running.deploy("echo", running.script(echo=True), replicas=2)
    running.wait("echo")
    assert "2 of 2 replicas serving" in tursi(running, "why", "echo")
    running.control.post("/deployments/echo/scale", json={"replicas": 1})
    until(lambda: len(running.status("echo")["workers"]) == 1, "one is retired")
    running.control.post("/deployments/echo/restart")
    until(lambda: running.status("echo")["phase"] != "ready", "it restarts")
    running.wait("echo")
    running.control.post("/deployments/echo/stop")
    until(lambda: running.status("echo")["phase"] == "stopped", "it has stopped")
    assert crashes(running) == []
    told = tursi(running, "why", "echo")
    assert "echo is stopped" in told
    assert "None of its workers has ended unasked." in told


def test_as_many_crashes_are_kept_as_configured_and_numbers_go_on() -> None:
    settings = f"{SETTINGS}[storage]\ncrashes = 2\n"
    with daemon(scripted=True, settings=settings) as running:

        def newest(number: int) -> bool:
            return [one["id"] for one in crashes(running)][:1] == [number]

        running.deploy("echo", running.script(echo=True))
        for number in range(1, 4):
            running.wait("echo")
            os.kill(pids(running)[0], 9)
            until(partial(newest, number), f"crash {number}")
        assert [one["id"] for one in crashes(running)] == [3, 2]
        running.stop()
        running.start()
        running.wait("echo")
        os.kill(pids(running)[0], 9)
        until(lambda: [one["id"] for one in crashes(running)] == [4, 3], "crash 4")
