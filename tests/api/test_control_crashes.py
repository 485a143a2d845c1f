"""Crashes and the story of a deployment over the control API."""

from __future__ import annotations

import pytest
from conversation import House


def test_crashes_are_listed_short_and_shown_whole() -> None:
    house = House()
    [short] = house.ask("GET", "/deployments/small/crashes").json()["crashes"]
    assert (short["id"], short["failure"], short["phase"]) == (3, "crash", "ready")
    assert short["at"] == "2023-11-14T22:13:21.000Z"
    assert not {"log", "usage", "traceback", "stacks", "order"} & short.keys()
    whole = house.ask("GET", "/deployments/small/crashes/3").json()
    assert {key: whole[key] for key in short} == short
    assert whole["log"] == ["line"]
    assert whole["order"]["folder"] == "/models/small"
    assert whole["usage"] == [{"at": "2023-11-14T22:13:20.500Z", "rss": 1000, "cpu_seconds": 0.5}]
    assert house.ask("GET", "/deployments/small/crashes?limit=0").json() == {"crashes": []}


@pytest.mark.parametrize("number", ["4", "-1", "x", "%C2%B2", "9" * 30, "3.0"])
def test_an_unknown_crash_is_a_404_with_a_sentence(number: str) -> None:
    reply = House().ask("GET", f"/deployments/small/crashes/{number}")
    assert (reply.status, reply.error["code"]) == (404, "crash_not_found")
    assert "tursi crashes" in reply.error["message"]


@pytest.mark.parametrize("path", ["crashes", "crashes/3", "why"])
def test_what_isnt_deployed_has_none(path: str) -> None:
    reply = House().ask("GET", f"/deployments/nope/{path}")
    assert (reply.status, reply.error["code"]) == (404, "deployment_not_found")


def test_why_is_answered_in_sentences() -> None:
    assert House().ask("GET", "/deployments/small/why").json() == {
        "sentences": ["It is so."],
        "events": [],
        "crash": 3,
    }
