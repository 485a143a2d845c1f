"""Memory that others take and give back, on real processes; and what is known after a restart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from daemon import Daemon, daemon
from minilm import minilm_folder
from patience import until

GIB = 1024**3
_HOG = """
import sys
taken = bytearray(int(sys.argv[1]))
for place in range(0, len(taken), 4096):
    taken[place] = 1
print("taken", flush=True)
sys.stdin.read()
"""


def available() -> int:
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel doesn't tell what is free")


@contextmanager
def hog(size: int) -> Iterator[None]:
    """Another process that takes so much of this machine's memory."""
    with subprocess.Popen(
        [sys.executable, "-I", "-c", _HOG, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        try:
            yield
        finally:
            process.kill()


def lives(running: Daemon, name: str) -> list[Any]:
    found: list[Any] = running.control.get(f"/deployments/{name}/lives").json()["lives"]
    return found


def large(running: Daemon, **options: Any) -> Path:
    """What passes for a model of 3 GiB."""
    folder = running.script("large", echo=True, **options)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(3 * GIB)
    return folder


def answers(running: Daemon, name: str) -> int:
    body = {"model": name, "input": "hello"}
    return running.client.post("/v1/embeddings", json=body).status_code


@pytest.mark.skipif(available() < 9 * GIB, reason="others on this machine need the memory")
def test_memory_that_vanishes_is_waited_for_and_everything_else_serves() -> None:
    # What is free beyond the reserve is enough for the model, but not while the hog is there.
    reserve = available() - 6 * GIB
    settings = f"[memory]\nreserve_bytes = {reserve}\n"
    with daemon(scripted=True, settings=settings) as running:
        running.deploy("other", running.script("other", echo=True))
        running.wait("other")
        folder = large(running, load_seconds=5, fail="out_of_memory:There is no room.")
        running.deploy("large", folder)
        running.wait("large", "loading")
        # Another process takes it between the estimate and the load.
        with hog(available() - reserve - GIB // 2):
            status = running.wait("large", "backoff")
            assert (status["failure"], status["reason"]) == ("resource", "There is no room.")
            assert answers(running, "other") == 200
            fit = running.control.get("/deployments/large/memory").json()
            assert fit["verdict"] == "waits"
            why = " ".join(running.control.get("/deployments/large/why").json()["sentences"])
            assert "There is no room" in why
            assert len(lives(running, "large")) == 1
            large(running, load_seconds=0.1)
        # When there is memory again, and not only when its minute is over.
        running.wait("large", seconds=30)
        assert len(lives(running, "large")) == 2
        assert [answers(running, name) for name in ("large", "other")] == [200, 200]


def test_what_was_measured_is_known_after_a_restart_and_a_removal() -> None:
    model = str(minilm_folder())
    with daemon() as running:

        def ask() -> dict[str, Any]:
            found: dict[str, Any] = running.control.post(
                "/deployments", json={"model": model}, params={"dry_run": 1}
            ).json()
            return found

        before = ask()
        assert (before["verdict"], before["measured"]) == ("fits", False)
        assert before["footprint"]["estimate"]["parameters"] == 22_713_728
        running.deploy("mini", model)
        running.wait("mini")
        peaks = running.control.get("/deployments/mini/memory").json()["footprint"]["host_peaks"]
        text = {"model": "mini", "input": ["hello world, how are you today? " * 20] * 64}

        def busy() -> Any:
            assert running.client.post("/v1/embeddings", json=text).status_code == 200
            known = running.control.get("/deployments/mini/memory").json()["footprint"]
            return known["host_peaks"]["busy"]

        until(busy, "a look at it in service", 60)
        # The estimate was more, and not by much.
        most = max(peaks["load"], peaks["warm"])
        assert most <= before["footprint"]["host"] <= 2.5 * most
        assert running.control.delete("/deployments/mini").status_code == 202
        running.stop()
        running.start()
        after = ask()
        assert after["measured"]
        assert after["footprint"]["host_peaks"]["load"] == peaks["load"]
