from __future__ import annotations

from typing import Any

import pytest
from conversation import INFO, House, request
from fake_fleet import status

from twisted.internet.defer import Deferred

from tursi.api import Front, Reloaded
from tursi.config import Configuration, Http
from tursi.errors import ConfigurationError, DatabaseFull, RoleNotOffered
from tursi.fleet import Part
from tursi.model import (
    Caller,
    DeploymentStatus,
    Desired,
    Limits,
    Load,
    Phase,
    Request,
    Role,
    Schedule,
)


def test_deployments_are_listed_with_times_in_rfc_3339() -> None:
    reply = House().ask("GET", "/deployments")
    assert reply.status == 200
    (one,) = reply.json()["deployments"]
    assert one["name"] == "small"
    assert one["phase"] == "ready"
    assert one["created_at"] == "2023-11-14T22:13:20.000Z"
    assert one["updated_at"] == "2023-11-14T22:13:20.500Z"
    assert one["workers"][0]["since"] == "2023-11-14T22:13:21.000Z"
    assert one["next_try_at"] is None


def test_put_creates_and_then_finds_nothing_to_do() -> None:
    house = House()
    body = {"model": "org/new", "task": None, "device": "cpu", "replicas": 2}
    created = house.ask("PUT", "/deployments/new", body)
    assert created.status == 201
    assert created.json()["outcome"] == "created"
    assert created.json()["deployment"]["name"] == "new"
    again = house.ask("PUT", "/deployments/new", {"model": "org/new"})
    assert again.status == 200
    assert again.json()["outcome"] == "unchanged"
    assert house.fleet.calls == [
        ("deploy", "new", Request("org/new", None, "cpu", "auto"), 2, "key 1 (admin)"),
        ("deploy", "new", Request("org/new", None, "auto", "auto"), 2, "key 1 (admin)"),
    ]


def test_what_a_model_may_bring_is_off_unless_asked_for() -> None:
    house = House()
    body: dict[str, Any] = {"model": "org/new", "allow_pickle": True, "trust_remote_code": True}
    body["quantization"] = "int8"
    assert house.ask("PUT", "/deployments/new", body).status == 201
    asked = house.fleet.calls[0][2]
    assert asked == Request(
        "org/new", allow_pickle=True, trust_remote_code=True, quantization="int8"
    )
    shown = house.ask("GET", "/deployments/small").json()
    assert (shown["allow_pickle"], shown["trust_remote_code"]) == (False, False)
    assert house.ask("PUT", "/deployments/new", {**body, "allow_pickle": "yes"}).status == 400


def test_a_folder_is_nobodys_business_but_the_operators() -> None:
    house = House()
    house.fleet.statuses["small"] = status("small", model="/srv/models/small")
    assert house.ask("GET", "/models/small/info").json()["model_id"] == "small"


def test_a_reload_says_what_has_changed_or_why_nothing_did() -> None:
    house = House()
    assert house.ask("POST", "/reload").json() == {"changed": [], "rolled": []}
    assert house.ask("GET", "/reload").status == 405

    async def refuse() -> Reloaded:
        raise ConfigurationError("tursi.toml: it is wrong.")

    front = Front(house.fleet, INFO, house.configuration, house.clock, house.keys, refuse)
    house.front = front
    refused = house.ask("POST", "/reload")
    assert (refused.status, refused.json()["error"]["code"]) == (422, "configuration_error")


def test_another_configuration_holds_for_sites_that_are_open() -> None:
    house = House()
    site = house.front.site((Role.HEALTH,))
    changed = Configuration(http=Http(hosts=("my.example",), hot_path=False, max_connections=1))
    house.front.configure(changed, None)
    house.front.adapt(site, (Role.CONTROL,))
    assert site.access.knows(b"my.example", local=False)
    assert site.settings == changed.http
    site.access.require(Role.CONTROL, None, Caller())
    with pytest.raises(RoleNotOffered):
        site.access.require(Role.HEALTH, None, Caller())


def test_limits_are_taken_and_shown() -> None:
    house = House()
    body = {"model": "org/new", "limits": {"memory": 2**30, "cpu": 1.5, "threads": None}}
    assert house.ask("PUT", "/deployments/new", body).status == 201
    assert house.fleet.calls[0][2] == Request("org/new", limits=Limits(memory=2**30, cpu=1.5))
    shown = house.ask("GET", "/deployments/new").json()["limits"]
    assert shown.keys() == {"memory", "cpu", "threads", "files", "processes"}


def test_the_level_of_containment_is_shown() -> None:
    assert House().ask("GET", "/status").json()["containment"] == {
        "limits": "rlimits and watch",
        "because": None,
        "landlock": None,
        "sockets": False,
        "no_new_privileges": True,
    }


def test_post_takes_the_name_from_the_reference() -> None:
    house = House()
    assert house.ask("POST", "/deployments", {"model": "org/Big-Model@main"}).status == 201
    assert house.fleet.calls[0][1] == "Big-Model"
    house.ask("POST", "/deployments", {"model": "/models/x", "name": "mine"})
    assert house.fleet.calls[1][1] == "mine"


def test_a_schedule_is_what_the_body_says_and_the_rest_as_it_was() -> None:
    house = House()
    for body in (
        {},
        {"load": "on_demand"},
        {"keep_alive": 0},
        {"load": "manual", "keep_alive": -1},
    ):
        reply = house.ask("PUT", "/deployments/small", {"model": "org/small", **body})
        assert reply.status == 200
    assert house.fleet.schedules == [
        None,
        Schedule(Load.ON_DEMAND),
        Schedule(Load.ALWAYS, 0),
        Schedule(Load.MANUAL, -1),
    ]
    for wrong in ({"load": "sometimes"}, {"keep_alive": -2}):
        reply = house.ask("PUT", "/deployments/small", {"model": "org/small", **wrong})
        assert reply.status == 400


def test_a_dry_run_changes_nothing() -> None:
    house = House()
    for method, path in (("POST", "/deployments"), ("PUT", "/deployments/small")):
        reply = house.ask(method, f"{path}?dry_run=1", {"model": "org/small", "replicas": 3})
        assert (reply.status, reply.json()["verdict"]) == (200, "fits")
    assert [call[0] for call in house.fleet.calls] == ["fit", "fit"]


@pytest.mark.parametrize("action", ["start", "stop", "restart", "load", "unload"])
def test_actions_are_accepted(action: str) -> None:
    house = House()
    reply = house.ask("POST", f"/deployments/small/{action}")
    assert reply.status == 202
    assert reply.json()["name"] == "small"
    assert house.fleet.calls == [(action, "small", "key 1 (admin)")]


def test_scale_and_delete() -> None:
    house = House()
    assert house.ask("POST", "/deployments/small/scale", {"replicas": 3}).status == 202
    assert house.ask("DELETE", "/deployments/small").status == 202
    assert house.fleet.calls == [
        ("scale", "small", 3, "key 1 (admin)"),
        ("remove", "small", "key 1 (admin)"),
    ]


def test_ranges_of_replicas_and_canaries() -> None:
    house = House()
    place, body = "/deployments/small", {"model": "org/small"}
    for more in (
        {"replicas": 2, "max_replicas": 4},
        {},
        {"max_replicas": 6},
        {"replicas": 3},
        {"canary": 10},
    ):
        assert house.ask("PUT", place, {**body, **more}).status == 200
    assert house.ask("POST", f"{place}/scale", {"replicas": 1, "max_replicas": 2}).status == 202
    # What is absent stays, but a number alone means that number.
    told = [(4, None), (4, None), (6, None), (None, None), (None, 10), (2, None)]
    assert house.fleet.rollouts == told
    assert [call[3] for call in house.fleet.calls[:5]] == [2, 2, 2, 3, 3]
    assert house.ask("POST", f"{place}/canary", {"weight": 50}).status == 202
    assert house.ask("POST", f"{place}/canary", {"weight": 101}).status == 400
    assert house.fleet.calls[-1] == ("weigh", "small", 50, "key 1 (admin)")
    refused = house.ask("POST", f"{place}/promote")
    assert (refused.status, refused.json()["error"]["code"]) == (409, "no_canary")


def test_rollback() -> None:
    house = House()
    reply = house.ask("POST", "/deployments/small/rollback", {"generation": 2})
    assert (reply.status, reply.json()["outcome"]) == (200, "replaced")
    assert house.ask("POST", "/deployments/small/rollback", {}).status == 200
    assert house.ask("POST", "/deployments/small/rollback", {"generation": 0}).status == 400
    assert house.fleet.calls == [
        ("roll_back", "small", 2, "key 1 (admin)"),
        ("roll_back", "small", None, "key 1 (admin)"),
    ]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/deployments/small", None),
        ("/deployments/small/workers", "workers"),
        ("/deployments/small/generations", "generations"),
        ("/deployments/small/lives?limit=1", "lives"),
        ("/deployments/small/events", "events"),
        ("/deployments/small/statistics?by=hour", "periods"),
        ("/statistics", "keys"),
        ("/activity", "deployments"),
        ("/deployments/small/logs?lines=10", "lines"),
        ("/events?after=0&limit=10&deployment=small", "events"),
        ("/catalogue", "models"),
        ("/v1/models", "data"),
    ],
)
def test_lists_are_objects(path: str, expected: str | None) -> None:
    reply = House().ask("GET", path)
    assert reply.status == 200
    assert expected is None or isinstance(reply.json()[expected], list)


def test_what_a_deployment_needs_of_memory_is_told() -> None:
    reply = House().ask("GET", "/deployments/small/memory").json()
    assert (reply["verdict"], reply["measured"]) == ("fits", True)
    assert reply["footprint"]["estimate"]["parameters"] == 225
    assert reply["footprint"]["host_peaks"] == {"load": 3000, "warm": 2000, "busy": 2500}
    assert reply["rooms"][0]["device"] == "host"
    assert House().ask("GET", "/deployments/none/memory").status == 404


def test_status_says_what_runs() -> None:
    reply = House().ask("GET", "/status").json()
    assert reply["version"] == "1.2.3"
    assert reply["pid"] == 42
    assert reply["started_at"] == "2023-11-14T22:13:20.000Z"
    assert reply["listeners"] == [{"endpoint": "tcp:8430", "roles": ["inference"]}]
    assert reply["counts"]["ready"] == 1
    assert "twisted" in reply["versions"]


def test_an_unhealthy_daemon_answers_503_and_is_alive_all_the_same() -> None:
    async def look() -> tuple[str, list[Part]]:
        return "unhealthy", [Part("database", healthy=False, message="silent", kind="database")]

    house = House(look=look)
    answer = house.ask("GET", "/health")
    assert (answer.status, answer.json()["status"]) == (503, "unhealthy")
    alive = house.ask("GET", "/live")
    assert (alive.status, alive.json()) == (200, {"alive": True})


def test_health_and_readiness() -> None:
    house = House()
    assert house.ask("GET", "/health").json() == {
        "status": "healthy",
        "parts": [{"name": "small", "healthy": True, "message": "ready", "kind": "deployment"}],
    }
    assert house.ask("GET", "/ready").status == 200
    house.fleet.statuses["slow"] = status("slow", phase=Phase.LOADING, ready=0)
    reply = house.ask("GET", "/ready")
    assert reply.status == 503
    assert reply.json() == {"ready": False, "waiting": ["slow"]}
    house.fleet.statuses["slow"] = status("slow", phase=Phase.FAILED, ready=0)
    assert house.ask("GET", "/ready").status == 200
    house.fleet.statuses["slow"] = status(
        "slow", phase=Phase.STOPPED, ready=0, desired=Desired.STOPPED
    )
    assert house.ask("GET", "/ready").status == 200


@pytest.mark.parametrize("path", ["small", "org%2Fsmall", "org/small"])
def test_a_model_is_found_by_its_name_or_reference(path: str) -> None:
    house = House()
    reply = house.ask("GET", f"/v1/models/{path}")
    assert reply.json() == {
        "id": "small",
        "created": 1_700_000_000,
        "object": "model",
        "owned_by": "tursi",
    }
    assert house.ask("GET", f"/models/{path}/health").status == 200
    info = house.ask("GET", f"/models/{path}/info").json()
    assert info["model_id"] == "org/small"
    assert info["model_dtype"] == "float32"


def test_a_model_that_does_not_serve_is_not_healthy() -> None:
    house = House()
    house.fleet.statuses["small"] = status("small", phase=Phase.LOADING, ready=0)
    assert house.ask("GET", "/models/small/health").status == 503


def test_an_unknown_model_is_not_found_in_the_shape_of_openai() -> None:
    error = House().ask("GET", "/v1/models/nope").error
    assert error["code"] == "model_not_found"
    assert "nope" in error["message"]


# -- bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"{not json", "invalid_request", None),
        (b"", "invalid_request", None),
        (b"[1, 2]", "invalid_request", None),
        (b'{"model": "\xff"}', "invalid_request", None),
        (b'{"model":' + b"[" * 20000 + b"]" * 20000 + b"}", "invalid_request", "model"),
        (b"{}", "invalid_request", "model"),
        (b'{"model": 5}', "invalid_request", "model"),
        (b'{"model": "../etc"}', None, None),
        (b'{"model": "org/x", "replicas": 0}', "invalid_request", "replicas"),
        (b'{"model": "org/x", "limits": {"memory": "2G"}}', "invalid_request", "limits.memory"),
        (b'{"model": "org/x", "limits": {"cpu": 0}}', "invalid_request", "limits.cpu"),
        (b'{"model": "org/x", "limits": {"memory": 1e300}}', "invalid_request", "limits.memory"),
        (b'{"model": "org/x", "limits": {"disk": 1}}', "invalid_request", "limits"),
        (b'{"model": "org/x", "replicas": NaN}', "invalid_request", None),
        (b'{"model": "org/x", "replicas": 1e99}', "invalid_request", "replicas"),
        (b'{"model": "org/x", "replcias": 1}', "invalid_request", None),
    ],
)
def test_a_bad_body_is_refused_with_a_sentence(
    body: bytes, code: str | None, param: str | None
) -> None:
    house = House()
    reply = house.ask(
        "POST", "/deployments", body, headers={"Content-Type": "application/json; charset=utf-8"}
    )
    assert reply.status == 400
    if code is not None:
        assert (reply.error["code"], reply.error["param"]) == (code, param)
    assert not house.fleet.calls


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_only_json_is_taken(content_type: str) -> None:
    house = House()
    headers = {"Content-Type": content_type} if content_type else {}
    body = b'{"model": "org/x"}'
    reply = house.ask("PUT", "/deployments/x", body, headers=headers)
    assert (reply.status, reply.error["code"]) == (415, "unsupported_media_type")
    reply = house.ask("POST", "/deployments/small/stop", body, headers=headers)
    assert reply.status == 415
    assert not house.fleet.calls


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=many", "limit"),
        ("limit=-1", "limit"),
        ("limit=1001", "limit"),
        ("follow=perhaps", "follow"),
        ("limits=5", None),
        ("limit=%ff", None),
    ],
)
def test_a_bad_query_is_refused(query: str, param: str | None) -> None:
    reply = House().ask("GET", f"/events?{query}")
    assert reply.status == 400
    assert reply.error["param"] == param
    about = f"The field '{param}' " if param else "The query "
    assert reply.error["message"].startswith(about)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nothing",
        "/v1",
        "/v1/nothing-here",
        "/deployments/",
        "//deployments",
        "/deployments/a/b/c",
        "/DEPLOYMENTS",
        "*",
        "health",
        "/deployments/../status",
        "/%2e%2e/status",
    ],
)
def test_an_unknown_route_is_not_found(path: str) -> None:
    reply = House().ask("GET", path)
    assert (reply.status, reply.error["code"]) == (404, "route_not_found")


def test_a_path_that_is_not_text_is_refused() -> None:
    reply = House().ask("GET", "/deployments/%ff")
    assert (reply.status, reply.error["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "PATCH", "CONNECT", "BREW", "PUT"])
@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/deployments", "GET, HEAD, POST"),
        ("/health", "GET, HEAD"),
        ("/metrics", "GET, HEAD"),
        ("/v1/embeddings", "POST"),
        ("/models/small", "POST"),
        ("/models/small/health", "GET, HEAD, POST"),
        ("/deployments/small/start", "POST"),
    ],
)
def test_other_methods_are_told_which_to_use(method: str, path: str, allow: str) -> None:
    reply = House().ask(method, path)
    assert reply.status == 405
    assert reply.headers["Allow"] == allow
    assert reply.error["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path",
    ["/deployments/small/start", "/deployments/small/stop", "/deployments/small/scale"],
)
def test_get_changes_nothing(path: str) -> None:
    house = House()
    assert house.ask("GET", path).status == 405
    assert house.ask("HEAD", path).status == 405
    assert not house.fleet.calls


@pytest.mark.parametrize(
    "path",
    ["/deployments", "/health", "/ready", "/status", "/metrics", "/openapi.json", "/v1/models"],
)
def test_head_is_get_without_a_body(path: str) -> None:
    house = House()
    transport = house.send(request("HEAD", path))
    head, _, rest = transport.value().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert rest == b""
    length = len(house.ask("GET", path).body)
    assert b"Content-Length: %d" % length in head


def test_an_unknown_deployment_is_not_found() -> None:
    house = House()
    for method, path in [
        ("GET", "/deployments/nope"),
        ("DELETE", "/deployments/nope"),
        ("POST", "/deployments/nope/start"),
        ("GET", "/deployments/nope/logs"),
        ("GET", "/deployments/nope/logs?follow=1"),
        ("GET", "/deployments/nope/events?follow=1"),
        ("GET", "/deployments/nope/workers"),
    ]:
        reply = house.ask(method, path)
        assert (reply.status, reply.error["code"]) == (404, "deployment_not_found"), path


def test_a_full_disk_is_told() -> None:
    house = House()
    house.fleet.broken = DatabaseFull()
    reply = house.ask("GET", "/deployments")
    assert (reply.status, reply.error["code"]) == (507, "database_full")


def test_a_defect_has_an_incident_in_answer_and_log_and_no_traceback(logged_failures: Any) -> None:
    house = House()
    house.fleet.broken = RuntimeError("secret detail")
    reply = house.ask("GET", "/deployments")
    assert reply.status == 500
    assert reply.error["code"] == "internal_error"
    assert reply.error["incident"] in reply.error["message"]
    assert b"secret" not in reply.body
    assert b"Traceback" not in reply.body
    (failure,) = logged_failures.flush(RuntimeError)
    assert failure.getErrorMessage() == "secret detail"


def test_each_role_is_needed() -> None:
    house = House()
    for role, path in [
        (Role.CONTROL, "/deployments"),
        (Role.CONTROL, "/status"),
        (Role.HEALTH, "/health"),
        (Role.METRICS, "/metrics"),
        (Role.INFERENCE, "/v1/models"),
    ]:
        others = tuple(each for each in Role if each is not role)
        reply = house.ask("GET", path, roles=others)
        assert (reply.status, reply.error["code"]) == (403, "role_not_offered")
        assert house.ask("GET", path, roles=(role,)).status == 200
    reply = house.ask(
        "POST", "/v1/embeddings", {"model": "small"}, roles=(Role.CONTROL, Role.HEALTH)
    )
    assert (reply.status, reply.error["code"]) == (403, "role_not_offered")


def test_a_change_goes_on_when_its_client_leaves() -> None:
    house = House()
    gate: Deferred[None] = Deferred()

    async def slow(name: str, by: str) -> DeploymentStatus:
        await gate
        house.fleet.calls.append(("finished", name))
        return house.fleet.deployment(name)

    house.fleet.stop = slow  # type: ignore[method-assign] # this one takes its time
    transport = house.send(request("POST", "/deployments/small/stop"))
    assert transport.value() == b""
    transport.leave()
    gate.callback(None)
    assert house.fleet.calls == [("finished", "small")]
    assert transport.value() == b""


def test_a_change_that_takes_too_long_is_answered() -> None:
    house = House()

    async def endless(name: str, by: str) -> DeploymentStatus:
        await Deferred[None]()
        return house.fleet.deployment(name)

    house.fleet.stop = endless  # type: ignore[method-assign] # this one never ends
    transport = house.send(request("POST", "/deployments/small/stop"))
    house.clock.pump([1.0] * 602)
    assert transport.value().startswith(b"HTTP/1.1 504 ")
