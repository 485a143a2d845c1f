"""Statistics and what goes on, as a real daemon tells them."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemon import Daemon, daemon
from patience import until

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.rst"
SETTINGS = """
[requests]
max_queued = 1
max_in_flight = 1
"""


@pytest.fixture
def running() -> Iterator[Daemon]:
    with daemon(scripted=True, settings=SETTINGS) as one:
        yield one


def ask(running: Daemon, model: str = "search", key: str | None = None) -> int:
    return running.client.post(
        "/v1/embeddings",
        json={"model": model, "input": "hello"},
        headers={"Authorization": f"Bearer {key}"} if key else {},
    ).status_code


def new_key(running: Daemon, name: str) -> str:
    made = running.control.post("/keys", json={"name": name, "scopes": ["infer"]})
    return str(made.json()["secret"])


def told(running: Daemon, place: str = "/statistics", **parameters: str) -> dict[str, Any]:
    answer = running.control.get(place, params=parameters)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def is_on_the_disk(running: Daemon, sent: int) -> bool:
    path = running.state / "tursi.sqlite"
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as file:
        (count,) = file.execute(
            "SELECT coalesce(sum(requests), 0) FROM rollups WHERE span IN (0, 86400)"
        ).fetchone()
    return bool(count == sent)


def test_nothing_that_was_on_the_disk_is_lost_or_counted_twice_by_kills(running: Daemon) -> None:
    running.deploy("search", running.script(echo=True))
    sent = 0
    for _ in range(3):
        running.wait("search")
        for _ in range(20):
            assert ask(running) == 200
        sent += 20
        # Nobody has asked for it; that is how long a kill can cost.
        until(partial(is_on_the_disk, running, sent), "it is on the disk", 5)
        running.kill()
        running.start()
    for by in ("minute", "hour", "day"):
        found = told(running, by=by)
        assert found["total"]["requests"] == sent
        assert found["total"]["latency"]["count"] == sent
        assert sum(each["requests"] for each in found["periods"]) == sent


def test_requests_are_told_by_key_error_and_time(running: Daemon) -> None:
    running.deploy("search", running.script(stream=3, interval=0.3))
    running.wait("search")
    ci, other = new_key(running, "ci"), new_key(running, "other")
    statuses: list[int] = []
    # One is with the worker, one waits, and the others are too many.
    threads = [
        threading.Thread(target=lambda: statuses.append(ask(running, key=ci))) for _ in range(5)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(statuses) == [200, 200, 429, 429, 429]
    assert ask(running) == 200
    assert ask(running, "none", key=other) == 404
    assert ask(running, key=f"{ci[:-4]}0000") == 401
    found = told(running)
    by_key = {each["name"]: each for each in found["keys"]}
    assert by_key["ci"]["errors_by_class"] == {"overload": 3}
    assert by_key["ci"]["requests"] == 5
    assert by_key["ci"]["queue"]["p99"] > 0.5
    assert by_key["other"]["errors_by_class"] == {"client": 1}
    assert by_key[None]["errors"] == 0
    assert by_key[None]["first_byte"]["p50"] < by_key[None]["latency"]["p50"]
    assert by_key[None]["completion_tokens"] > 0
    assert {each["deployment"]: each["requests"] for each in found["deployments"]} == {
        "": 1, "search": 6,
    }  # fmt: skip
    assert told(running, "/deployments/search/statistics", key_name="ci")["total"]["requests"] == 5
    own = {"Authorization": f"Bearer {ci}"}
    seen = running.client.get("/keys/ci/statistics", headers=own)
    assert seen.json()["total"]["requests"] == 5
    assert running.client.get("/keys/other/statistics", headers=own).status_code == 404
    assert running.client.get("/statistics", headers=own).status_code == 403


def test_what_goes_on_is_told_while_it_does(running: Daemon) -> None:
    running.deploy("search", running.script(echo=True, delay=0.05))
    running.wait("search")
    running.deploy("slow", running.script("slow", load_seconds=60))
    asking = threading.Event()

    def go_on() -> None:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            while not asking.is_set():
                client.post("/v1/embeddings", json={"model": "search", "input": "x"})

    thread = threading.Thread(target=go_on)
    thread.start()
    try:

        def look() -> tuple[dict[str, Any], dict[str, Any]] | None:
            found = running.control.get("/activity").json()
            search, slow = found["deployments"]
            busy = search["requests_per_second"] > 0.5 and search["latency"]
            return (search, slow) if busy and slow["progress"] else None

        search, slow = until(look, "both are at it", 30)
    finally:
        asking.set()
        thread.join()
    assert search["latency"]["p50"] > 0.045
    assert search["rss"] > 0
    assert search["cpu_seconds"] > 0
    assert (slow["phase"], slow["requests_per_second"]) == ("loading", 0)


def test_the_documents_commands_work(running: Daemon) -> None:
    running.deploy("search", running.script(echo=True))
    running.wait("search")
    ask(running, key=new_key(running, "ci"))
    section = DOCUMENT.read_text().partition("\nStatistics\n---")[2]
    code = section.partition(".. code-block:: bash\n\n")[2].partition("\n\n..")[0]
    ended = subprocess.run(
        ["bash", "-e"],
        input=code,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TURSI_SOCKET": str(running.runtime / "control.sock"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("search") == 2
    assert ended.stdout.count("total") == 5
    assert "req/s" in ended.stdout
