from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

import pytest
from conversation import House, Transport, parse, request
from fake_fleet import End, Head
from fake_keys import INFER
from prometheus_client.parser import text_string_to_metric_families

from tursi.config import Http, Requests
from tursi.errors import (
    DeploymentUnavailable,
    ModelLoading,
    QueueFull,
    ShuttingDown,
    WorkerLost,
)
from tursi.faces import TABLE
from tursi.model import Usage

pytestmark = pytest.mark.usefixtures("both_paths")
EVENTS = Head(200, "text/event-stream", {})
BODY = {"model": "small", "input": "hello"}


def ask(house: House, path: str = "/v1/embeddings", body: Any = BODY) -> Transport:
    return house.send(request("POST", path, body))


def test_a_request_goes_to_the_fleet_as_bytes_and_its_answer_comes_whole() -> None:
    house = House()
    transport = house.send(
        request("POST", "/v1/embeddings", BODY, headers={"X-Request-Id": "probe-123"})
    )
    (passage,) = house.fleet.passages
    assert passage.model == "small"
    assert passage.work.route == "openai.embeddings"
    assert passage.work.request_id == "probe-123"
    assert passage.work.content_type == "application/json"
    assert json.loads(passage.work.body) == BODY
    assert passage.work.seconds == 600
    passage.sink.head(Head(200, "application/json", {"x-truncated": "1"}))
    passage.sink.body(b'{"a"')
    passage.sink.body(b":1}")
    assert transport.value() == b""
    passage.sink.end(End())
    reply = parse(transport.value(), "POST")
    assert (reply.status, reply.body) == (200, b'{"a":1}')
    assert reply.headers["Content-Length"] == "7"
    assert reply.headers["X-Request-Id"] == "probe-123"
    assert reply.headers["x-truncated"] == "1"
    assert "Server" not in reply.headers
    assert not transport.disconnecting


def test_a_connection_serves_one_request_after_the_other() -> None:
    house = House()
    channel, transport = house.connect()
    channel.dataReceived(request("POST", "/v1/embeddings", BODY) * 2)
    assert len(house.fleet.passages) == 1
    house.fleet.passages[0].answer(b"{}")
    assert len(house.fleet.passages) == 2
    house.fleet.passages[1].answer(b"[]")
    assert transport.value().count(b"HTTP/1.1 200 OK") == 2
    assert transport.value().endswith(b"[]")


@pytest.mark.parametrize("path", [each.path for each in TABLE])
@pytest.mark.parametrize("name", ["small", "org/small", "org%2Fsmall"])
def test_every_route_finds_its_model(path: str, name: str) -> None:
    house = House()
    body = {"model": name.replace("%2F", "/") if "{name}" not in path else "dummy"}
    ask(house, path.replace("{name}", name), body)
    assert [each.model for each in house.fleet.passages] == ["small"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{not json", "invalid_request"),
        (b"", "invalid_request"),
        (b"[1,2]", "invalid_request"),
        (b'"x"', "invalid_request"),
        (b"\xff\xfe", "invalid_request"),
        (b'{"model": "small", "input": "\xff"}', "invalid_request"),
        (b'{"model": NaN}', "invalid_request"),
        (b'{"input": "x"}', "invalid_request"),
        (b'{"model": null}', "invalid_request"),
        (b'{"model": ""}', "invalid_request"),
        (b'{"model":' + b"[" * 20000 + b"]" * 20000 + b"}", "invalid_request"),
    ],
)
def test_a_body_without_a_model_is_refused(body: bytes, code: str) -> None:
    house = House()
    reply = house.ask(
        "POST", "/v1/chat/completions", body, headers={"Content-Type": "application/json"}
    )
    assert (reply.status, reply.error["code"]) == (400, code)
    assert not house.fleet.passages


def test_an_unknown_model_is_not_found_in_the_shape_of_the_face() -> None:
    house = House()
    reply = house.ask("POST", "/v1/embeddings", {"model": "no-such-model"})
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert "no-such-model" in reply.error["message"]
    reply = house.ask("POST", "/models/no-such-model", {"inputs": "x"})
    assert reply.status == 404
    assert "no-such-model" in reply.json()["error"]
    assert house.ask("POST", "/models/%ff", {"inputs": "x"}).status == 404


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"],
)
def test_a_form_is_refused(content_type: str) -> None:
    house = House()
    reply = house.ask(
        "POST", "/v1/embeddings", b'{"model": "small"}', headers={"Content-Type": content_type}
    )
    assert (reply.status, reply.error["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "application/json"},
        {"Content-Type": "application/json; charset=utf-8"},
        {"Content-Type": "APPLICATION/JSON"},
        {"Content-Type": "application/vnd.api+json"},
    ],
)
def test_json_may_be_said_or_left_unsaid(headers: dict[str, str]) -> None:
    house = House()
    house.send(request("POST", "/v1/embeddings", b'{"model": "small"}', headers=headers))
    assert len(house.fleet.passages) == 1


@pytest.mark.parametrize(
    ("error", "status", "header", "value"),
    [
        (QueueFull(retry_after=1), 429, "Retry-After", "1"),
        (ModelLoading(retry_after=5), 503, "Retry-After", "5"),
        (ShuttingDown(retry_after=500), 503, "Retry-After", "120"),
        (DeploymentUnavailable("It has crashed too often."), 503, "x-should-retry", "false"),
    ],
)
def test_a_refusal_says_when_to_try_again(
    error: Exception, status: int, header: str, value: str
) -> None:
    house = House()
    house.fleet.refuse = error
    answer = ask(house).value()
    assert answer.startswith(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode())
    reply = parse(answer, "POST")
    assert reply.headers[header] == value
    assert reply.error["message"] == str(error)


def test_a_defect_in_the_fleet_is_an_incident(logged_failures: Any) -> None:
    house = House()
    house.fleet.refuse = RuntimeError("secret")
    reply = house.ask("POST", "/models/small", {"inputs": "x"})
    assert reply.status == 500
    assert reply.json()["incident"]
    assert b"secret" not in reply.body
    assert logged_failures.flush(RuntimeError)


# -- failures on the way -----------------------------------------------------------------


def test_a_worker_lost_before_the_answer_is_an_http_error() -> None:
    house = House()
    transport = ask(house)
    sink = house.fleet.passages[0].sink
    sink.head(Head())
    sink.body(b"half an ans")
    sink.failed(WorkerLost())
    reply = parse(transport.value(), "POST")
    assert (reply.status, reply.error["code"]) == (502, "worker_lost")


def test_an_end_without_a_head_is_an_error() -> None:
    house = House()
    transport = ask(house)
    house.fleet.passages[0].sink.end(End(error="route_not_found"))
    assert parse(transport.value(), "POST").error["code"] == "route_not_found"


def test_a_client_that_leaves_cancels_its_request() -> None:
    house = House()
    transport = ask(house)
    (passage,) = house.fleet.passages
    transport.leave()
    assert passage.cancelled
    passage.answer(b"too late")
    assert transport.value() == b""


def test_a_request_that_takes_too_long_is_cancelled_and_answered() -> None:
    house = House(requests=Requests(deadline_seconds=3))
    transport = ask(house)
    (passage,) = house.fleet.passages
    house.clock.pump([0.5] * 5)
    assert not passage.cancelled
    house.clock.pump([0.5] * 3)
    assert passage.cancelled
    reply = parse(transport.value(), "POST")
    assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")
    assert not transport.disconnecting


# -- streams -------------------------------------------------------------------------------


def chunks(transport: Transport) -> bytes:
    return parse(transport.value(), "POST").body


def test_a_stream_is_written_as_it_comes() -> None:
    house = House()
    transport = ask(house, "/v1/chat/completions")
    sink = house.fleet.passages[0].sink
    sink.head(EVENTS)
    assert transport.value() == b""
    sink.body(b"data: 1\n\n")
    assert transport.value().endswith(b"9\r\ndata: 1\n\n\r\n")
    sink.body(b"data: [DONE]\n\n")
    sink.end(End())
    reply = parse(transport.value(), "POST")
    assert reply.body == b"data: 1\n\ndata: [DONE]\n\n"
    assert reply.headers["Content-Type"] == "text/event-stream"
    assert reply.headers["Cache-Control"] == "no-cache"
    assert reply.headers["X-Accel-Buffering"] == "no"
    assert reply.headers["Transfer-Encoding"] == "chunked"
    assert not transport.disconnecting


def test_a_stream_that_fails_before_its_first_byte_is_an_http_error() -> None:
    house = House()
    transport = ask(house, "/v1/chat/completions")
    sink = house.fleet.passages[0].sink
    sink.head(EVENTS)
    sink.failed(WorkerLost())
    assert parse(transport.value(), "POST").status == 502


def test_a_stream_that_fails_midway_ends_with_an_error_event() -> None:
    house = House()
    transport = ask(house, "/v1/chat/completions")
    sink = house.fleet.passages[0].sink
    sink.head(EVENTS)
    sink.body(b"data: 1\n\n")
    sink.failed(WorkerLost())
    first, error, done, rest = chunks(transport).split(b"\n\n")
    assert first == b"data: 1"
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "worker_lost"
    assert (done, rest) == (b"data: [DONE]", b"")


def test_a_client_that_leaves_midway_cancels_the_stream() -> None:
    house = House()
    transport = ask(house, "/v1/chat/completions")
    (passage,) = house.fleet.passages
    passage.sink.head(EVENTS)
    passage.sink.body(b"data: 1\n\n")
    transport.leave()
    assert passage.cancelled
    passage.sink.body(b"data: 2\n\n")
    passage.sink.end(End())
    assert b"data: 2" not in transport.value()


def test_a_slow_reader_is_waited_for_up_to_a_limit() -> None:
    house = House(requests=Requests(max_stream_buffer=1024))
    channel, transport = house.connect()
    channel.dataReceived(request("POST", "/v1/chat/completions", BODY))
    (passage,) = house.fleet.passages
    passage.sink.head(EVENTS)
    passage.sink.body(b"first")
    channel.pauseProducing()
    passage.sink.body(b"a" * 600)
    assert b"a" not in transport.value().partition(b"first")[2]
    channel.resumeProducing()
    assert b"a" * 600 in transport.value()
    channel.pauseProducing()
    passage.sink.body(b"b" * 600)
    assert not passage.cancelled
    passage.sink.body(b"b" * 600)
    assert passage.cancelled
    assert transport.aborted
    assert b"b" not in transport.value().partition(b"first")[2]


def test_a_stream_that_ends_while_its_reader_is_slow_is_complete() -> None:
    house = House()
    channel, transport = house.connect()
    channel.dataReceived(request("POST", "/v1/chat/completions", BODY))
    sink = house.fleet.passages[0].sink
    sink.head(EVENTS)
    sink.body(b"one,")
    channel.pauseProducing()
    sink.body(b"two,")
    sink.body(b"three")
    sink.end(End())
    assert chunks(transport) == b"one,two,three"


def test_http_1_0_gets_a_stream_that_ends_with_the_connection() -> None:
    house = House()
    body = json.dumps(BODY).encode()
    transport = house.send(
        b"POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )
    house.fleet.passages[0].answer(b"data: 1\n\n", EVENTS)
    assert transport.value().endswith(b"\r\n\r\ndata: 1\n\n")
    assert transport.disconnecting


def test_what_is_done_is_counted() -> None:
    house = House()
    ask(house)
    house.clock.advance(0.25)
    house.fleet.passages[0].answer(b"{}", end=End(Usage(7, 11, 4, 0.1, 0.1)))
    ask(house)
    house.fleet.passages[1].answer(b"{}", Head(400), End(error="context_length_exceeded"))
    transport = ask(house)
    transport.leave()
    house.ask("POST", "/v1/embeddings", {"model": "zz-unknown"})
    text = house.ask("GET", "/metrics").body.decode()
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def value(name: str, deployment: str = "small", **labels: str) -> float:
        labels |= {"deployment": deployment, "route": "openai.embeddings"}
        return samples[name, *sorted(labels.items())]

    assert value("tursi_requests_total", status="200") == 1
    assert value("tursi_requests_total", status="400") == 1
    assert value("tursi_requests_total", status="499") == 1
    assert value("tursi_request_errors_total", code="context_length_exceeded") == 1
    assert value("tursi_request_errors_total", code="request_cancelled") == 1
    assert value("tursi_request_errors_total", "", code="model_not_found") == 1
    assert value("tursi_prompt_tokens_total") == 10
    assert value("tursi_completion_tokens_total") == 16
    assert value("tursi_request_seconds_bucket", le="0.1") == 2
    assert value("tursi_request_seconds_bucket", le="0.25") == 3
    assert value("tursi_batch_size_sum") == 6
    assert "zz-unknown" not in text


def test_the_statistics_are_told_of_every_request_that_somebody_may_make() -> None:
    house = House(http=Http(require_keys=True))
    key = {"Authorization": f"Bearer {INFER}"}
    reply = house.ask("POST", "/v1/embeddings", BODY, headers={"Authorization": None})
    assert reply.status == 401
    house.fleet.refuse = QueueFull(retry_after=1)
    house.ask("POST", "/v1/embeddings", BODY, headers=key)
    house.fleet.refuse = None
    house.send(request("POST", "/v1/chat/completions", BODY, headers=key))
    (passage,) = house.fleet.passages
    house.clock.advance(1)
    passage.sink.head(EVENTS)
    passage.sink.body(b"data: 1\n\n")
    house.clock.advance(2)
    passage.sink.end(End(usage := Usage(7, 11, 4, 0.1, 0.1)))
    assert house.fleet.counted == [
        ("small", 0, 3, 429, "queue_full", 0.0, 0.0, None, Usage()),
        ("small", 1, 3, 200, "", 3.0, 0.5, 1.0, usage),
    ]
