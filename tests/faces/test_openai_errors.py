from __future__ import annotations

import json

import pytest
from asking import events, route

from tursi import errors
from tursi.errors import TursiError, by_code
from tursi.loading import Loading


@pytest.mark.parametrize(
    ("error", "status", "type_", "headers"),
    [
        (errors.InvalidRequest("No.", param="stop"), 400, "invalid_request_error", None),
        (errors.ContextLengthExceeded(), 400, "invalid_request_error", None),
        (errors.HostRefused(), 403, "permission_error", None),
        (errors.ModelNotFound("No 'x'."), 404, "not_found_error", None),
        (errors.PayloadTooLarge(), 413, "invalid_request_error", None),
        (errors.QueueFull(retry_after=2), 429, "rate_limit_error", {"Retry-After": "2"}),
        (errors.WorkerLost(), 502, "server_error", None),
        (
            errors.ModelLoading(retry_after=900),
            503,
            "service_unavailable_error",
            {"Retry-After": "120"},
        ),
        (
            errors.ModelLoading(retry_after=0),
            503,
            "service_unavailable_error",
            {"Retry-After": "1"},
        ),
        (
            errors.DeploymentUnavailable(),
            503,
            "service_unavailable_error",
            {"x-should-retry": "false"},
        ),
        (
            errors.DeploymentUnavailable(retry_after=5),
            503,
            "service_unavailable_error",
            {"Retry-After": "5"},
        ),
        (errors.DeadlineExceeded(), 504, "server_error", None),
        (errors.InternalError(), 500, "server_error", None),
    ],
)
def test_an_error_has_its_status_type_and_headers(
    error: TursiError, status: int, type_: str, headers: dict[str, str] | None
) -> None:
    answer = route("openai.chat").error(error)
    shown = json.loads(answer.body)["error"]
    assert (answer.status, answer.content_type) == (status, "application/json")
    assert answer.headers == headers
    assert shown["type"] == type_
    assert shown["code"] == error.code
    assert shown["message"] == error.message
    assert shown["param"] == error.param


def test_a_reference_is_shown_and_that_of_a_defect_is_its_incident() -> None:
    lost = json.loads(route("openai.chat").error(errors.WorkerLost(reference="life")).body)
    assert lost["error"]["reference"] == "life"
    assert "incident" not in lost["error"]
    defect = json.loads(route("openai.chat").error(errors.InternalError(reference="abc")).body)
    assert defect["error"]["incident"] == "abc"
    assert "reference" not in defect["error"]


@pytest.mark.parametrize("kind", [errors.ModelLoading, errors.QueueFull])
def test_how_far_the_model_is_stands_in_every_shape(kind: type[TursiError]) -> None:
    error = kind(retry_after=500, loading=Loading("loading", 0.4, 499.5, 3))
    said = {"stage": "loading", "progress": 0.4, "eta_seconds": 499.5, "position": 3}
    # Of nobody who may not read about this machine it is kept.
    for shown in (error, error.discreet()):
        for name in ("openai.chat", "huggingface"):
            answer = route(name).error(shown)
            assert answer.headers == {"Retry-After": "120", "X-Queue-Position": "3"}
            body = json.loads(answer.body)
            body = body["error"] if name == "openai.chat" else body
            assert (body["loading"], body["retry_after"]) == (said, 120)
    assert b"loading" not in route("openai.chat").error(errors.QueueFull(retry_after=1)).body


def test_every_error_has_an_answer() -> None:
    for error_class in by_code().values():
        answer = route("openai.chat").error(error_class())
        assert 400 <= answer.status < 600
        assert set(json.loads(answer.body)["error"]) >= {"message", "type", "param", "code"}


def test_a_failed_stream_ends_with_the_error_and_done() -> None:
    error, done = events(route("openai.chat").failure(errors.WorkerLost(reference="life")))
    assert error["error"]["code"] == "worker_lost"
    assert done == "[DONE]"
