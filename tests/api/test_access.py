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


# -- pages that may ask ------------------------------------------------------------------

CHAT = "https://chat.example"
ASKING = {"Origin": CHAT, "Sec-Fetch-Site": "cross-site"}


def with_pages() -> House:
    return House(http=Http(origins=(CHAT,), require_keys=True))


def test_the_pages_of_an_allowed_origin_may_ask_and_see_the_answer() -> None:
    for method, path in [("GET", "/v1/models"), ("GET", "/nothing"), ("PUT", "/health")]:
        reply = with_pages().ask(method, path, headers=ASKING)
        assert reply.status in {200, 404, 405}
        assert reply.headers["Access-Control-Allow-Origin"] == CHAT
        assert reply.headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Credentials" not in reply.headers
    # They see why they are refused, too.
    for headers in ({"Authorization": None}, {"Content-Length": "99999999999"}):
        reply = with_pages().ask("POST", "/v1/embeddings", headers={**ASKING, **headers})
        assert reply.status in {401, 413}
        assert reply.headers["Access-Control-Allow-Origin"] == CHAT


def test_a_preflight_is_answered_without_a_key_and_asks_nothing_of_anyone() -> None:
    preflight = {
        **ASKING,
        "Authorization": None,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    house = with_pages()
    for path in PATHS:
        if path == "*":
            continue
        reply = house.ask("OPTIONS", path, headers=preflight)
        assert reply.status == 204
        assert reply.headers["Access-Control-Allow-Origin"] == CHAT
        assert "POST" in reply.headers["Access-Control-Allow-Methods"]
        assert reply.headers["Access-Control-Allow-Headers"].endswith("x-stainless-os")
    for origin in ("https://evil.example", "null", f"{CHAT}.evil.example", CHAT.upper(), ""):
        reply = house.ask("OPTIONS", "/v1/models", headers={**preflight, "Origin": origin})
        assert reply.status == 403
        assert not [name for name in reply.headers if name.startswith("Access-Control")]
    assert not house.fleet.calls


@pytest.mark.parametrize("attack", ["another origin", "null origin", "cross-site", "same-site"])
def test_other_pages_are_refused_all_the_same(attack: str) -> None:
    headers, status, code = ATTACKS[attack]
    reply = with_pages().ask("GET", "/v1/models", headers=headers)
    assert (reply.status, reply.error["code"]) == (status, code)
    assert not [name for name in reply.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"]
)
def test_what_a_form_can_send_changes_nothing(kind: str) -> None:
    house = House()
    for contract, _ in house.front.handlers:
        if contract.method == "GET":
            continue
        path = PART.sub("small", contract.path)
        headers = {"Content-Type": kind}
        reply = house.ask(contract.method, path, b'{"model": "a"}', headers=headers)
        assert (reply.status, reply.error["code"]) == (415, "unsupported_media_type")
    assert not house.fleet.calls
    assert len(house.store.held) == 3


def test_get_changes_nothing() -> None:
    house = House()
    for path in PATHS:
        for method in ("GET", "HEAD"):
            house.send(request(method, path))
    assert {call[0] for call in house.fleet.calls} <= {"audit", "statistics"}
    assert not house.fleet.passages
    assert [one.revoked_at for one, _ in house.store.held] == [None] * 3


# -- targets as for a proxy ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://localhost/health", 200),
        ("HTTP://LOCALHOST:8430/health?a=b", 200),
        ("https://127.0.0.1/v1/models", 200),
        ("http://localhost", 404),
        ("http://localhost?x", 404),
        ("http://evil.example/health", 403),
        ("http://localhost@evil.example/health", 403),
        ("http://evil.example@localhost/health", 403),
        ("http:///health", 403),
        ("ftp://localhost/health", 404),
        ("httpx", 404),
    ],
)
def test_a_target_with_a_host_is_the_path_on_that_host(target: str, status: int) -> None:
    house = House()
    assert house.ask("GET", target).status == status
    # Host is still looked at.
    assert house.ask("GET", target, headers={"Host": "evil.example"}).status == 403


def test_inference_too_takes_a_target_with_a_host() -> None:
    house = House()
    house.send(request("POST", "http://localhost/v1/embeddings", {"model": "small"}))
    assert [passage.work.route for passage in house.fleet.passages] == ["openai.embeddings"]
