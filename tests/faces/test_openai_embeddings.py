from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from asking import ask, refusal, route
from hypothesis import given
from hypothesis import strategies as st
from openai.types import CreateEmbeddingResponse

from tursi.errors import TaskNotSupported
from tursi.faces.route import Answer
from tursi.model import Task, Usage
from tursi.tasks import Embeddings, EmbedRequest

EMBED = Task.FEATURE_EXTRACTION


def answer(body: dict[str, Any], result: Embeddings) -> Answer:
    return ask("openai.embeddings", body, EMBED).whole(result)


def vectors(*rows: tuple[float, ...], truncated: tuple[int, ...] = ()) -> Embeddings:
    data = b"".join(struct.pack(f"<{len(row)}f", *row) for row in rows)
    return Embeddings(data, len(rows), len(rows[0]), Usage(prompt_tokens=9), truncated)


@pytest.mark.parametrize(
    ("given_input", "inputs"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["a", [1]], ("a", (1,))),
    ],
)
def test_each_form_of_input(given_input: Any, inputs: Any) -> None:
    body = {"model": "m", "input": given_input, "dimensions": 3, "truncate": True, "user": "u"}
    call = ask("openai.embeddings", body, EMBED)
    assert call.request == EmbedRequest(inputs, truncate=True, dimensions=3)
    assert not call.stream


def test_null_means_absent() -> None:
    body = {"input": "a", **dict.fromkeys(("model", "encoding_format", "dimensions", "truncate"))}
    assert ask("openai.embeddings", body, EMBED).request == EmbedRequest(("a",))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [1, [2]]}, "input"),
        ({"input": [-1]}, "input[0]"),
        ({"input": [1.5]}, "input[0]"),
        ({"input": [True]}, "input[0]"),
        ({"input": [2**31]}, "input[0]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "encoding_format": "zip"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "truncate": "yes"}, "truncate"),
    ],
)
def test_a_bad_body_is_refused_by_its_field(body: Any, param: str) -> None:
    error = refusal("openai.embeddings", body, EMBED)
    assert error.param == param
    assert param in error.message
    assert route("openai.embeddings").error(error).status == 400


def test_another_task_is_refused_with_the_right_route() -> None:
    error = refusal("openai.embeddings", {"input": "a"}, Task.TEXT_GENERATION)
    assert isinstance(error, TaskNotSupported)
    assert "/v1/chat/completions" in error.message


def test_the_client_reads_numbers_and_base64_alike() -> None:
    result = vectors((0.1, -2.5), (3e-9, 1e30))
    numbers = CreateEmbeddingResponse.model_validate_json(
        answer({"model": "m", "input": ["a", "b"]}, result).body
    )
    assert [item.index for item in numbers.data] == [0, 1]
    assert numbers.model == "m"
    assert (numbers.usage.prompt_tokens, numbers.usage.total_tokens) == (9, 9)
    shown = json.loads(answer({"input": ["a"], "encoding_format": "base64"}, result).body)
    assert shown["model"] == "my-model"
    assert shown["id"] == "embd-r1"
    for item, plain in zip(shown["data"], numbers.data, strict=True):
        packed = base64.b64decode(item["embedding"], validate=True)
        assert list(struct.unpack("<2f", packed)) == plain.embedding


def test_cut_inputs_are_named() -> None:
    shown = json.loads(answer({"input": "a"}, vectors((1.0,), (2.0,), truncated=(1,))).body)
    assert shown["truncated"] == [1]
    assert "truncated" not in json.loads(answer({"input": "a"}, vectors((1.0,))).body)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_numbers_survive_exactly(row: list[float]) -> None:
    shown = json.loads(answer({"input": "a"}, vectors(tuple(row))).body)
    assert shown["data"][0]["embedding"] == row
