"""Who may do what: every route with every kind of caller. A route without a rule fails here."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

import pytest
from conversation import House, Reply, Socket, Transport, parse, request
from fake_fleet import status
from fake_keys import ADMIN, INFER, READ, FakeKeys, key

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from tursi.api import Keys
from tursi.api.openapi import PART
from tursi.config import Http
from tursi.errors import DatabaseBusy, DeploymentUnavailable
from tursi.faces import TABLE
from tursi.model import ApiKey, Role, Scope

pytestmark = pytest.mark.usefixtures("both_paths")

FREE, METRICS, INFERENCE, READING, CHANGING = "free", "metrics", "infer", "read", "admin"
"""What a route needs. Metrics need ``read``, but nothing where inference needs nothing."""

RULES = {
    "GET /openapi.json": FREE,
    "GET /health": FREE,
    "GET /ready": FREE,
    "GET /live": FREE,
    "GET /metrics": METRICS,
    "GET /v1/models": INFERENCE,
    "GET /v1/models/<path:model>": INFERENCE,
    "GET /models/<path:model>/health": INFERENCE,
    "GET /models/<path:model>/info": INFERENCE,
    "GET /status": READING,
    "GET /catalogue": READING,
    "GET /catalogue/<path:model>": READING,
    "GET /deployments": READING,
    "GET /deployments/<name>": READING,
    "GET /deployments/<name>/workers": READING,
    "GET /deployments/<name>/generations": READING,
    "GET /deployments/<name>/difference": READING,
    "GET /deployments/<name>/lives": READING,
    "GET /deployments/<name>/crashes": READING,
    "GET /deployments/<name>/crashes/<number>": READING,
    "GET /deployments/<name>/memory": READING,
    "GET /deployments/<name>/why": READING,
    "GET /deployments/<name>/statistics": READING,
    "GET /statistics": READING,
    "GET /activity": READING,
    # Anybody who may ask for a model; of others' keys they hear that there are none.
    "GET /keys/<name>/statistics": INFERENCE,
    "GET /deployments/<name>/logs": READING,
    "GET /deployments/<name>/events": READING,
    "GET /events": READING,
    "GET /audit": READING,
    "GET /database": READING,
    "POST /database/backup": CHANGING,
    "GET /keys": CHANGING,
    "GET /pulls": READING,
    "GET /pulls/<number>": READING,
    "POST /pulls": CHANGING,
    "POST /deployments/<name>/export": CHANGING,
    "POST /imports": CHANGING,
    "POST /pulls/<number>/pause": CHANGING,
    "POST /pulls/<number>/resume": CHANGING,
    "DELETE /pulls/<number>": CHANGING,
    "DELETE /catalogue/<path:model>": CHANGING,
    "POST /reload": CHANGING,
    "POST /keys": CHANGING,
    "DELETE /keys/<name>": CHANGING,
    "POST /deployments": CHANGING,
    "PUT /deployments/<name>": CHANGING,
    "DELETE /deployments/<name>": CHANGING,
    "POST /deployments/<name>/start": CHANGING,
    "POST /deployments/<name>/stop": CHANGING,
    "POST /deployments/<name>/restart": CHANGING,
    "POST /deployments/<name>/scale": CHANGING,
    "POST /deployments/<name>/rollback": CHANGING,
    "POST /deployments/<name>/canary": CHANGING,
    "POST /deployments/<name>/promote": CHANGING,
    "POST /deployments/<name>/load": CHANGING,
    "POST /deployments/<name>/unload": CHANGING,
    **{f"POST {route.path}": INFERENCE for route in TABLE},
}
MAY = {
    INFER: {FREE, INFERENCE},
    READ: {FREE, METRICS, READING},
    ADMIN: {FREE, METRICS, INFERENCE, READING, CHANGING},
}
WRONG = {
    "a wrong secret": ADMIN[:-1] + "f",
    "an id that isn't there": key(77),
    "a short key": ADMIN[:30],
    "too long": ADMIN + "0",
    "only the beginning": "tursi_",
    "other letters": ADMIN.upper(),
}


def routes() -> dict[str, tuple[str, str]]:
    """Method and path to ask for, by the route."""
    found = {
        f"{contract.method} {contract.path}": (contract.method, PART.sub("small", contract.path))
        for contract, _ in House().front.handlers
    }
    for route in TABLE:
        found[f"POST {route.path}"] = ("POST", route.path.replace("{name}", "small"))
    return found


ROUTES = routes()


def test_every_route_has_a_rule() -> None:
    assert set(ROUTES) <= set(RULES), "say in RULES who may use the new route"


def ask(house: House, route: str, headers: dict[str, str | None], **site: Any) -> Reply:
    method, path = ROUTES[route]
    channel = house.accept(house.front.site(tuple(Role), **site))
    assert channel is not None
    body = {"model": "small"} if method in {"POST", "PUT"} else None
    channel.dataReceived(request(method, path, body, headers=headers))
    said = channel.transport.value()
    # What waits for the fleet has got through.
    return parse(said, method) if said else Reply(200, {}, b"")  # type: ignore[arg-type] # unread


def refused(reply: Reply) -> tuple[int, str] | None:
    return (reply.status, reply.error["code"]) if reply.status in {401, 403} else None


@pytest.mark.parametrize("route", ROUTES)
def test_a_key_allows_what_its_scopes_say_and_no_more(route: str) -> None:
    house = House()
    for one, allowed in MAY.items():
        for name, value in (("Authorization", f"Bearer {one}"), ("X-Api-Key", one)):
            for is_open in (True, False):
                house.fleet.calls.clear()
                house.fleet.passages.clear()
                headers = {"Authorization": None, name: value}
                reply = ask(house, route, headers, is_open=is_open)
                if RULES[route] in allowed:
                    assert refused(reply) is None, (one, name)
                else:
                    assert refused(reply) == (403, "scope_missing"), (one, name)
                    assert not house.fleet.calls
                    assert not house.fleet.passages


@pytest.mark.parametrize("route", ROUTES)
def test_without_a_key_only_open_listeners_give_inference(route: str) -> None:
    house = House()
    for is_open in (True, False):
        for token in (None, "Bearer unused", "Bearer", "Basic dTpw", "Bearer sk-1"):
            without_a_key(house, route, is_open, token)


def without_a_key(house: House, route: str, is_open: bool, token: str | None) -> None:
    house.fleet.passages.clear()
    reply = ask(house, route, {"Authorization": token}, is_open=is_open)
    allowed = {FREE, METRICS, INFERENCE} if is_open else {FREE}
    if RULES[route] in allowed:
        if is_open or token in {None, "Basic dTpw"}:
            assert refused(reply) is None
        return
    status, code = refused(reply) or (0, "")
    assert status == 401
    assert code in {"api_key_required", "invalid_api_key"}
    assert reply.headers["WWW-Authenticate"].startswith('Bearer realm="tursi"')
    assert not house.fleet.calls
    assert not house.fleet.passages


@pytest.mark.parametrize("route", ROUTES)
def test_a_key_that_is_not_valid_is_refused_everywhere(route: str) -> None:
    house = House()
    for what, token in WRONG.items():
        for is_open in (True, False):
            reply = ask(house, route, {"Authorization": f"Bearer {token}"}, is_open=is_open)
            if token.startswith("tursi_") or not is_open:
                assert refused(reply) == (401, "invalid_api_key"), what
                assert 'error="invalid_token"' in reply.headers["WWW-Authenticate"]
            assert token.encode() not in reply.body or token == "tursi_"


@pytest.mark.parametrize("route", ROUTES)
def test_a_revoked_key_is_refused_everywhere(route: str) -> None:
    house = House()
    assert house.ask("DELETE", "/keys/infer").status == 200
    assert house.ask("DELETE", "/keys/2").status == 200
    for one in (INFER, READ):
        reply = ask(house, route, {"Authorization": f"Bearer {one}"})
        assert refused(reply) == (401, "invalid_api_key")


# -- the control socket -----------------------------------------------------------------


class Stranger(Socket):
    """A Unix socket with another user at the other end."""

    groups: tuple[int, ...] = ()

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        if option == socket.SO_PEERCRED:
            return struct.pack("iII", 4242, 4242, 4343)
        return struct.pack(f"{len(self.groups)}I", *self.groups)


def local(house: House, end: Socket, roles: tuple[Role, ...], data: bytes) -> Transport:
    site = house.front.site(roles)
    channel = site.buildProtocol(UNIXAddress(None))
    assert channel is not None
    transport = Transport(hostAddress=UNIXAddress("/run/s"), peerAddress=UNIXAddress(None))
    transport.getHandle = lambda: end  # type: ignore[method-assign] # another's
    channel.makeConnection(transport)
    channel.dataReceived(data)
    return transport


@pytest.mark.parametrize("route", ROUTES)
def test_the_control_socket_is_for_its_users_only(route: str) -> None:
    method, path = ROUTES[route]
    body = {"model": "small"} if method in {"POST", "PUT"} else None
    house = House()
    for headers in ({"Authorization": None}, {"Authorization": f"Bearer {ADMIN}"}):
        house.fleet.calls.clear()
        house.fleet.passages.clear()
        asked = request(method, path, body, headers=headers)
        reply = parse(local(house, Stranger(), tuple(Role), asked).value(), method)
        assert refused(reply) == (403, "peer_refused")
        assert not house.fleet.calls
        assert not house.fleet.passages
        said = local(house, Socket(), tuple(Role), asked).value()
        assert not said or refused(parse(said, method)) is None


@pytest.mark.parametrize(("groups", "status"), [((1, 77, 2), 200), ((1, 2), 403), ((), 403)])
def test_members_of_the_control_group_may_use_it(groups: tuple[int, ...], status: int) -> None:
    house = House()
    house.front._group = 77
    end = Stranger()
    end.groups = groups
    asked = request("GET", "/status", headers={"Authorization": None})
    assert parse(local(house, end, tuple(Role), asked).value()).status == status


def test_a_group_of_the_process_itself_counts_too() -> None:
    house = House()
    house.front._group = 4343
    asked = request("GET", "/status", headers={"Authorization": None})
    assert parse(local(house, Stranger(), tuple(Role), asked).value()).status == 200


def test_a_unix_socket_without_control_is_like_loopback() -> None:
    house = House()
    asked = request("GET", "/v1/models", headers={"Authorization": None})
    said = local(house, Stranger(), (Role.INFERENCE,), asked).value()
    assert parse(said).status == 200


# -- what a key is bound to ---------------------------------------------------------------


def limited(house: House, **fields: Any) -> dict[str, str]:
    """The headers of a new key for inference."""
    made = house.ask("POST", "/keys", {"name": "one", "scopes": ["infer"], **fields})
    assert made.status == 201, made.body
    return {"Authorization": f"Bearer {made.json()['secret']}"}


def test_a_key_for_one_deployment_opens_no_other() -> None:
    house = House()
    house.fleet.statuses["other"] = house.fleet.statuses["small"]
    mine, others = limited(house, deployments=["small"]), {"Authorization": f"Bearer {INFER}"}
    del house.fleet.statuses["other"]
    other = limited(house, name="two", deployments=["other"])
    names = [one["id"] for one in house.ask("GET", "/v1/models", headers=mine).json()["data"]]
    assert names == ["small"]
    assert house.ask("GET", "/v1/models", headers=other).json()["data"] == []
    for path in ("/v1/models/small", "/models/small/health", "/models/org%2Fsmall/info"):
        assert house.ask("GET", path, headers=mine).status == 200
        assert house.ask("GET", path, headers=others).status == 200
        assert house.ask("GET", path, headers=other).error["code"] == "deployment_forbidden"
    for path in ("/v1/embeddings", "/models/small"):
        house.send(request("POST", path, {"model": "org/small"}, headers=mine))
        reply = house.ask("POST", path, {"model": "org/small"}, headers=other)
        assert (reply.status, reply.error["code"]) == (403, "deployment_forbidden")
    assert len(house.fleet.passages) == 2


@pytest.mark.parametrize("path", ["/v1/embeddings", "/models/small"])
def test_requests_over_the_rate_of_a_key_wait(path: str) -> None:
    house = House()
    headers = limited(house, requests_per_minute=2)
    for _ in range(2):
        assert not house.send(request("POST", path, {"model": "small"}, headers=headers)).value()
    reply = house.ask("POST", path, {"model": "small"}, headers=headers)
    assert (reply.status, reply.error["code"]) == (429, "rate_limited")
    assert reply.headers["Retry-After"] == "30"
    assert house.ask("GET", "/v1/models", headers=headers).status == 429
    # Others have their own.
    other = {"Authorization": f"Bearer {INFER}"}
    assert not house.send(request("POST", path, {"model": "small"}, headers=other)).value()
    house.clock.advance(31)
    assert not house.send(request("POST", path, {"model": "small"}, headers=headers)).value()
    assert len(house.fleet.passages) == 4


def test_tokens_over_the_rate_of_a_key_are_paid_back() -> None:
    house = House()
    headers = limited(house, tokens_per_minute=4)
    house.send(request("POST", "/v1/embeddings", {"model": "small"}, headers=headers))
    # 3 in and 5 out, which is known only now.
    house.fleet.passages[0].answer(b"{}")
    reply = house.ask("POST", "/v1/embeddings", {"model": "small"}, headers=headers)
    assert (reply.status, reply.error["code"]) == (429, "rate_limited")
    assert reply.headers["Retry-After"] == "75"
    house.clock.advance(76)
    assert not house.send(
        request("POST", "/v1/embeddings", {"model": "small"}, headers=headers)
    ).value()


def test_keys_are_not_judged_before_they_are_read() -> None:
    house = House()
    house.keys.ring._held = None
    reply = house.ask("GET", "/v1/models")
    assert (reply.status, reply.error["code"]) == (503, "starting_up")
    assert house.ask("GET", "/v1/models", headers={"Authorization": None}).status == 200


def test_keys_can_be_required_of_inference_too() -> None:
    house = House(http=Http(require_keys=True))
    for path in ("/v1/embeddings", "/models/small"):
        for token in (None, "Bearer unused"):
            headers = {"Authorization": token, "Content-Length": "1000000"}
            transport = house.send(request("POST", path, headers=headers))
            # Before its body has arrived.
            assert parse(transport.value()).status == 401
            assert transport.half_closed
        headers = {"Authorization": f"Bearer {INFER}"}
        assert not house.send(request("POST", path, {"model": "small"}, headers=headers)).value()


@pytest.mark.parametrize(
    "query", [f"key={INFER}", f"a=b&api_key={INFER}", "token=x", "access_token=x", f"q={ADMIN}"]
)
def test_a_key_in_the_url_is_refused(query: str) -> None:
    for path in ("/v1/embeddings", "/models/small", "/deployments", "/health"):
        for method in ("GET", "POST"):
            reply = House().ask(method, f"{path}?{query}")
            assert (reply.status, reply.error["code"]) == (400, "invalid_request")
            assert query.encode() not in reply.body


@pytest.mark.parametrize("name", ["Authorization", "X-Api-Key"])
def test_one_key_at_a_time(name: str) -> None:
    asked = request("GET", "/v1/models", headers={"Authorization": None})
    two = asked.replace(b"\r\n\r\n", f"\r\n{name}: a\r\n{name}: b\r\n\r\n".encode())
    assert parse(House().send(two).value()).status == 400


def test_behind_a_proxy_the_client_is_whom_the_proxy_has_seen() -> None:
    house = House()
    for proxied, sent, seen in [
        (False, "198.51.100.7", "127.0.0.1"),
        (True, "198.51.100.7", "198.51.100.7"),
        (True, "203.0.113.1, 198.51.100.7", "198.51.100.7"),
        (True, "<script>", "127.0.0.1"),
    ]:
        channel = house.accept(house.front.site(tuple(Role), is_proxied=proxied))
        assert channel is not None
        body = {"model": "small"}
        headers = {"X-Forwarded-For": sent, "Authorization": None}
        channel.dataReceived(request("POST", "/v1/embeddings", body, headers=headers))
        assert channel.requests[0].caller.address == seen


# -- keys ---------------------------------------------------------------------------------


def test_a_key_is_made_listed_used_and_revoked() -> None:
    house = House()
    made = house.ask("POST", "/keys", {"name": "ci", "scopes": ["read", "infer"]})
    assert made.status == 201
    secret, shown = made.json()["secret"], made.json()["key"]
    assert shown["scopes"] == ["infer", "read"]
    assert shown["created_by"] == "key 1 (admin)"
    assert shown["last_used_at"] is None
    assert len(secret) == len("tursi_4_") + 64
    stored, digest = house.store.held[-1]
    assert stored == ApiKey(4, "ci", (Scope.INFER, Scope.READ), 1_700_000_100.0, "key 1 (admin)")
    assert secret.encode() not in repr(house.store.held).encode()
    assert len(digest) == 32
    used = {"Authorization": f"bearer {secret}"}
    assert house.ask("GET", "/deployments", headers=used).status == 200
    listed = house.ask("GET", "/keys")
    assert secret.rpartition("_")[2].encode() not in listed.body
    assert listed.json()["keys"][3]["last_used_at"] == "2023-11-14T22:15:00.000Z"
    assert house.ask("DELETE", "/keys/ci").json()["revoked_at"] is not None
    assert house.ask("GET", "/deployments", headers=used).status == 401


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "a", "scopes": []}, "scopes"),
        ({"name": "a", "scopes": ["root"]}, "scopes[0]"),
        ({"name": "7", "scopes": ["infer"]}, "name"),
        ({"name": "a b", "scopes": ["infer"]}, "name"),
        ({"name": "", "scopes": ["infer"]}, "name"),
        ({"name": "a", "scopes": ["admin"], "deployments": ["small"]}, "scopes"),
        ({"name": "a", "scopes": ["infer"], "deployments": []}, "deployments"),
        ({"name": "a", "scopes": ["infer"], "deployments": ["../x"]}, "name"),
        ({"name": "a", "scopes": ["infer"], "requests_per_minute": 0}, "requests_per_minute"),
        ({"name": "a", "scopes": ["infer"], "secret": "mine"}, ""),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(body: dict[str, Any], param: str) -> None:
    house = House()
    reply = house.ask("POST", "/keys", body)
    assert reply.status == 400
    assert (reply.error["param"] or "").startswith(param)
    assert len(house.store.held) == 3


def test_a_name_is_given_once() -> None:
    reply = House().ask("POST", "/keys", {"name": "read", "scopes": ["infer"]})
    assert (reply.status, reply.error["code"]) == (409, "key_exists")


@pytest.mark.parametrize("name", ["nobody", "99", "9" * 30, "%D9%A3"])
def test_an_unknown_key_is_not_revoked(name: str) -> None:
    reply = House().ask("DELETE", f"/keys/{name}")
    assert (reply.status, reply.error["code"]) == (404, "key_not_found")


def test_a_key_is_refused_at_once_also_where_that_cannot_be_stored() -> None:
    house = House()
    theirs = {"Authorization": f"Bearer {READ}"}
    assert house.ask("GET", "/deployments", headers=theirs).status == 200
    house.store.locked = True
    reply = house.ask("DELETE", "/keys/read")
    assert (reply.status, reply.error["code"]) == (503, "database_busy")
    assert "is refused from now on, but that isn't on the disk yet" in reply.error["message"]
    assert house.ask("GET", "/deployments", headers=theirs).status == 401
    assert house.ask("GET", "/keys").json()["keys"][1]["revoked_at"] is not None
    assert house.store.held[1][0].revoked_at is None
    # One that there isn't.
    assert house.ask("DELETE", "/keys/nobody").status == 503
    house.store.locked = False
    saving = house.keys.stop()
    with pytest.raises(StopIteration):
        saving.send(None)
    assert house.store.held[1][0].revoked_at == 1_700_000_100.0
    assert house.ask("DELETE", "/keys/read").status == 200


def test_last_uses_are_stored_now_and_then() -> None:
    house = House()
    starting = house.keys.start()
    with pytest.raises(StopIteration):
        starting.send(None)
    house.ask("GET", "/v1/models")
    assert house.store.used == {}
    house.clock.advance(10)
    assert house.store.used == {1: 1_700_000_100.0}
    house.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {INFER}"})
    with pytest.raises(StopIteration):
        house.keys.stop().send(None)
    assert set(house.store.used) == {1, 3}
    assert not house.keys._saving.running


def test_the_peer_of_a_real_socket_is_us() -> None:
    from tursi.api.peer import peer_of

    one, other = socket.socketpair()

    class End:
        def getHandle(self) -> socket.socket:  # noqa: N802 - Twisted's name
            return one

    peer = peer_of(End())
    assert peer.uid == os.geteuid()
    assert {os.getegid(), *os.getgroups()} <= peer.groups
    assert peer.is_trusted(None)
    one.close()
    other.close()


# -- paths of this machine ---------------------------------------------------------------

SECRET_PATH = "/srv/models/secret"


def test_who_may_not_read_is_told_no_path() -> None:
    house = House()
    told = f"small is failed: {SECRET_PATH} lacks config.json"
    hidden = DeploymentUnavailable(told, public="small is failed.", reference="3")
    house.fleet.refuse = hidden
    house.fleet.statuses["small"] = status("small", model=SECRET_PATH)
    inference = [("POST", "/v1/embeddings"), ("POST", "/models/small")]
    asked = [*inference, ("GET", "/models/small/info"), ("GET", "/v1/models")]
    for method, path in asked:
        body = {"model": "small"} if method == "POST" else None
        for token in (None, "Bearer unused", f"Bearer {INFER}"):
            reply = house.ask(method, path, body, headers={"Authorization": token})
            assert SECRET_PATH.encode() not in reply.body
            assert b"small" in reply.body
        shown = house.ask(method, path, body)
        assert (SECRET_PATH.encode() in shown.body) is (method == "POST")
    house.fleet.broken = DatabaseBusy(f"{SECRET_PATH} is held", public="Busy.", retry_after=5)
    for path, token in (("/v1/models", None), ("/deployments", READ)):
        headers = {"Authorization": token and f"Bearer {token}"}
        reply = house.ask("GET", path, headers=headers)
        assert (reply.status, reply.headers["Retry-After"]) == (503, "5")
        assert (SECRET_PATH.encode() in reply.body) is (token is not None)


def test_the_last_use_of_a_key_waits_for_the_database() -> None:
    store, clock = FakeKeys(), Clock()
    keys = Keys(store, clock, lambda: 1_700_000_000.0 + clock.seconds())
    Deferred.fromCoroutine(keys.start())
    keys.ring.admit(keys.ring.find(READ.encode()).caller(None, None))
    store.locked = True
    clock.advance(10)
    assert store.used == {}
    clock.advance(5)
    keys.ring.admit(keys.ring.find(INFER.encode()).caller(None, None))
    store.locked = False
    clock.advance(5)
    assert store.used == {2: 1_700_000_000.0, 3: 1_700_000_015.0}
    Deferred.fromCoroutine(keys.stop())
    assert not clock.getDelayedCalls()
