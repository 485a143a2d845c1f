"""Browsers and strangers: the same answer on every route and every method."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conversation import House, Transport, parse, request

from twisted.internet.address import UNIXAddress

from tursi.api.openapi import PART
from tursi.config import Http
from tursi.faces import TABLE

pytestmark = pytest.mark.usefixtures("both_paths")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def paths() -> Iterator[str]:
    """Every route, with a name in place of each part, and some that aren't there."""
    seen = {PART.sub("small", contract.path) for contract, _ in House().front.handlers}
    yield from sorted(seen | {each.path.replace("{name}", "small") for each in TABLE})
    yield from ("/", "/nothing", "*", "/models/small/nothing")


PATHS = tuple(paths())

ATTACKS = {
    "rebound name": ({"Host": "evil.example"}, 403, "host_refused"),
    "rebound name with our port": ({"Host": "evil.example:8430"}, 403, "host_refused"),
    "a name that begins like ours": ({"Host": "localhost.evil.example"}, 403, "host_refused"),
    "user information": ({"Host": "localhost@evil.example"}, 403, "host_refused"),
    "another address": ({"Host": "192.0.2.1"}, 403, "host_refused"),
    "0.0.0.0": ({"Host": "0.0.0.0:8430"}, 403, "host_refused"),
    "our name on a Unix socket": ({"Host": "tursi"}, 403, "host_refused"),
    "empty host": ({"Host": ""}, 400, "invalid_request"),
    "another origin": ({"Origin": "https://evil.example"}, 403, "origin_refused"),
    "null origin": ({"Origin": "null"}, 403, "origin_refused"),
    "our own origin": ({"Origin": "http://localhost:8430"}, 403, "origin_refused"),
    "cross-site": ({"Sec-Fetch-Site": "cross-site"}, 403, "origin_refused"),
    "same-site": ({"Sec-Fetch-Site": "same-site"}, 403, "origin_refused"),
    "extension": ({"Origin": "moz-extension://x"}, 403, "origin_refused"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_on_every_route_and_method(attack: str) -> None:
    headers, status, code = ATTACKS[attack]
    house = House()
    for path in PATHS:
        for method in METHODS:
            transport = house.send(request(method, path, headers=headers))
            reply = parse(transport.value(), method)
            assert reply.status == status, (method, path)
            if method != "HEAD":
                assert reply.error["code"] == code
            assert reply.headers["X-Request-Id"]
            assert not [name for name in reply.headers if name.startswith("Access-Control")]
            assert transport.half_closed
    assert not house.fleet.calls
    assert not house.fleet.passages


@pytest.mark.parametrize("hosts", [b"", b"Host: localhost\r\nHost: localhost\r\n"])
def test_exactly_one_host_is_needed_on_every_route_and_method(hosts: bytes) -> None:
    house = House()
    for path in PATHS:
        for method in METHODS:
            line = f"{method} {path} HTTP/1.1\r\n".encode()
            reply = parse(house.send(line + hosts + b"\r\n").value(), method)
            assert reply.status == 400, (method, path)


def test_a_refused_request_is_refused_before_its_body_arrives() -> None:
    house = House()
    headers = {"Host": "evil.example", "Content-Length": "1000"}
    transport = house.send(request("POST", "/v1/embeddings", headers=headers))
    assert parse(transport.value(), "POST").status == 403


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "LOCALHOST", "localhost:8430", "localhost:9000", "127.0.0.1", "127.0.0.1:8430",
        "[::1]", "[::1]:8430", "models.example", "models.example:443", "Models.Example",
    ],
)  # fmt: skip
def test_known_hosts_are_answered(host: str) -> None:
    house = House(http=Http(hosts=("models.example",)))
    assert house.ask("GET", "/health", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["example", "sub.models.example", "localhost:port", "localhost:", "::1", "[::2]", "a b"]
)
def test_unknown_hosts_are_not(host: str) -> None:
    house = House(http=Http(hosts=("models.example",)))
    assert house.ask("GET", "/health", headers={"Host": host}).status == 403


@pytest.mark.parametrize("site", ["none", "same-origin"])
def test_what_a_person_types_into_a_browser_is_answered(site: str) -> None:
    assert House().ask("GET", "/health", headers={"Sec-Fetch-Site": site}).status == 200


@pytest.mark.parametrize("host", ["localhost", "tursi"])
def test_a_unix_socket_answers_for_the_names_that_clients_make_up(host: str) -> None:
    house = House()
    channel = house.front.site(()).buildProtocol(UNIXAddress(None))
    assert channel is not None
    transport = Transport(hostAddress=UNIXAddress("/run/tursi.sock"), peerAddress=UNIXAddress(None))
    channel.makeConnection(transport)
    channel.dataReceived(request("GET", "/openapi.json", headers={"Host": host}))
    assert parse(transport.value()).status == 200
