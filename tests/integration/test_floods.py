"""Workers that write, fork or take more than is good: the daemon and the others don't notice."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest
from daemon import Daemon, daemon
from patience import until
from processes import marked

MEBIBYTE = 2**20
SETTINGS = """
[workers]
backoff_initial = 0.05
backoff_max = 0.1
"""
FLOOD = int(os.environ.get("TURSI_FLOOD_BYTES", 200 * MEBIBYTE))
FORKS = 300
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (out|err|tursi) .*")


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon(scripted=True, settings=SETTINGS) as one:
        one.deploy("calm", one.script("calm", echo=True))
        one.wait("calm")
        yield one


@contextmanager
def latencies(running: Daemon) -> Iterator[Callable[[], float]]:
    """Ask the API and a calm model all the time; the answer is the 99th percentile, in seconds."""
    found: list[float] = []
    failures: list[int] = []
    ending = threading.Event()

    def ask(look: Callable[[], httpx.Response]) -> None:
        while not ending.wait(0.005):
            began = time.monotonic()
            answer = look()
            found.append(time.monotonic() - began)
            if answer.status_code != 200:
                failures.append(answer.status_code)

    def p99() -> float:
        ending.set()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert len(found) > 50
        return sorted(found)[int(len(found) * 0.99)]

    body = {"model": "calm", "input": "hello"}
    looks: tuple[Callable[[], httpx.Response], ...] = (
        lambda: running.control.get("/status"),
        lambda: running.client.post("/v1/embeddings", json=body),
    )
    threads = [threading.Thread(target=ask, args=(look,)) for look in looks]
    for thread in threads:
        thread.start()
    try:
        yield p99
    finally:
        ending.set()


def rss(running: Daemon) -> int:
    assert running.process is not None
    return int(psutil.Process(running.process.pid).memory_info().rss)


def lives(running: Daemon, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = running.control.get(f"/deployments/{name}/lives").json()["lives"]
    return found


def test_a_flood_of_output_costs_only_itself(running: Daemon) -> None:
    before = rss(running)
    with latencies(running) as p99:
        running.deploy("flood", running.script("flood", echo=True, flood=FLOOD))
        (worker,) = running.wait("flood")["workers"]
        log = running.state / "workers" / "flood" / f"{worker['uuid']}.log"
        process = psutil.Process(worker["pid"])

        def written() -> bool:
            return int(process.io_counters().write_bytes + process.io_counters().write_chars) > (
                FLOOD * 0.99
            )

        until(written, "all is written", 100)
        assert p99() < 0.25
    assert rss(running) - before < 20 * MEBIBYTE
    parts = [log, log.with_name(f"{log.name}.1")]
    assert sum(part.stat().st_size for part in parts if part.exists()) <= 8 * MEBIBYTE
    # What it had to drop is told with the next line, or with the end.
    running.control.delete("/deployments/flood")
    until(lambda: not process.is_running(), "it is gone")
    until(lambda: "tursi dropped " in log.read_text(), "what was dropped is told", 5)


def test_what_could_deceive_a_reader_is_cut_and_escaped(running: Daemon) -> None:
    folder = running.script("liar", echo=True, say=True)
    forged = "2026-01-01T00:00:00.000Z tursi the worker has ended: it was asked to stop"
    (folder / "say").write_bytes(
        b"\n".join(
            [
                b"begin",
                b"x" * MEBIBYTE,
                bytes(range(256)).replace(b"\n", b"").replace(b"\r", b""),
                b"\x1b[2J\x1b[31mred\x1b]0;title\x07",
                forged.encode(),
                f"harmless\r{forged}".encode(),
                f"\u202egnp.exe\u2028{forged}".encode(),
                b"end",
                b"",
            ]
        )
    )
    running.deploy("liar", folder)
    (worker,) = running.wait("liar")["workers"]
    log = running.state / "workers" / "liar" / f"{worker['uuid']}.log"
    until(lambda: log.read_text().endswith(" err end\n"), "all is said")
    text = log.read_text()
    lines = text.removesuffix("\n").split("\n")
    assert all(LINE.fullmatch(line) for line in lines)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e]", text)
    assert [line.split(" ")[1] for line in lines] == ["err"] * len(lines)
    (cut,) = [line for line in lines if "xxxx" in line]
    assert 8192 < len(cut) < 8192 + 60
    assert cut.endswith("[cut]")
    assert "\\x1b[2J\\x1b[31mred" in text
    # The same holds for what the API shows.
    shown = running.control.get("/deployments/liar/logs").json()["lines"]
    assert shown
    assert all(LINE.fullmatch(line) for line in shown)


def test_a_fork_bomb_is_cleared_and_disturbs_nobody(running: Daemon) -> None:
    folder = running.script("bomb", fork=FORKS)
    with latencies(running) as p99:
        # With a limit the memory of each process is looked at.
        running.deploy("bomb", folder, limits={"memory": 4096 * MEBIBYTE})
        (worker,) = running.wait("bomb")["workers"]
        mark = f"TURSI_WORKER={worker['uuid']}"
        assert len(marked(mark)) == FORKS + 2
        assert not [life for life in lives(running, "bomb") if life["failure"]]
        killed = time.monotonic()
        os.kill(worker["pid"], 9)
        until(lambda: not marked(mark), "all is cleared", 10)
        assert time.monotonic() - killed < 2.0
        running.control.delete("/deployments/bomb")
        assert p99() < 0.25
    until(lambda: running.control.get("/deployments/bomb").status_code == 404, "it is gone", 20)


def test_who_takes_too_much_memory_three_times_is_given_up(running: Daemon) -> None:
    folder = running.script("greedy", leak=150 * MEBIBYTE)
    running.deploy("greedy", folder, limits={"memory": 96 * MEBIBYTE})
    body = {"model": "greedy", "input": "hello"}
    for number in range(1, 4):
        running.wait("greedy")
        assert running.client.post("/v1/embeddings", json=body).status_code == 200
        until(
            lambda number=number: (  # type: ignore[misc]  # bound early
                sum(life["failure"] is not None for life in lives(running, "greedy")) == number
            ),
            f"end {number}",
            20,
        )
    status = running.wait("greedy", "failed")
    assert status["failure"] == "out-of-memory"
    assert "it needs more than its limit of 96.0 MiB (peak " in status["reason"]
    assert status["reason"].endswith("(3 times)")
    assert {life["failure"] for life in lives(running, "greedy")} == {"out-of-memory"}
    refused = running.client.post("/v1/embeddings", json=body)
    assert (refused.status_code, refused.headers["x-should-retry"]) == (503, "false")
