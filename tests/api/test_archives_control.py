"""Bodies that are handed on while they arrive, and answers that are made as they leave."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conversation import House, Transport, parse, request
from fake_fleet import FakeFleet
from fakes import InlineReactor, InlineThreadPool

from twisted.internet.defer import Deferred

from tursi.api.channel import Channel
from tursi.api.upload import STALL_SECONDS
from tursi.errors import ArchiveInvalid, FilesUnavailable
from tursi.model import Trust

TAR = {"Content-Type": "application/x-tar"}

pytestmark = pytest.mark.usefixtures("both_paths")


def begin(
    house: House, path: str = "/imports", length: int | None = 10, **headers: str | None
) -> tuple[Channel, Transport]:
    channel, transport = house.connect()
    framing = (
        {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": str(length)}
    )
    channel.dataReceived(request("POST", path, headers={**TAR, **framing, **headers}))
    return channel, transport


def audited(house: House) -> list[Any]:
    return [(one.action, one.target, one.status, one.code) for one in house.fleet.audited]


def test_a_body_is_handed_on_while_it_arrives() -> None:
    house = House()
    channel, transport = begin(house, "/imports?name=mine&allow_pickle=1")
    assert house.fleet.archives.calls == [
        ("import", "mine", Trust(allow_pickle=True), False, "key 1 (admin)")
    ]
    channel.dataReceived(b"12345")
    assert house.fleet.archives.taken == [b"12345"]
    assert transport.value() == b""
    channel.dataReceived(b"67890")
    reply = parse(transport.value())
    assert (reply.status, reply.json()["outcome"]) == (201, "created")
    assert b"".join(house.fleet.archives.taken) == b"1234567890"
    assert audited(house) == [("imports", "mine", 201, None)]
    transport.clear()
    # The connection goes on.
    channel.dataReceived(request("GET", "/status"))
    assert parse(transport.value()).status == 200


def test_the_audit_has_the_name_that_came_with_the_archive() -> None:
    house = House()
    channel, _ = begin(house)
    channel.dataReceived(b"1234567890")
    assert audited(house) == [("imports", "small", 201, None)]


def test_a_dry_run_is_no_change() -> None:
    house = House()
    channel, transport = begin(house, "/imports?dry_run=1")
    channel.dataReceived(b"1234567890")
    reply = parse(transport.value())
    assert (reply.status, reply.json()["outcome"]) == (200, "created")
    assert audited(house) == []


def test_chunks_of_any_number_make_a_body() -> None:
    house = House()
    channel, transport = begin(house, length=None)
    for _ in range(20_000):
        channel.dataReceived(b"1\r\nx\r\n")
    channel.dataReceived(b"0\r\n\r\n")
    assert parse(transport.value()).status == 201
    assert b"".join(house.fleet.archives.taken) == b"x" * 20_000


def test_who_sends_faster_than_it_is_taken_is_made_to_wait() -> None:
    house = House()
    held: Deferred[None] = Deferred()
    house.fleet.archives.wait = held
    channel, transport = begin(house, length=5 << 20)
    megabyte = b"x" * (1 << 20)
    channel.dataReceived(megabyte)
    assert transport.producerState == "producing"
    channel.dataReceived(megabyte)
    assert transport.producerState == "paused"
    # However long the disk takes.
    house.clock.advance(STALL_SECONDS * 3)
    assert transport.value() == b""
    house.fleet.archives.wait = None
    held.callback(None)
    assert transport.producerState == "producing"
    for _ in range(3):
        channel.dataReceived(megabyte)
    assert parse(transport.value()).status == 201
    assert len(b"".join(house.fleet.archives.taken)) == 5 << 20


def test_who_is_refused_in_the_middle_is_told_then() -> None:
    house = House()
    house.fleet.archives.refuse = ArchiveInvalid("It is damaged.")
    channel, transport = begin(house, length=1 << 40)
    channel.dataReceived(b"x" * 1000)
    reply = parse(transport.value())
    assert (reply.status, reply.error["code"]) == (400, "archive_invalid")
    assert transport.half_closed
    said = transport.value()
    channel.dataReceived(b"x" * 100_000)
    assert transport.value() == said
    assert house.fleet.archives.taken == [b"x" * 1000]
    assert audited(house) == [("imports", None, 400, "archive_invalid")]
    house.clock.advance(10)
    assert transport.aborted


def test_who_leaves_in_the_middle_is_given_up() -> None:
    house = House()
    channel, transport = begin(house)
    channel.dataReceived(b"12345")
    transport.leave()
    assert house.fleet.archives.left == 1
    assert audited(house) == [("imports", None, 499, "request_cancelled")]


def test_who_sends_nothing_any_more_is_given_up() -> None:
    house = House()
    channel, transport = begin(house)
    for _ in range(4):
        house.clock.advance(STALL_SECONDS - 5)
        channel.dataReceived(b"x")
    assert transport.value() == b""
    house.clock.advance(STALL_SECONDS + 5)
    assert parse(transport.value()).error["code"] == "request_timeout"
    house.clock.advance(10)
    transport.leave()
    assert house.fleet.archives.left == 1


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/imports", {"Content-Type": "application/json"}, 415),
        ("/imports", {"Content-Type": None}, 415),
        ("/imports", {"Authorization": None}, 401),
        ("/imports?surprise=1", {}, 400),
        ("/imports", {"Host": "evil.example"}, 403),
        ("/imports", {"Origin": "https://evil.example"}, 403),
    ],
)
def test_what_is_refused_by_its_headers_is_not_waited_for(
    path: str, headers: dict[str, str | None], status: int
) -> None:
    house = House()
    _, transport = begin(house, path, 1 << 40, **headers)
    assert parse(transport.value()).status == status
    assert transport.half_closed
    assert house.fleet.archives.calls == []


def test_nothing_else_takes_a_large_body() -> None:
    house = House()
    for method, path in (("POST", "/deployments"), ("PUT", "/imports"), ("POST", "/imports/x")):
        channel, transport = house.connect()
        channel.dataReceived(request(method, path, headers={**TAR, "Content-Length": str(1 << 40)}))
        assert parse(transport.value()).status == 413
    assert house.fleet.archives.calls == []


# -- exports --------------------------------------------------------------------------------


def threaded() -> House:
    house = House(FakeFleet())
    threads: Any = house.clock
    threads.getThreadPool, threads.callFromThread = InlineThreadPool, InlineReactor().callFromThread
    return house


def test_an_archive_leaves_piece_by_piece() -> None:
    house = threaded()
    house.fleet.archives.exported = [b"an ", b"", b"archive"]
    reply = house.ask("POST", "/deployments/small/export")
    assert (reply.status, reply.body) == (200, b"an archive")
    assert reply.headers["Content-Type"] == "application/x-tar"
    assert 'filename="small.tar"' in reply.headers["Content-Disposition"]
    assert audited(house) == [("deployments.export", "small", 200, None)]


def test_an_export_that_breaks_off_is_no_whole_answer() -> None:
    house = threaded()

    def pieces() -> Any:
        yield b"an "
        raise FilesUnavailable("It was changed.")

    house.fleet.archives.exported = pieces()
    transport = house.send(request("POST", "/deployments/small/export"))
    assert transport.aborted
    assert transport.value().endswith(b"an ")
    assert b"Content-Length: 10\r\n" in transport.value()


def test_who_leaves_during_an_export_ends_it() -> None:
    house = threaded()
    ended: list[str] = []
    channel, transport = house.connect()

    def pieces() -> Any:
        try:
            yield b"an "
            channel.pauseProducing()
            yield b"arc"
            yield b"hive"
        finally:
            ended.append("closed")

    house.fleet.archives.exported = pieces()
    channel.dataReceived(request("POST", "/deployments/small/export"))
    assert transport.value().endswith(b"an arc")
    assert ended == []
    transport.leave()
    assert ended == ["closed"]


def test_what_cannot_be_exported_says_why() -> None:
    reply = threaded().ask("POST", "/deployments/small/export")
    assert (reply.status, reply.error["code"]) == (409, "files_unavailable")
    assert json.loads(reply.body)["error"]["message"]
