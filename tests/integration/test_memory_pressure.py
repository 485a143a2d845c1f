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


@pytest.mark.skipif(available() < 7 * GIB, reason="others on this machine need the memory")
def test_memory_that_vanishes_is_waited_for_and_everything_else_serves() -> None:
    # What is free beyond the reserve is enough for the model, and not while the hog is there.
    settings = f"[memory]\nreserve_bytes = {available() - 5 * GIB}\n"
    with daemon(scripted=True, settings=settings) as running:
        running.deploy("other", running.script("other", echo=True))
        running.wait("other")
        folder = running.script("large", load_seconds=0.5, fail="out_of_memory:There is no room.")
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(2 * GIB)
        with hog(4 * GIB):
            # Another process was faster: the load fails although the estimate had allowed it.
            fits = running.control.post(
                "/deployments", json={"model": str(folder)}, params={"dry_run": 1}
            ).json()
            assert fits["verdict"] == "waits"
            running.deploy("large", folder)
            status = until(
                lambda: (one := running.status("large"))["reason"] and one, "there is a reason"
            )
            assert "It waits for memory: it needs about 2.8 GiB" in status["reason"]
            assert lives(running, "large") == []
            body = {"model": "other", "input": "hello"}
            assert running.client.post("/v1/embeddings", json=body).status_code == 200
            why = " ".join(running.control.get("/deployments/large/why").json()["sentences"])
            assert "waits for memory" in why
        # Now there is room, and it is let in; that it fails all the same is found out once.
        status = running.wait("large", "backoff")
        assert (status["failure"], status["reason"]) == ("resource", "There is no room.")
        assert len(lives(running, "large")) == 1
        assert running.client.post("/v1/embeddings", json=body).status_code == 200


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
        assert before["footprint"]["estimate"]["parameters"] == 22_713_216 or (
            22_600_000 < before["footprint"]["estimate"]["parameters"] < 22_800_000
        )
        running.deploy("mini", model)
        running.wait("mini")
        peaks = running.control.get("/deployments/mini/memory").json()["footprint"]["host_peaks"]
        # The estimate was more, and not by much.
        most = max(peaks["load"], peaks["warm"])
        assert most <= before["footprint"]["host"] <= 2.5 * most
        assert running.control.delete("/deployments/mini").status_code == 202
        running.stop()
        running.start()
        after = ask()
        assert after["measured"]
        assert after["footprint"]["host_peaks"]["load"] == peaks["load"]
