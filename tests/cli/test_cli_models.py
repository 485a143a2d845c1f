"""``tursi pull``, ``pulls``, ``models`` and ``rm`` against scripted answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_api import Api, Reply, refusal, scripted_api

from tursi.cli.connection import Exit

PULL = {
    "id": 7,
    "model": "org/mini",
    "state": "running",
    "asked_at": "2026-01-02T03:04:05Z",
    "asked_by": "uid 0",
    "ended_at": None,
    "error": None,
    "folder": None,
    "commit": None,
    "size": None,
    "progress": None,
    "rate": None,
    "remaining_seconds": None,
    "next_try_at": None,
}
COMING = {
    **PULL,
    "progress": {"stage": "download", "done": 1 << 20, "total": 4 << 20, "unit": "bytes"},
    "rate": 1 << 19,
    "remaining_seconds": 71.0,
}
DONE = {**PULL, "state": "done", "commit": "a" * 40, "size": 4 << 20, "folder": "/cache"}


@pytest.fixture
def api() -> Iterator[Api]:
    with scripted_api() as running:
        running.on("POST", "/pulls", Reply(PULL, 202))
        yield running


def stream(*statuses: dict[str, Any]) -> Reply:
    return Reply(pieces=[f"data: {json.dumps(status)}\n\n" for status in statuses])


def test_pull_shows_how_it_goes_until_it_is_there(api: Api) -> None:
    api.on("GET", "/pulls/7", stream(PULL, COMING, DONE))
    result = api.tursi("pull", "org/mini")
    assert result.exit_code == Exit.OK, result.output
    assert result.stdout == "org/mini is on the disk (4 MiB, commit aaaaaaaaaaaa).\n"
    assert result.stderr.splitlines() == [
        "org/mini: waiting for its turn",
        "org/mini: fetching at 512 KiB/s, 71 s left: 1 MiB of 4 MiB (25 %)",
    ]
    assert api.asked[0].body == {"model": "org/mini"}
    assert api.tursi("pull", "org/mini", "--allow-pickle", "--no-wait").exit_code == Exit.OK
    assert api.asked[-1].body == {"model": "org/mini", "allow_pickle": True}
    assert json.loads(api.tursi("pull", "org/mini", "--json").stdout)["state"] == "done"


def test_pull_says_what_failed_and_what_ended(api: Api) -> None:
    failed = {**PULL, "state": "failed", "error": "The hub has no model org/mini."}
    api.on("GET", "/pulls/7", stream(failed))
    result = api.tursi("pull", "org/mini")
    assert (result.exit_code, result.stdout) == (
        Exit.FAILED,
        "org/mini could not be downloaded.\n",
    )
    assert "has no model org/mini" in result.stderr
    api.on("GET", "/pulls/7", stream({**PULL, "state": "paused"}))
    assert "is paused" in api.tursi("pull", "org/mini").stdout
    api.on("GET", "/pulls/7", stream(COMING))
    assert api.tursi("pull", "org/mini").exit_code == Exit.NO_DAEMON
    assert "is coming" in api.tursi("pull", "org/mini", "--no-wait").stdout
    assert api.tursi("pull", "/models/mini").exit_code == Exit.USAGE
    assert api.tursi("pull", "org/../mini").exit_code == Exit.USAGE


def test_a_pull_is_paused_and_cancelled_by_its_model(api: Api) -> None:
    api.on("GET", "/pulls", {"pulls": [DONE, {**COMING, "id": 8}]})
    api.on("POST", "/pulls/8/pause", Reply({**PULL, "state": "paused"}, 202))
    api.on("DELETE", "/pulls/8", Reply({**PULL, "state": "cancelled"}, 202))
    assert api.tursi("pull", "--pause", "org/mini").stdout == (
        "org/mini is paused; `tursi pull org/mini` goes on.\n"
    )
    assert api.tursi("pull", "--cancel", "org/mini").stdout == "org/mini is given up.\n"
    assert api.tursi("pull", "--cancel", "org/other").exit_code == Exit.NOT_FOUND


def test_pulls_lists_them(api: Api) -> None:
    waiting = {**PULL, "error": "It rests.", "next_try_at": "2026-01-02T03:04:05Z"}
    api.on("GET", "/pulls", {"pulls": [COMING, DONE, waiting]})
    header, coming, done, again, reason = api.tursi("pulls").stdout.splitlines()
    assert header.split() == ["WHEN", "BY", "STATE", "PROGRESS", "MODEL"]
    assert "512 KiB/s" in coming
    assert done.split()[-4:] == ["done", "4", "MiB", "org/mini"]
    assert "next try at 2026-01-02" in again
    assert reason == "org/mini: It rests."
    api.on("GET", "/pulls", {"pulls": []})
    assert "Nothing has been pulled" in api.tursi("pulls").stdout


def test_models_and_rm(api: Api) -> None:
    entry = {
        "name": "org/mini",
        "folder": "/cache/mini",
        "size": 4 << 20,
        "commit": "a" * 40,
        "used_by": ["mini", "other"],
        "used_at": "2026-01-02T03:04:05Z",
    }
    folder = {**entry, "name": "mine", "commit": None, "size": 0, "used_at": None, "used_by": []}
    api.on("GET", "/catalogue", {"models": [entry, folder]})
    _, first, second = api.tursi("models").stdout.splitlines()
    assert first.split()[:4] == ["org/mini", "a" * 12, "4", "MiB"]
    assert "mini, other" in first
    assert second.split() == ["mine", "-", "-", "-", "-", "/cache/mini"]
    api.on("DELETE", "/catalogue/org%2Fmini", {"models": [entry]})
    assert api.tursi("rm", "org/mini").stdout == "org/mini aaaaaaaaaaaa is removed (4 MiB).\n"
    api.on("DELETE", "/catalogue/org%2Fmini", refusal(409, "model_in_use", "mini uses it."))
    result = api.tursi("rm", "org/mini")
    assert (result.exit_code, result.stderr) == (Exit.FAILED, "tursi: mini uses it.\n")
    assert api.tursi("rm", "/models/mine").exit_code == Exit.USAGE
