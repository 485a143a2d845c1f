"""Pulls by a real daemon from a stand-in hub: watched, killed, paused, shared, removed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon import Daemon, daemon
from patience import until
from stand_in_hub import Fault, StandInHub

from tursi import sandbox

MODEL = "someone/tiny"
MAIN = r"/content/[^/]+/[^/]+/model.safetensors"
WEIGHTS = (2).to_bytes(8, "little") + b"{}" + bytes(3_000_000)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StandInHub]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    with StandInHub() as hub:
        hub.add(MODEL, folder)
        yield hub


@pytest.fixture
def running(hub: StandInHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Daemon]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    with daemon(scripted=True, settings=f'[hub]\nendpoint = "{hub.endpoint}"\n') as one:
        yield one


def pull(running: Daemon) -> dict[str, Any]:
    answer = running.control.post("/pulls", json={"model": MODEL})
    assert answer.status_code == 202, answer.text
    status: dict[str, Any] = answer.json()
    return status


def status(running: Daemon, number: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = running.control.get(f"/pulls/{number}").json()
    return found


def half(running: Daemon) -> bool:
    progress = status(running)["progress"]
    return bool(progress and progress["stage"] == "download" and progress["done"] > 1_500_100)


def done(running: Daemon, number: int = 1) -> bool:
    found = status(running, number)
    assert found["state"] in {"running", "done"}, found
    return bool(found["state"] == "done")


def ranges(hub: StandInHub) -> list[str]:
    return [seen.range for seen in hub.seen if seen.range and re.search(MAIN, seen.path)]


def test_a_daemon_that_is_killed_goes_on_with_its_pulls_where_they_were(
    running: Daemon, hub: StandInHub
) -> None:
    hub.faults.append(Fault(MAIN, "slow", method="GET", times=1, seconds=0.5))
    assert pull(running)["state"] == "running"
    until(lambda: half(running), "half of it is there")
    running.kill()
    until(lambda: not running.tree(), "the fetcher is gone")
    running.start()
    until(lambda: done(running), "the pull is done")
    [rest] = ranges(hub)
    assert int(rest.removeprefix("bytes=").removesuffix("-")) > 1_000_000
    found = status(running)
    assert Path(found["folder"], "model.safetensors").read_bytes() == WEIGHTS
    assert [each["kind"] for each in running.control.get("/events").json()["events"]][:1] == [
        "pull"
    ]


def test_a_paused_pull_is_gone_on_with_and_a_cancelled_one_ended(
    running: Daemon, hub: StandInHub
) -> None:
    hub.faults.append(Fault(MAIN, "slow", method="GET", times=1, seconds=0.5))
    pull(running)
    until(lambda: half(running), "half of it is there")
    assert running.control.post("/pulls/1/pause").json()["state"] == "paused"
    until(lambda: not running.tree(), "the fetcher is gone")
    running.stop()
    running.start()
    assert status(running)["state"] == "paused"
    assert running.control.post("/pulls/1/resume").json()["state"] == "running"
    until(lambda: done(running), "the pull is done")
    assert len(ranges(hub)) == 1
    hub.faults.append(Fault("/api/models/someone/tiny", status=503, headers={"Retry-After": "7"}))
    assert running.control.delete("/catalogue/someone/tiny").json()["models"][0]["commit"]
    pull(running)
    until(lambda: status(running, 2)["next_try_at"], "the hub is left alone for a while")
    assert running.control.delete("/pulls/2").json()["state"] == "cancelled"


def test_what_had_arrived_of_a_cancelled_pull_can_be_removed(
    running: Daemon, hub: StandInHub
) -> None:
    held = Fault(MAIN, "hold", method="GET", times=1)
    hub.faults.append(held)
    pull(running)
    assert held.reached.wait(30)
    place = running.state / "cache/hub/models--someone--tiny"
    until(lambda: list(place.glob("blobs/*.incomplete")), "some of it has come")
    assert running.control.delete("/pulls/1").json()["state"] == "cancelled"
    until(lambda: not running.tree(), "the fetcher is gone")
    assert running.control.get("/catalogue").json()["models"] == []
    answer = running.control.delete("/catalogue/someone/tiny")
    assert (answer.status_code, answer.json()["models"]) == (200, [])
    assert not place.exists()
    assert running.control.delete("/catalogue/someone/tiny").status_code == 404


def test_a_pull_and_a_deployment_share_a_download_and_what_serves_stays(
    running: Daemon, hub: StandInHub
) -> None:
    pull(running)
    running.deploy("tiny", MODEL)
    running.wait("tiny")
    until(lambda: done(running), "the pull is done")
    weights = [path for path in hub.downloads() if re.search(MAIN, path)]
    assert len(weights) == 1
    refused = running.control.delete("/catalogue/someone/tiny")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_in_use")
    running.control.delete("/deployments/tiny")
    until(
        lambda: running.control.delete("/catalogue/someone/tiny").status_code == 200,
        "what nobody uses can be removed",
    )
    assert running.control.get("/catalogue").json()["models"] == []


SECRET = "hf_a_secret_that_nobody_else_has"


def test_the_token_is_the_fetchers_alone(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.token = SECRET
    held = Fault(MAIN, "hold", method="GET", times=1)
    hub.faults.append(held)
    environment = {
        **hub.environment(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": SECRET,
        "HUGGING_FACE_HUB_TOKEN": SECRET,
    }
    with daemon(
        scripted=True,
        settings=f'[hub]\nendpoint = "{hub.endpoint}"\n',
        environment=environment,
    ) as running:
        running.deploy("local", running.script("local", echo=True))
        running.wait("local")
        running.deploy("tiny", MODEL)
        assert held.reached.wait(30)
        fetching = [each for each in running.tree() if "tursi.fetcher" in each.cmdline()]
        assert fetching
        others = [each for each in running.tree() if each not in fetching]
        assert others
        assert not any(SECRET in word for each in running.tree() for word in each.cmdline())
        assert not any(SECRET in value for each in others for value in each.environ().values())
        held.released.set()
        running.wait("tiny")
        assert not any(
            SECRET in value for each in running.tree() for value in each.environ().values()
        )
        hub.token = "hf_another"
        refused = running.control.post("/pulls", json={"model": MODEL}).json()["id"]
        until(lambda: status(running, refused)["state"] == "failed", "the hub refuses it")
        assert "refuses the token" in status(running, refused)["error"]
        assert running.stop() == 0
        written = [path for path in running.folder.rglob("*") if path.is_file()]
        assert running.log in written
        assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    content = [seen for seen in hub.seen if seen.path.startswith("/content/")]
    assert content
    assert all(seen.token is None for seen in content)


def test_a_fetcher_can_do_nothing_but_fetch(hub: StandInHub, tmp_path: Path) -> None:
    version = sandbox.landlock_version()
    if version is None:
        pytest.skip("this kernel has no Landlock")
    environment = {
        **hub.environment(tmp_path / "home"),
        "TURSI_TEST_FETCHER": str(Path(__file__).with_name("curious_fetcher.py")),
        # Whom it would like to end.
        "HF_HOME": f"/nowhere/{os.getpid()}",
    }
    settings = f'[hub]\nendpoint = "{hub.endpoint}"\n'
    with daemon(scripted=True, settings=settings, environment=environment) as running:
        number = pull(running)["id"]
        until(lambda: status(running, number)["state"] == "failed", "it has tried")
        done = json.loads(status(running, number)["error"])
        assert "write to the cache" in done
        allowed = {"write to the cache", "reach the hub", "end itself"}
        if version < 6:
            allowed |= {"end the daemon"}
        assert set(done) == allowed
