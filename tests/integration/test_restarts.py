"""What daemons remember and hold back, seen on real daemons with scripted workers."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing, suppress

import httpx
import psutil
from daemon import Daemon, daemon
from patience import until

EAGER = """
[workers]
backoff_initial = 0.05
backoff_max = 0.1
"""


def kill_once_recorded(running: Daemon, failures: int) -> None:
    """``kill -9`` the daemon when its database knows of that many failed lives."""

    def recorded() -> bool:
        lives = running.control.get("/deployments/broken/lives?limit=100").json()["lives"]
        return sum(life["failure"] is not None for life in lives) == failures

    until(recorded, f"{failures} failures are recorded")
    running.kill()


def test_the_next_daemon_goes_on_counting_failures() -> None:
    with daemon(scripted=True, settings=EAGER) as running:
        running.deploy("broken", running.script(exit=3))
        first = running.wait("broken", "quarantined")
        assert first["reason"].endswith("exit status 3 (5 failures in a row)")
        kill_once_recorded(running, 5)
        running.start()
        # Its single try out of quarantine is at once, and it has only that.
        second = running.wait("broken", "quarantined")
        assert second["reason"].endswith("exit status 3 (6 failures in a row)")
        # Whoever asks for another try means a new beginning, for the next daemon too.
        running.control.post("/deployments/broken/start")
        again = until(
            lambda: (
                (status := running.status("broken"))["phase"] == "quarantined"
                and "(5 failures" in status["reason"]
                and status
            ),
            "it is quarantined anew",
        )
        assert again["failure"] == "software"
        kill_once_recorded(running, 11)
        running.start()
        assert "(6 failures" in running.wait("broken", "quarantined")["reason"]


def test_a_lost_accelerator_ends_the_process_and_a_fresh_one_answers() -> None:
    with daemon(scripted=True, settings=EAGER) as running:
        running.deploy("gpu", running.script(exit=86, at=2, echo=True))
        before = running.wait("gpu")["workers"][0]["uuid"]
        body = {"model": "gpu", "input": "hello"}
        assert running.client.post("/v1/embeddings", json=body).status_code == 200
        lost = running.client.post("/v1/embeddings", json=body)
        assert lost.status_code in {200, 502}
        until(
            lambda: (
                (worker := running.status("gpu")["workers"][0])["uuid"] != before
                and worker["phase"] == "ready"
            ),
            "a fresh process",
        )
        assert running.client.post("/v1/embeddings", json=body).status_code == 200
        lives = running.control.get("/deployments/gpu/lives").json()["lives"]
        (life,) = (life for life in lives if life["uuid"] == before)
        assert (life["failure"], life["exit_status"]) == ("gpu-context", 86)


def test_a_gpu_that_loses_contexts_is_suspect() -> None:
    with daemon(scripted=True, settings=EAGER) as running:
        running.deploy("gpu", running.script(exit=86, device="cuda:0"), device="cuda:0")
        running.wait("gpu", "quarantined")
        health = running.client.get("/health").json()
        (part,) = (part for part in health["parts"] if part["name"] == "cuda:0")
        assert (health["status"], part["healthy"]) == ("degraded", False)
        events = running.control.get("/events", params={"limit": 1000}).json()["events"]
        (event,) = (event for event in events if event["kind"] == "device.suspect")
        assert event["message"] == part["message"]
        assert part["message"] in running.control.get("/deployments/gpu/why").json()["sentences"]


def test_the_reason_for_a_signal_is_on_the_disk_before_it() -> None:
    with daemon(scripted=True, settings=EAGER) as running:
        for number in range(5):
            name = f"ends{number}"
            running.deploy(name, running.script(name))
            (worker,) = running.wait(name)["workers"]
            # Whoever stops it gets no answer: the daemon dies with the worker.
            stop = threading.Thread(target=ask_to_stop, args=(running, name))
            stop.start()
            while psutil.pid_exists(worker["pid"]):
                time.sleep(0.0002)
            running.kill()
            stop.join()
            with closing(sqlite3.connect(running.state / "tursi.sqlite")) as database:
                (intent,) = database.execute(
                    "SELECT intent FROM workers WHERE uuid = ?", (worker["uuid"],)
                ).fetchone()
            assert intent == "stop"
            running.start()


def ask_to_stop(running: Daemon, name: str) -> None:
    with suppress(httpx.HTTPError):
        running.control.post(f"/deployments/{name}/stop")


def test_a_storm_of_deaths_pauses_all_starts_and_degrades_health() -> None:
    settings = EAGER + "max_failures = 1000\n"
    with daemon(scripted=True, settings=settings) as running:
        running.deploy("well", running.script("well", echo=True))
        running.wait("well")
        for name in ("one", "two", "three"):
            running.deploy(name, running.script(name, exit=3))
        health = until(
            lambda: (
                (health := running.control.get("/health").json())["parts"][-1]["name"] == "starts"
                and health
            ),
            "starts are paused",
        )
        assert health["status"] == "degraded"
        assert "nothing is started for another" in health["parts"][-1]["message"]
        until(
            lambda: all(running.status(name)["phase"] == "queued" for name in ("one", "two")),
            "they wait",
        )
        # Who serves goes on serving.
        body = {"model": "well", "input": "hello"}
        assert running.client.post("/v1/embeddings", json=body).status_code == 200
