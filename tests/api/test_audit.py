"""Every change, asked for or refused, is in the audit; and nobody can flood it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conversation import House, request
from fake_fleet import FakeFleet
from fakes import InlineReactor, InlineThreadPool

from twisted.internet.defer import Deferred

from tursi.api.audit import REFUSALS, is_change
from tursi.api.openapi import PART
from tursi.errors import DatabaseFull
from tursi.model import AuditEntry, Role


def entries(house: House) -> list[tuple[str, str | None, int | None, str | None]]:
    return [(each.action, each.target, each.status, each.code) for each in house.fleet.audited]


def test_changes_are_recorded_with_who_what_and_how_it_ended() -> None:
    house = House()
    headers = {"X-Request-Id": "mine"}
    house.ask("PUT", "/deployments/new", {"model": "org/new"}, headers=headers)
    [entry] = house.fleet.audited
    assert (entry.by, entry.key, entry.address, entry.uid, entry.request) == (
        "key 1 (admin)", 1, "127.0.0.1", None, "mine",
    )  # fmt: skip
    house.ask("PUT", "/deployments/new", {"model": "org/new"})
    house.ask("POST", "/deployments/new/stop")
    house.ask("POST", "/deployments/none/stop")
    house.ask("POST", "/deployments/new/scale", {"replicas": "many"})
    house.ask("POST", "/deployments", {"model": "org/other"})
    assert entries(house) == [
        ("deployments.put", "new", 201, None),
        ("deployments.put", "new", 200, None),
        ("deployments.stop", "new", 202, None),
        ("deployments.stop", "none", 404, "deployment_not_found"),
        ("deployments.scale", "new", 400, "invalid_request"),
        ("deployments.create", "org/other", 201, None),
    ]


def test_reading_and_inference_are_not() -> None:
    house = House()
    for path in ("/deployments", "/audit", "/status", "/health", "/v1/models"):
        assert house.ask("GET", path).status == 200
    house.send(request("POST", "/v1/embeddings", {"model": "small", "input": "x"}))
    assert house.ask("POST", "/nowhere", {}).status == 404
    assert house.ask("POST", "/status", {}).status == 405
    evil = {"Origin": "https://evil.example"}
    assert house.ask("GET", "/deployments", headers=evil).status == 403
    assert house.ask("POST", "/v1/embeddings", {}, headers=evil).status == 403
    assert house.fleet.audited == []


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_every_change_of_every_route_is_recorded_when_it_is_refused(method: str) -> None:
    for contract, _ in House().front.handlers:
        if contract.method != method:
            continue
        assert is_change(contract) or contract.role is not Role.CONTROL
        path = PART.sub("small", contract.path)
        for headers, roles, code in (
            ({"Origin": "null"}, tuple(Role), "origin_refused"),
            ({"Host": "evil.example"}, tuple(Role), "host_refused"),
            ({}, (Role.INFERENCE,), "role_not_offered"),
        ):
            house = House()
            reply = house.ask(method, path, headers=headers, roles=roles)
            assert reply.error["code"] == code
            [entry] = house.fleet.audited
            assert (entry.status, entry.code) == (reply.status, code)


def test_strangers_do_not_wash_it_out() -> None:
    house = House()
    for _ in range(REFUSALS + 5):
        house.ask("DELETE", "/deployments/small", headers={"Origin": "null"})
    house.ask("DELETE", "/deployments/none")
    assert len(house.fleet.audited) == REFUSALS + 1
    assert b'tursi_dropped_total{kind="refusal"} 5' in house.ask("GET", "/metrics").body
    house.clock.advance(60)
    house.ask("DELETE", "/deployments/small", headers={"Origin": "null"})
    assert len(house.fleet.audited) == REFUSALS + 2


def test_a_change_is_answered_when_its_entry_is_written() -> None:
    fleet = FakeFleet(recording=Deferred())
    house = House(fleet)
    transport = house.send(request("POST", "/deployments/small/stop"))
    assert transport.value() == b""
    assert fleet.recording is not None
    fleet.recording.callback(None)
    assert b"202 Accepted" in transport.value()
    assert len(fleet.audited) == 1


def test_a_change_whose_client_has_left_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House()
    waiting: Deferred[None] = Deferred()

    async def slow(name: str, by: str) -> object:
        await waiting
        return house.fleet.deployment(name)

    monkeypatch.setattr(house.fleet, "stop", slow)
    transport = house.send(request("POST", "/deployments/small/stop"))
    transport.leave()
    assert house.fleet.audited == []
    waiting.callback(None)
    assert entries(house) == [("deployments.stop", "small", 202, None)]


def test_a_failure_is_answered_without_waiting_for_its_entry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = FakeFleet(recording=Deferred())

    async def full(name: str, by: str) -> object:
        raise DatabaseFull

    monkeypatch.setattr(fleet, "stop", full)
    assert House(fleet).ask("POST", "/deployments/small/stop").status == 507


def test_it_can_be_read() -> None:
    house = House()
    house.fleet.audited = [
        AuditEntry(1, 1_700_000_000.0, "uid 7", "deployments.stop", "small", 202, uid=7)
    ]
    reply = house.ask(
        "GET", "/audit?since=2023-11-14T22:13:20Z&who=uid%207&action=deployments&limit=5"
    )
    assert reply.status == 200
    [entry] = reply.json()["entries"]
    assert entry["at"] == "2023-11-14T22:13:20.000Z"
    assert (entry["by"], entry["uid"], entry["action"]) == ("uid 7", 7, "deployments.stop")
    [(_, query)] = house.fleet.calls
    assert query == type(query)(1_700_000_000.0, "uid 7", "deployments", None, 5)  # type: ignore[call-arg]
    assert house.ask("GET", "/audit?since=yesterday").status == 400
    assert house.ask("GET", "/audit?since=2023-11-14T22:13:20").status == 400
    assert house.ask("GET", "/audit?limit=1001").status == 400


# -- the database ------------------------------------------------------------------


def test_the_report_of_the_database() -> None:
    reply = House().ask("GET", "/database")
    assert reply.json() == {
        "path": "/state/tursi.sqlite",
        "size": 4096,
        "schema": 2,
        "problems": ["page 3"],
        "copies": ["/state/copy"],
    }


def test_a_copy_is_sent_and_gone(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    copy = tmp_path / "copy"
    copy.write_bytes(content)
    house = House(FakeFleet(copy=copy))
    threads: Any = house.clock
    threads.getThreadPool, threads.callFromThread = InlineThreadPool, InlineReactor().callFromThread
    reply = house.ask("POST", "/database/backup")
    assert (reply.status, reply.body) == (200, content)
    assert reply.headers["Content-Type"] == "application/vnd.sqlite3"
    assert not copy.exists()
    assert entries(house) == [("database.backup", None, 200, None)]
