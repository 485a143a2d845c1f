"""Following events and logs."""

from __future__ import annotations

import json
from typing import Any

from conversation import House, Transport, request

from tursi.model import Event


def event(number: int) -> Event:
    return Event(number, 1_700_000_000.0 + number, "worker.ready", "small", f"event {number}")


def follow(house: House, path: str) -> Transport:
    return house.send(request("GET", path))


def events(transport: Transport) -> list[Any]:
    return [
        json.loads(line[6:])
        for line in transport.value().decode().split("\n")
        if line.startswith("data: ")
    ]


def test_events_are_told_from_the_history_on_and_then_as_they_happen() -> None:
    house = House()
    house.fleet.history = [event(1), event(2)]
    transport = follow(house, "/events?follow=1&after=1")
    assert b"Content-Type: text/event-stream" in transport.value()
    assert b"id: 2\ndata: {" in transport.value()
    house.fleet.happen(event(3))
    assert [each["id"] for each in events(transport)] == [2, 3]
    assert events(transport)[0]["at"] == "2023-11-14T22:13:22.000Z"
    transport.leave()
    assert not house.fleet.watchers


def test_what_happens_while_the_history_is_read_is_told_once() -> None:
    house = House()
    house.fleet.history = [event(1)]
    house.fleet.meanwhile = lambda: house.fleet.happen(event(2))
    transport = follow(house, "/deployments/small/events?follow=1")
    assert [each["id"] for each in events(transport)] == [1, 2]
    transport.leave()


def test_lines_of_a_log_are_told_once_and_in_order() -> None:
    house = House()
    house.fleet.lines = ["a", "b"]
    house.fleet.meanwhile = lambda: house.fleet.write("c")
    transport = follow(house, "/deployments/small/logs?follow=1&lines=10")
    house.fleet.meanwhile = lambda: None
    house.fleet.write("d \u2028 \n")
    assert events(transport) == ["a", "b", "c", "d \u2028 \n"]
    transport.leave()
    assert not house.fleet.followers


def test_a_quiet_stream_is_kept_alive() -> None:
    house = House()
    transport = follow(house, "/events?follow=1&limit=0")
    assert events(transport) == []
    house.clock.pump([1.0] * 31)
    assert transport.value().count(b": keep-alive\n\n") == 2
    house.clock.pump([10.0] * 100)
    assert not transport.disconnecting
    transport.leave()
    assert not house.clock.getDelayedCalls()


def test_a_reader_that_stops_reading_is_cut() -> None:
    house = House()
    channel, transport = house.connect()
    channel.dataReceived(request("GET", "/deployments/small/logs?follow=1"))
    channel.pauseProducing()
    for _ in range(200):
        house.fleet.write("x" * 1000)
    assert not transport.aborted
    channel.resumeProducing()
    assert len(events(transport)) == 200
    channel.pauseProducing()
    for _ in range(300):
        house.fleet.write("x" * 1000)
    assert transport.aborted
    transport.leave()
    assert not house.fleet.followers


def test_head_of_a_stream_ends() -> None:
    house = House()
    transport = house.send(request("HEAD", "/events?follow=1"))
    assert transport.value().startswith(b"HTTP/1.1 200 OK")
    assert not house.fleet.watchers
