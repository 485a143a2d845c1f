"""Deadlines and limits of a connection, in memory and with a clock of our own."""

from __future__ import annotations

from typing import Any

import pytest
from conversation import House, parse, request

from twisted.internet.address import IPv4Address

from tursi.api.site import Site
from tursi.config import Http
from tursi.model import Role

pytestmark = pytest.mark.usefixtures("both_paths")
HTTP = Http(
    header_seconds=4,
    body_seconds=8,
    idle_seconds=20,
    max_control_body=2048,
    max_inference_body=4096,
    max_connections=2,
)
BODY = {"model": "small", "input": "hello"}
OTHERS = [IPv4Address("TCP", f"192.0.2.{number}", 1) for number in (1, 2)]


def enter(house: House, site: Site) -> Any:
    """One more connection, a little later."""
    house.clock.advance(0.01)
    channel = house.accept(site)
    assert channel is not None
    return channel


@pytest.fixture
def house() -> House:
    return House(http=HTTP)


def test_an_idle_connection_is_closed(house: House) -> None:
    _, transport = house.connect()
    house.clock.pump([1] * 19)
    assert not transport.disconnecting
    house.clock.pump([1] * 2)
    assert transport.disconnecting
    assert transport.value() == b""


def test_slow_headers_are_cut_however_they_trickle(house: House) -> None:
    channel, transport = house.connect()
    for byte in b"GET / HT":
        channel.dataReceived(bytes([byte]))
        house.clock.advance(0.75)
    reply = parse(transport.value())
    assert (reply.status, reply.error["code"]) == (408, "request_timeout")
    assert transport.half_closed
    house.clock.pump([1] * 4)
    assert transport.aborted


def test_a_slow_body_is_cut_however_it_trickles(house: House) -> None:
    channel, transport = house.connect()
    channel.dataReceived(request("POST", "/v1/embeddings", headers={"Content-Length": "1000"}))
    for _ in range(6):
        house.clock.advance(1)
        channel.dataReceived(b"x")
    assert transport.value() == b""
    house.clock.pump([1] * 3)
    assert parse(transport.value()).status == 408


def test_the_deadline_of_the_headers_begins_anew_with_each_request(house: House) -> None:
    channel, transport = house.connect()
    for _ in range(5):
        channel.dataReceived(request("GET", "/health"))
        house.clock.pump([1] * 3)
    assert transport.value().count(b"HTTP/1.1 200 OK") == 5
    channel.dataReceived(b"G")
    house.clock.pump([1] * 6)
    assert b"HTTP/1.1 408 " in transport.value()


def test_a_pipelined_request_has_a_deadline_too(house: House) -> None:
    channel, transport = house.connect()
    channel.dataReceived(request("POST", "/v1/embeddings", BODY) + b"GET /hea")
    house.clock.pump([1] * 30)
    assert transport.value() == b""
    house.fleet.passages[0].answer(b"{}")
    house.clock.pump([1] * 6)
    assert b"HTTP/1.1 408 " in transport.value()


def test_an_answer_may_take_longer_than_any_of_them(house: House) -> None:
    _, transport = house.connect()
    transport.channel.dataReceived(request("POST", "/v1/embeddings", BODY))
    house.clock.pump([1] * 100)
    assert not transport.disconnecting
    house.fleet.passages[0].answer(b"{}")
    assert parse(transport.value()).status == 200


def test_an_idle_connection_that_does_not_close_is_cut(house: House) -> None:
    _, transport = house.connect()
    house.clock.pump([1] * 40)
    assert transport.aborted


def test_no_timer_is_left(house: House) -> None:
    _, transport = house.connect()
    assert house.clock.getDelayedCalls()
    transport.leave()
    assert not house.clock.getDelayedCalls()


def test_connections_are_bounded(house: House) -> None:
    site = house.front.site(tuple(Role))
    channels = [enter(house, site) for _ in range(HTTP.max_connections)]
    # Who has sent nothing makes room.
    another = enter(house, site)
    assert [each.transport.aborted for each in (*channels, another)] == [True, False, False]
    assert len(site.channels) == HTTP.max_connections
    for each in (channels[1], another):
        each.dataReceived(request("POST", "/v1/embeddings", BODY))
    assert house.accept(site) is None
    another.connectionLost()
    assert house.accept(site) is not None


def test_one_address_does_not_get_all_connections() -> None:
    house = House(http=Http(max_connections=4, max_connections_per_peer=2))
    site = house.front.site(())
    flood = [enter(house, site) for _ in range(2)]
    assert house.accept(site) is None
    others = [house.accept(site, peer) for peer in OTHERS]
    assert None not in others
    # The one who has most makes room for one more.
    last = house.accept(site, IPv4Address("TCP", "192.0.2.9", 1))
    assert last is not None
    assert flood[0].transport.aborted
    proxied = house.front.site((), is_proxied=True)
    assert None not in [house.accept(proxied) for _ in range(4)]


# -- sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "limit"), [("/deployments", 2048), ("/v1/embeddings", 4096), ("/nothing", 2048)]
)
def test_a_body_is_bounded_by_what_its_path_takes(house: House, path: str, limit: int) -> None:
    said = house.send(request("POST", path, headers={"Content-Length": str(limit + 1)}))
    reply = parse(said.value())
    assert (reply.status, reply.error["code"]) == (413, "payload_too_large")
    assert str(limit) in reply.error["message"]
    assert said.half_closed
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    headers = {"Transfer-Encoding": "chunked"}
    fits = house.send(request("POST", path, headers=headers) + chunk * (limit // 1024))
    assert fits.value() == b""
    over = house.send(request("POST", path, headers=headers) + chunk * (limit // 1024 + 1))
    assert parse(over.value()).status == 413
    over.channel.dataReceived(chunk * 1000)
    assert over.value().count(b"HTTP/1.1 4") == 1
    assert over.channel.requests[-1].body.count(b"x") == limit


def test_get_takes_no_large_body(house: House) -> None:
    transport = house.send(request("GET", "/v1/embeddings", headers={"Content-Length": "4096"}))
    assert parse(transport.value()).status == 413


def test_the_chunks_of_a_body_are_bounded() -> None:
    house = House()
    headers = {"Transfer-Encoding": "chunked"}
    transport = house.send(request("POST", "/v1/embeddings", headers=headers))
    transport.channel.dataReceived(b"1\r\nx\r\n" * 16384)
    assert transport.value() == b""
    transport.channel.dataReceived(b"1\r\nx\r\n")
    reply = parse(transport.value())
    assert (reply.status, reply.error["code"]) == (413, "payload_too_large")
    assert "chunks" in reply.error["message"]


def test_a_client_that_asks_before_it_sends_is_told_at_once(house: House) -> None:
    asked = {"Expect": "100-continue", "Content-Length": "100"}
    transport = house.send(request("POST", "/v1/embeddings", headers=asked))
    assert transport.value() == b"HTTP/1.1 100 Continue\r\n\r\n"
    refused = {"Expect": "100-continue", "Content-Length": "100000"}
    transport = house.send(request("POST", "/v1/embeddings", headers=refused))
    assert transport.value().startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in transport.value()


def test_what_follows_a_refused_request_is_not_answered(house: House) -> None:
    bad = request("POST", "/v1/embeddings", headers={"Content-Length": "100000"})
    transport = house.send(bad + request("GET", "/health"))
    transport.channel.dataReceived(request("GET", "/health"))
    assert transport.value().count(b"HTTP/1.1 4") == 1


# -- what isn't HTTP ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"G\x00T / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Name: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 17000 + b"\r\n\r\n",
        b"GET /" + b"x" * 17000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 101 + b"\r\n",
    ],
)  # fmt: skip
def test_what_is_not_http_is_refused_in_json_and_closed(data: bytes) -> None:
    transport = House().send(data)
    reply = parse(transport.value())
    assert (reply.status, reply.error["code"]) == (400, "invalid_request")
    assert reply.headers["X-Request-Id"]
    assert reply.headers["Connection"] == "close"
    assert transport.value().count(b"HTTP/1.1 4") == 1
    assert transport.half_closed


# -- ids ---------------------------------------------------------------------------------


def test_every_answer_has_an_id_of_its_own(house: House) -> None:
    ids = {
        house.ask("GET", path).headers["X-Request-Id"]
        for path in ("/health", "/health", "/nothing", "/v1/embeddings", "/%ff")
    }
    assert len(ids) == 5


@pytest.mark.parametrize("given", ["a", "probe-123", "x" * 128, "urn:uuid:1/2+3=4@5"])
def test_the_clients_id_is_echoed(house: House, given: str) -> None:
    for path in ("/health", "/nothing"):
        assert (
            house.ask("GET", path, headers={"X-Request-Id": given}).headers["X-Request-Id"] == given
        )


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", 'a"b', "<script>", "\xe4"])
def test_an_id_that_could_do_harm_is_not(house: House, given: str) -> None:
    reply = house.ask("GET", "/health", headers={"X-Request-Id": given})
    assert reply.headers["X-Request-Id"] != given
    assert reply.headers["X-Request-Id"]


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\nHost: localhost\n\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\n\n",
        b"GET /health HTTP/1.1\n",
        b"\n",
    ],
)
def test_a_line_feed_alone_is_refused_at_once(data: bytes) -> None:
    house = House()
    reply = parse(house.send(data).value())
    assert reply.status == 400
    assert "CR LF" in reply.error["message"]
    transport = house.send(request("POST", "/v1/embeddings", BODY) + b"GET /health HTTP/1.1\n")
    house.fleet.passages[-1].answer(b"{}")
    assert transport.value().count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 400 " in transport.value()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"GET / HTTP/2.0\r\n\r\n", "request line"),
        (b"GET /\r\n\r\n", "request line"),
        (b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n", "A header isn't valid"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 17000 + b"\r\n\r\n", "larger than 16384"),
        (b"GET /" + b"x" * 17000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", "larger than 16384"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 101 + b"\r\n", "more than 100 headers"),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", "Content-Length"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", "Transfer-Encoding"),
        (
            b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            "chunks",
        ),
    ],
)
def test_what_is_wrong_is_said(data: bytes, word: str) -> None:
    assert word in parse(House().send(data).value()).error["message"]


def test_what_is_refused_on_the_way_is_counted(house: House) -> None:
    for data in (
        b"GET /\r\n\r\n",
        request("GET", "/health", headers={"Host": "evil.example"}),
        request("GET", "/health", headers={"Origin": "https://evil.example"}),
        request("POST", "/v1/embeddings", headers={"Content-Length": "100000"}),
        request("POST", "/v1/embeddings", headers={"Authorization": "Bearer tursi_1_0"}),
    ):
        house.send(data)
    house.send(b"GET / HT")
    house.clock.pump([1] * 6)
    text = house.ask("GET", "/metrics").body.decode()
    for code in (
        "invalid_request", "host_refused", "origin_refused", "payload_too_large",
        "invalid_api_key", "request_timeout",
    ):  # fmt: skip
        assert f'tursi_requests_refused_total{{code="{code}"}} 1.0' in text


def test_after_a_refusal_many_small_pieces_are_not_read_one_by_one(house: House) -> None:
    channel, transport = house.connect()
    head = {"Content-Length": str(HTTP.max_inference_body + 1)}
    channel.dataReceived(request("POST", "/v1/embeddings", headers=head))
    assert parse(transport.value()).status == 413
    assert transport.producerState == "producing"
    channel.dataReceived(b"1\r\nx\r\n")
    assert transport.producerState == "paused"
    house.clock.advance(0.1)
    assert transport.producerState == "producing"
    # What is large is soon over.
    channel.dataReceived(b"x" * 65536)
    assert transport.producerState == "producing"
    channel.dataReceived(b"1\r\nx\r\n")
    waiting = len(house.clock.getDelayedCalls())
    channel.connectionLost()
    # Neither the look at deadlines nor the rest from reading outlives it.
    assert len(house.clock.getDelayedCalls()) == waiting - 2
    house.clock.advance(0.1)
    assert transport.producerState == "paused"
