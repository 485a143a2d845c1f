"""The disk becomes full at each stage of a download, and has room again later."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon import Daemon
from held_fetcher import hold
from patience import until
from small_disk import SmallDisk, may_mount
from stand_in_hub import Fault, StandInHub

HELD = Path(__file__).with_name("held_fetcher.py")
SIZE = 4 * 2**20
STAGES = ("file", "verify", "referred", "said")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInHub]:
    with StandInHub() as hub:
        for stage in STAGES:
            folder = tmp_path_factory.mktemp(stage)
            (folder / "config.json").write_text("{}")
            header = (2).to_bytes(8, "little") + b"{}"
            (folder / "model.safetensors").write_bytes(header + os.urandom(SIZE))
            hub.add(f"someone/{stage}", folder)
        yield hub


@pytest.fixture(scope="module")
def running(hub: StandInHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    if not may_mount():
        pytest.skip("a file system can't be mounted here")
    folder = Path(tempfile.mkdtemp(prefix="tursi-"))
    one = SmallDisk(folder, scripted=True, settings=f'[hub]\nendpoint = "{hub.endpoint}"\n')
    try:
        one.start(
            {
                **hub.environment(tmp_path_factory.mktemp("home")),
                "HF_HUB_OFFLINE": "0",
                "TURSI_TEST_FETCHER": str(HELD),
            }
        )
        one.deploy("echo", one.script(echo=True))
        one.wait("echo")
        yield one
        assert "Traceback" not in one.log.read_text()
    finally:
        one.close()
        shutil.rmtree(folder, ignore_errors=True)


def pull(running: Daemon, number: int) -> dict[str, Any]:
    found: dict[str, Any] = running.control.get(f"/pulls/{number}").json()
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_download_waits_for_room_and_goes_on_alone(
    running: SmallDisk, hub: StandInHub, stage: str
) -> None:
    model = f"someone/{stage}"
    held: Fault | None = None
    reached: Callable[[], bool]
    mark: Path | None = None
    if stage == "file":
        held = Fault(f"{stage}/.*/model.safetensors", "hold", method="GET", times=1)
        hub.faults.append(held)
        reached = held.reached.is_set
    else:
        mark = hold(running.disk / "cache" / "hub", model, stage)
        reached = mark.exists
    number = running.control.post("/pulls", json={"model": model}).json()["id"]
    until(reached, f"it is at {stage}", 30)
    blobs = running.disk / "cache/hub" / ("models--" + model.replace("/", "--")) / "blobs"
    if held is not None:
        until(
            lambda: any(part.stat().st_size >= SIZE * 0.37 for part in blobs.glob("*.incomplete")),
            "what was sent is on the disk",
        )

    running.fill()
    if held is not None:
        held.released.set()
    elif mark is not None:
        mark.unlink()
    if stage == "said":
        # All is there, and only the database has no room for that.
        until(lambda: pull(running, number)["state"] in {"running", "done"}, "it is told", 10)
    else:
        until(lambda: "full" in (pull(running, number)["error"] or ""), "it says why", 20)
        assert pull(running, number)["state"] == "running"
        until(
            lambda: pull(running, number)["next_try_at"] or not pull(running, number)["error"],
            "it tries again",
            20,
        )
    body = {"model": "echo", "input": "hello"}
    assert running.client.post("/v1/embeddings", json=body).status_code == 200

    running.filler.unlink()
    until(lambda: pull(running, number)["state"] != "running", "it comes to an end", 30)
    found = pull(running, number)
    assert (found["state"], found["error"]) == ("done", None), found
    folder = Path(f"/proc/{running.process.pid}/root{found['folder']}")  # type: ignore[union-attr] # it runs
    wanted = hub.repositories[model]["main"].data("model.safetensors")
    assert (folder / "model.safetensors").read_bytes() == wanted
    assert not list(blobs.glob("*.incomplete"))
    # Only what the disk hadn't taken came again.
    sent = sum(count for path, count in hub.sent.items() if f"--{stage}/" in path)
    lost = SIZE // 2 if stage == "file" else 0
    assert sent <= len(wanted) + lost + 2**20
    assert running.control.delete(f"/catalogue/{model}").status_code == 200
    assert not blobs.exists()
