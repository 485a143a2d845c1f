"""Pulls and the removal of models over HTTP."""

from __future__ import annotations

from dataclasses import replace

from conversation import House, request

from tursi.model import PullState


def test_a_pull_is_accepted_and_shown() -> None:
    house = House()
    reply = house.ask("POST", "/pulls", {"model": "org/small"})
    assert (reply.status, reply.json()["id"]) == (202, 7)
    assert reply.json()["asked_at"] == "2023-11-14T22:13:20.000Z"
    assert house.ask("GET", "/pulls").json()["pulls"][0]["progress"]["done"] == 1.0
    assert house.ask("GET", "/pulls/7").json()["model"] == "org/small"
    for method, path in (("POST", "pause"), ("POST", "resume")):
        assert house.ask(method, f"/pulls/7/{path}").status == 202
    assert house.ask("DELETE", "/pulls/7").status == 202
    assert [call[0] for call in house.fleet.pulls.calls] == ["start", "pause", "resume", "cancel"]


def test_no_such_pull() -> None:
    house = House()
    for path in ("/pulls/8", "/pulls/x", "/pulls/-1", "/pulls/" + "9" * 30):
        reply = house.ask("GET", path)
        assert (reply.status, reply.json()["error"]["code"]) == (404, "pull_not_found")
    assert house.ask("DELETE", "/pulls/8").status == 404
    assert house.ask("POST", "/pulls", {"model": "org/small", "x": 1}).status == 400


def test_a_pull_can_be_followed() -> None:
    house = House()
    transport = house.send(request("GET", "/pulls/7?follow=1"))
    house.fleet.pulls.status = done = replace(
        house.fleet.pulls.status, state=PullState.DONE, ended_at=1_700_000_001.0
    )
    house.fleet.pulls.watchers[0](done)
    text = transport.value().decode()
    assert text.index('"state":"running"') < text.index('"state":"done"')
    assert text.endswith("\r\n0\r\n\r\n"), "it has ended with the pull"
    assert house.fleet.pulls.watchers == []
    # Of one that has ended there is nothing to wait for.
    text = house.send(request("GET", "/pulls/7?follow=1")).value().decode()
    assert text.endswith("\r\n0\r\n\r\n")
    assert house.fleet.pulls.watchers == []


def test_following_a_paused_pull_ends_with_the_client() -> None:
    house = House()
    house.fleet.pulls.status = replace(house.fleet.pulls.status, state=PullState.PAUSED)
    transport = house.send(request("GET", "/pulls/7?follow=1"))
    [_] = house.fleet.pulls.watchers
    transport.leave()
    assert house.fleet.pulls.watchers == []


def test_a_model_is_removed_unless_it_is_used() -> None:
    house = House()
    reply = house.ask("DELETE", "/catalogue/org%2Fsmall")
    assert (reply.status, reply.json()["error"]["code"]) == (409, "model_in_use")
    assert house.ask("DELETE", "/catalogue/org/small@v1").json()["models"][0]["size"] == 1000
    assert house.fleet.catalogue.removed == [("org/small@v1", "key 1 (admin)")]
