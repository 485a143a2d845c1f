from __future__ import annotations

import json
from typing import Any

import pytest
from asking import ask, events, refusal, route
from openai.types import Completion

from tursi import errors
from tursi.errors import TaskNotSupported
from tursi.faces.route import Call
from tursi.model import Task, Usage
from tursi.tasks import Choice, Delta, Generated, GenerateRequest, Sampling, TokenLogprob

TOKEN = TokenLogprob("He", 7, -0.5, (TokenLogprob("Ho", 8, float("-inf")),))


def complete(**fields: Any) -> Call:
    return ask("openai.completions", {"model": "m", "prompt": "a", **fields}, Task.TEXT_GENERATION)


def generation(call: Call) -> GenerateRequest:
    assert isinstance(call.request, GenerateRequest)
    return call.request


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_each_form_of_prompt(prompt: Any, prompts: Any) -> None:
    call = complete(prompt=prompt)
    assert call.request == GenerateRequest(prompts=prompts, sampling=Sampling(max_tokens=16))


def test_what_langchain_spells_out_is_taken() -> None:
    call = complete(prompt=["a"], logprobs=None, seed=None, n=1, best_of=1, suffix="", stop=None)
    assert call.request == complete(prompt=["a"]).request


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 100}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "b"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "stream": True, "prompt": [1]}, "echo"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_a_bad_body_is_refused_by_its_field(fields: dict[str, Any], param: str) -> None:
    body = {"prompt": "a", **fields}
    error = refusal("openai.completions", body, Task.TEXT_GENERATION)
    assert error.param == param
    assert route("openai.completions").error(error).status == 400


def test_a_body_without_a_prompt_is_refused() -> None:
    error = refusal("openai.completions", {"model": "m"}, Task.TEXT_GENERATION)
    assert error.param == "prompt"


def test_another_task_is_refused() -> None:
    error = refusal("openai.completions", {"prompt": "a"}, Task.FILL_MASK)
    assert isinstance(error, TaskNotSupported)
    assert "/models/my-model" in error.message


def test_the_client_reads_a_whole_answer() -> None:
    result = Generated(
        (Choice(0, "He", "stop"), Choice(1, "Ho", "length")),
        Usage(prompt_tokens=3, completion_tokens=2),
    )
    found = Completion.model_validate_json(complete(prompt=["a", "b"]).whole(result).body)
    assert (found.id, found.object, found.model) == ("cmpl-r1", "text_completion", "m")
    assert [choice.index for choice in found.choices] == [0, 1]
    assert [choice.text for choice in found.choices] == ["He", "Ho"]
    assert found.usage is not None
    assert found.usage.total_tokens == 5


def test_the_echo_is_the_prompt_as_given_or_decoded() -> None:
    result = Generated(
        (Choice(0, "1", "stop", prompt="x"), Choice(1, "2", "stop", prompt="x")), Usage(1, 2)
    )
    texts = [
        [choice["text"] for choice in json.loads(call.whole(result).body)["choices"]]
        for call in (complete(echo=True, n=2), complete(echo=True, n=2, prompt=[5]), complete(n=2))
    ]
    assert texts == [["a1", "a2"], ["x1", "x2"], ["1", "2"]]


def test_logprobs_of_a_whole_answer() -> None:
    result = Generated((Choice(0, "HeHe", "stop", (TOKEN, TOKEN)),), Usage(1, 2))
    logprobs = (
        Completion.model_validate_json(complete(logprobs=1).whole(result).body).choices[0].logprobs
    )
    assert logprobs is not None
    assert logprobs.tokens == ["He", "He"]
    assert logprobs.token_logprobs == [-0.5, -0.5]
    assert logprobs.text_offset == [0, 2]
    assert logprobs.top_logprobs == [{"Ho": -9999.0, "He": -0.5}] * 2


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream(include_usage: bool) -> None:
    call = complete(
        stream=True, prompt=["a", "b"], echo=True, stream_options={"include_usage": include_usage}
    )
    data = call.opening()
    for delta in (Delta(1, "y", (), "length"), Delta(0, "x"), Delta(0, "z", (), "stop")):
        data += call.delta(delta)
    data += call.closing(Usage(2, 3))
    *items, done = events(data)
    found = [choice for item in items for choice in item["choices"]]
    texts = {0: "", 1: ""}
    for choice in found:
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "axz", 1: "by"}
    # The key is always there, as in the real service's streams; null until the end.
    assert [choice["finish_reason"] for choice in found[:-1]].count(None) == len(found) - 2
    assert found[-1]["finish_reason"] == "stop"
    assert items[-1]["usage"]["total_tokens"] == 5
    assert (items[-1]["choices"] == []) is include_usage
    assert done == "[DONE]"


def test_offsets_go_on_through_a_stream() -> None:
    call = complete(stream=True, logprobs=0)
    assert call.opening() == b""
    data = call.delta(Delta(0, "He", (TOKEN,))) + call.delta(Delta(0, "He", (TOKEN,)))
    offsets = [item["choices"][0]["logprobs"]["text_offset"] for item in events(data)]
    assert offsets == [[0], [2]]


def test_a_stream_that_fails_says_so_and_ends() -> None:
    error, done = events(complete(stream=True).failure(errors.DeadlineExceeded()))
    assert error["error"]["code"] == "deadline_exceeded"
    assert done == "[DONE]"
