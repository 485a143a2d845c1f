"""A download is interrupted at each of its stages, by whatever may interrupt it.

A few of all combinations are tried by default, and all of them with TURSI_TEST_MATRIX=all
(``make faults``).
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from daemon import Daemon, daemon
from held_fetcher import POINTS, SHARDS, hold
from patience import gone, until
from stand_in_hub import Fault, StandInHub

HELD = Path(__file__).with_name("held_fetcher.py")
SHARD_BYTES = 3 * 2**20
CHUNK_BYTES = 512 * 1024
"""huggingface_hub writes what has arrived by this much."""
SETTINGS = """
[hub]
endpoint = "{endpoint}"
stall_seconds = 2.0
[workers]
stop_seconds = 1.0
"""
AT_THE_HUB = {
    # point: what the hub holds back there
    "listing": Fault("/api/models/", "hold", at=0.5),
    "small file": Fault("/resolve/.*/config.json", "hold", method="GET", at=0.5),
    "first shard": Fault(f"/content/.*/{SHARDS[0]}", "hold", method="GET", at=0.67),
    "second shard": Fault(f"/content/.*/{SHARDS[1]}", "hold", method="GET", at=0.34),
}
ALL_POINTS = (*AT_THE_HUB, *POINTS)
VERIFIED = ("referred", "published", "said")
"""From there on it is a model."""


def kill(number: int, keeper: bool = False) -> Callable[[Daemon, str], None]:
    def strike(running: Daemon, repository: str) -> None:
        for process in fetchers(running, repository):
            # When its keeper is killed the fetcher goes at once.
            with suppress(psutil.NoSuchProcess):
                if ("keeper" in " ".join(process.cmdline()[:6])) is keeper:
                    process.send_signal(number)

    return strike


def kill_daemon(running: Daemon, repository: str) -> None:
    running.kill()
    until(lambda: not fetchers(running, repository), "the fetcher ends with the daemon", 10)
    running.start(environment_of[running])


def end_daemon(running: Daemon, repository: str) -> None:
    assert running.stop() == 0
    assert not fetchers(running, repository)
    running.start(environment_of[running])


def pause(running: Daemon, repository: str) -> None:
    number = newest(running, repository)["id"]
    assert running.control.post(f"/pulls/{number}/pause").status_code == 202
    until(lambda: not fetchers(running, repository), "the fetcher ends", 10)
    assert running.control.post(f"/pulls/{number}/resume").status_code == 202


FAULTS: dict[str, Callable[[Daemon, str], None]] = {
    "fetcher killed": kill(signal.SIGKILL),
    "fetcher ended": kill(signal.SIGTERM),
    "fetcher stopped": kill(signal.SIGSTOP),
    "keeper killed": kill(signal.SIGKILL, keeper=True),
    "daemon killed": kill_daemon,
    "daemon ended": end_daemon,
    "paused": pause,
}
environment_of: dict[Daemon, dict[str, str]] = {}
QUICK = [
    ("listing", "daemon killed"),
    ("first shard", "fetcher stopped"),
    ("between", "keeper killed"),
    ("verify", "fetcher killed"),
    ("said", "daemon killed"),
]
WHOLE = os.environ.get("TURSI_TEST_MATRIX") == "all"
CASES = [(point, fault) for point in ALL_POINTS for fault in FAULTS] if WHOLE else QUICK


def fetchers(running: Daemon, repository: str) -> list[psutil.Process]:
    """The processes of its download, the keeper too."""
    found = []
    for process in running.tree():
        with suppress(psutil.NoSuchProcess):
            if repository in process.cmdline() and not gone(process):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def hub() -> Iterator[StandInHub]:
    with StandInHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def running(hub: StandInHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    environment = {
        **hub.environment(tmp_path_factory.mktemp("home")),
        "HF_HUB_OFFLINE": "0",
        "TURSI_TEST_FETCHER": str(HELD),
    }
    settings = SETTINGS.format(endpoint=hub.endpoint)
    with daemon(scripted=True, settings=settings, environment=environment) as one:
        environment_of[one] = environment
        yield one
        assert "Traceback" not in one.log.read_text()


@pytest.fixture
def repository(hub: StandInHub, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """One of its own for each case, in two shards."""
    name = "someone/" + re.sub(r"[^a-z]+", "-", request.node.callspec.id)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "x": "y" * 500}))
    weights = {"a": SHARDS[0], "b": SHARDS[1]}
    index = json.dumps({"metadata": {}, "weight_map": weights})
    (folder / "model.safetensors.index.json").write_text(index)
    for shard in SHARDS:
        header = (2).to_bytes(8, "little") + b"{}"
        (folder / shard).write_bytes(header + os.urandom(SHARD_BYTES))
    hub.add(name, folder)
    return name


def newest(running: Daemon, repository: str) -> dict[str, Any]:
    pulls = running.control.get("/pulls").json()["pulls"]
    found: dict[str, Any] = next(each for each in pulls if each["model"] == repository)
    return found


def listed(running: Daemon, repository: str) -> bool:
    models = running.control.get("/catalogue").json()["models"]
    return any(each["name"] == repository for each in models)


@pytest.mark.parametrize(("point", "fault"), CASES, ids=[f"{p}-{f}" for p, f in CASES])
def test_a_download_that_is_interrupted_goes_on(
    running: Daemon, hub: StandInHub, repository: str, point: str, fault: str
) -> None:
    folder = running.state / "cache" / "hub"
    reached: Callable[[], bool]
    held: Fault | None = None
    if point in AT_THE_HUB:
        what = AT_THE_HUB[point]
        path = what.path.replace("/api/models/", f"/api/models/{repository}")
        if not what.path.startswith("/api"):
            path = f"{repository.partition('/')[2]}/.*" + what.path.rpartition("/")[2]
        held = Fault(path, "hold", method=what.method, at=what.at, times=1)
        hub.faults.insert(0, held)
        reached = held.reached.is_set
    else:
        mark = hold(folder, repository, point)
        reached = mark.exists
    asked = running.control.post("/pulls", json={"model": repository})
    assert asked.status_code == 202, asked.text
    until(reached, f"the fetcher is at {point}", 30)
    if point in {"first shard", "second shard"}:
        sent = held.at * SHARD_BYTES if held else 0
        blobs = folder / ("models--" + repository.replace("/", "--")) / "blobs"
        until(lambda: _partial(blobs) > sent - CHUNK_BYTES, "what was sent is on the disk")

    # What isn't verified is no model.
    assert listed(running, repository) is (point in VERIFIED)
    FAULTS[fault](running, repository)
    until(
        lambda: newest(running, repository)["state"] in {"done", "failed"},
        f"it comes to an end: {newest(running, repository)}",
        45,
    )
    done = newest(running, repository)
    assert done["state"] == "done", done
    snapshot = hub.repositories[repository]["main"]
    assert done["commit"] == snapshot.commit
    for name in snapshot.names():
        assert Path(done["folder"], name).read_bytes() == snapshot.data(name)
    assert listed(running, repository)
    # Nothing that was there came again.
    for path, count in hub.sent.items():
        if repository.partition("/")[2] + "/" in path and path.endswith(SHARDS):
            again = 0 if point not in {"first shard", "second shard"} else CHUNK_BYTES
            assert count <= SHARD_BYTES + 10 + again, (path, count)
    if held is not None:
        held.released.set()
    # And nothing is left of what was interrupted.
    until(lambda: not fetchers(running, repository), "no process is left", 10)
    name = "models--" + repository.replace("/", "--")
    assert not list((folder / name / "blobs").glob("*.incomplete"))
    assert sorted(path.name for path in (folder / name / "refs").iterdir()) == sorted(
        ["main", snapshot.commit]
    )
    assert not [
        path
        for path in (folder / ".locks" / name).iterdir()
        if path.name.startswith("reference") or path.name.endswith(".unfinished")
    ]


def _partial(blobs: Path) -> int:
    return max((path.stat().st_size for path in blobs.glob("*.incomplete")), default=0)
