"""Memory that is gone when a model is to be loaded, or while it is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon import Daemon, daemon
from patience import until

GIB = 2**30
SETTINGS = """
[workers]
backoff_initial = 0.2
backoff_max = 0.5
[memory]
reserve_bytes = 0
"""
STORM_SECONDS = 2.0
"""Time enough for some tries, if there were any."""


def say(path: Path, size: int) -> None:
    new = path.with_suffix(".new")
    new.write_text(str(size))
    new.replace(path)


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "free"
    say(path, 4 * GIB)
    return path


@pytest.fixture(scope="module")
def running(free: Path) -> Iterator[Daemon]:
    environment = {"TURSI_TEST_MEMORY": str(free)}
    with daemon(scripted=True, settings=SETTINGS, environment=environment) as one:
        one.deploy("other", one.script("other", echo=True))
        one.wait("other")
        yield one
        assert "Traceback" not in one.log.read_text()


def model(running: Daemon, name: str, **options: Any) -> Path:
    folder = running.script(name, echo=True, **options)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(GIB)
    return folder


def ask(running: Daemon, name: str) -> int:
    body = {"model": name, "input": "hello"}
    return running.client.post("/v1/embeddings", json=body).status_code


def lives(running: Daemon, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = running.control.get(f"/deployments/{name}/lives").json()["lives"]
    return found


def test_what_another_process_takes_before_a_load_is_waited_for(
    running: Daemon, free: Path
) -> None:
    say(free, GIB // 2)
    running.deploy("thirsty", model(running, "thirsty"))
    until(lambda: "memory" in (running.status("thirsty")["reason"] or ""), "it says why it waits")
    assert running.status("thirsty")["phase"] == "queued"
    assert lives(running, "thirsty") == []
    assert ask(running, "other") == 200
    say(free, 4 * GIB)
    running.wait("thirsty", seconds=20)
    assert ask(running, "thirsty") == 200


def test_what_another_process_takes_during_a_load_makes_no_storm(
    running: Daemon, free: Path
) -> None:
    folder = model(running, "parched", load_seconds=0.8, fail="out_of_memory:There is no room.")
    running.deploy("parched", folder)
    running.wait("parched", "loading")
    say(free, GIB // 2)
    running.wait("parched", "backoff")
    began = time.monotonic()
    while time.monotonic() - began < STORM_SECONDS:
        assert ask(running, "other") == 200
        time.sleep(0.05)
    assert len(lives(running, "parched")) == 1
    assert running.status("parched")["failure"] == "resource"
    (folder / "scripted.json").write_text(json.dumps({"echo": True}))
    say(free, 4 * GIB)
    running.wait("parched", seconds=20)
    assert ask(running, "parched") == 200
    assert len(lives(running, "parched")) == 2


def test_what_is_killed_while_it_loads_is_given_up_in_the_end(running: Daemon) -> None:
    # As the kernel does where nobody can tell that it was that.
    running.deploy("killed", model(running, "killed", load_seconds=0.1, signal=9))
    until(lambda: running.status("killed")["phase"] in {"quarantined", "failed"}, "no storm", 60)
    assert len(lives(running, "killed")) <= 6
    assert ask(running, "other") == 200
    assert ask(running, "killed") == 503
