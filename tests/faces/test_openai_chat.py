from __future__ import annotations

import json
from typing import Any

import pytest
from asking import ask, events, refusal, route
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tursi import errors
from tursi.errors import TaskNotSupported
from tursi.faces.route import Call
from tursi.model import Task, Usage
from tursi.tasks import (
    Choice,
    Delta,
    Generated,
    GenerateRequest,
    Message,
    Sampling,
    TokenLogprob,
)

HI = [{"role": "user", "content": "hi"}]
TOKEN = TokenLogprob(
    "He", 7, -0.5, (TokenLogprob("He", 7, -0.5), TokenLogprob("\ufffd", 8, float("-inf")))
)


def chat(**fields: Any) -> Call:
    return ask("openai.chat", {"model": "m", "messages": HI, **fields}, Task.TEXT_GENERATION)


def generation(call: Call) -> GenerateRequest:
    assert isinstance(call.request, GenerateRequest)
    return call.request


def chunks(data: bytes) -> list[ChatCompletionChunk]:
    *found, done = events(data)
    assert done == "[DONE]"
    return [ChatCompletionChunk.model_validate(item) for item in found]


# -- decoding ---------------------------------------------------------------------


def test_a_plain_chat() -> None:
    call = chat()
    assert call.request == GenerateRequest(messages=(Message("user", "hi"),), sampling=Sampling())
    assert call.stream is False


def test_every_sampling_field() -> None:
    call = chat(
        max_tokens=7,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"5": -100, "6": 1.5},
        seed=-3,
        stop=["x", "y"],
        stop_token_ids=[2],
        ignore_eos=True,
        n=2,
        stream=True,
        truncate_prompt_tokens=-1,
        chat_template_kwargs={"enable_thinking": False},
    )
    assert call.stream is True
    assert call.request == GenerateRequest(
        messages=(Message("user", "hi"),),
        sampling=Sampling(
            max_tokens=7,
            min_tokens=2,
            temperature=0.0,
            top_p=0.5,
            top_k=0,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=-1.0,
            frequency_penalty=2.0,
            logit_bias={5: -100.0, 6: 1.5},
            seed=-3,
            stop=("x", "y"),
            stop_token_ids=(2,),
            ignore_eos=True,
        ),
        n=2,
        stream=True,
        truncate=True,
        template_arguments={"enable_thinking": False},
    )


def test_null_means_absent_and_unknown_fields_are_tolerated() -> None:
    names = [
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "presence_penalty",
        "frequency_penalty",
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "response_format",
        "modalities",
        "audio",
        "structured_outputs",
        "chat_template_kwargs",
        "truncate_prompt_tokens",
        "min_tokens",
        "ignore_eos",
        "stop_token_ids",
        "repetition_penalty",
        "web_search_options",
    ]
    extra = {"user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto"}
    assert chat(**dict.fromkeys(names), **extra).request == chat().request


def test_what_asks_for_nothing_special_is_taken() -> None:
    call = chat(
        tools=[{"type": "function"}],
        tool_choice="none",
        functions=[],
        response_format={"type": "text"},
        modalities=["text"],
        parallel_tool_calls=True,
        stop="x",
    )
    assert generation(call).sampling.stop == ("x",)


def test_the_newer_name_of_the_token_limit_wins() -> None:
    call = chat(max_tokens=5, max_completion_tokens=3)
    assert generation(call).sampling.max_tokens == 3


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_logprobs(fields: dict[str, Any], logprobs: int | None) -> None:
    assert generation(chat(**fields)).logprobs == logprobs


@pytest.mark.parametrize(
    ("message", "turn"),
    [
        ({"role": "system", "content": "a"}, Message("system", "a")),
        ({"role": "developer", "content": "a"}, Message("system", "a")),
        ({"role": "user", "content": "a", "name": "Ada"}, Message("user", "a", "Ada")),
        ({"role": "user", "content": ""}, Message("user", "")),
        ({"role": "assistant", "content": None}, Message("assistant", "")),
        ({"role": "assistant"}, Message("assistant", "")),
        ({"role": "assistant", "content": "a", "tool_calls": []}, Message("assistant", "a")),
        ({"role": "tool", "content": "4", "tool_call_id": "x"}, Message("tool", "4")),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            Message("user", "a"),
        ),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            Message("user", "a\nb"),
        ),
    ],
)
def test_each_kind_of_message(message: Any, turn: Message) -> None:
    assert generation(chat(messages=[message])).messages == (turn,)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("text", "messages"),
        ([], "messages"),
        ([123], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": 1, "content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 123}], "messages[0].content"),
        ([{"role": "user", "content": [{}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        (
            [*HI, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[1].content[0].type",
        ),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ],
)
def test_a_bad_message_is_refused_by_its_place(messages: Any, param: str) -> None:
    error = refusal("openai.chat", {"messages": messages}, Task.TEXT_GENERATION)
    assert error.param == param
    assert route("openai.chat").error(error).status == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", "many"),
        ("max_tokens", 1.5),
        ("max_tokens", 10**30),
        ("max_completion_tokens", 0),
        ("min_tokens", 5),
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", 2.1),
        ("top_p", 7),
        ("top_p", -0.1),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("logit_bias", {"a": 1}),
        ("logit_bias", [1]),
        ("seed", 2**63),
        ("stream", "perhaps"),
        ("stream_options", {"include_usage": 3}),
        ("stop", {"a": 1}),
        ("stop", ""),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop_token_ids", [-1]),
        ("n", 0),
        ("n", 129),
        ("logprobs", 3),
        ("top_logprobs", 2),
        ("top_logprobs", 21),
        ("truncate_prompt_tokens", 5),
        ("tools", [{"type": "function"}]),
        ("tools", "hammer"),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("web_search_options", {}),
        ("structured_outputs", {"regex": "a"}),
        ("chat_template_kwargs", {"chat_template": "{{ x }}"}),
        ("chat_template_kwargs", {"tokenize": True}),
    ],
)
def test_a_bad_field_is_refused_by_its_name(field: str, value: Any) -> None:
    body = {"messages": HI, "max_tokens": 2, field: value}
    error = refusal("openai.chat", body, Task.TEXT_GENERATION)
    assert error.param is not None
    assert error.param.startswith(field)
    assert field in error.message
    assert route("openai.chat").error(error).status == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{not json",
        b"[1,2]",
        b'"x"',
        b"\xff\xfe",
        b"a=b",
        b'{"messages":[{"role":"user","content":"a"}],"temperature":NaN}',
        b'{"messages":[{"role":"user","content":"a"}],"temperature":Infinity}',
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":"\xff"}]}',
        b'{"model":' + b"[" * 20000 + b"]" * 20000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    error = refusal("openai.chat", body, Task.TEXT_GENERATION)
    assert route("openai.chat").error(error).status == 400


def test_another_task_is_refused_with_the_right_route() -> None:
    error = refusal("openai.chat", {"messages": HI}, Task.FEATURE_EXTRACTION)
    assert isinstance(error, TaskNotSupported)
    assert "/v1/embeddings" in error.message


# -- whole answers ------------------------------------------------------------------


def test_the_client_reads_a_whole_answer() -> None:
    result = Generated((Choice(0, "He", "stop"), Choice(1, "Ho", "length")), Usage(3, 2))
    shown = chat(n=2).whole(result)
    found = ChatCompletion.model_validate_json(shown.body)
    assert (shown.status, shown.content_type) == (200, "application/json")
    assert (found.id, found.model, found.created) == ("chatcmpl-r1", "m", 1_700_000_000)
    assert [choice.message.content for choice in found.choices] == ["He", "Ho"]
    assert [choice.finish_reason for choice in found.choices] == ["stop", "length"]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (3, 2)
    assert found.usage.total_tokens == 5
    # Required by the document, though null.
    choice = json.loads(shown.body)["choices"][0]
    assert choice["logprobs"] is None
    assert choice["message"]["refusal"] is None


def test_the_deployment_stands_in_for_a_model_that_was_not_named() -> None:
    call = ask("openai.chat.model", {"messages": HI}, Task.TEXT_GENERATION)
    shown = call.whole(Generated((Choice(0, "a", "stop"),), Usage(1, 1)))
    assert json.loads(shown.body)["model"] == "my-model"


def test_logprobs_of_a_whole_answer() -> None:
    result = Generated((Choice(0, "He", "stop", (TOKEN,)),), Usage(3, 1))
    shown = chat(logprobs=True, top_logprobs=2).whole(result)
    logprobs = ChatCompletion.model_validate_json(shown.body).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    (entry,) = logprobs.content
    assert (entry.token, entry.logprob, entry.bytes) == ("He", -0.5, [72, 101])
    assert [top.logprob for top in entry.top_logprobs] == [-0.5, -9999.0]
    # Half a character has no bytes that its text could tell.
    assert entry.top_logprobs[1].bytes is None


# -- streams --------------------------------------------------------------------------


def test_a_stream_from_role_to_done() -> None:
    call = chat(stream=True)
    data = (
        call.opening()
        + call.delta(Delta(0, "He"))
        + call.delta(Delta(0, ""))
        + call.delta(Delta(0, "y", (), "stop"))
        + call.closing(Usage(3, 2))
    )
    first, *middle, last = events(data)[:-1]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [item["choices"][0]["delta"] for item in middle] == [{"content": "He"}, {"content": "y"}]
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "stop"
    # Who asked for no usage chunk still gets the usage, on the last chunk.
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    for item in (first, *middle):
        assert item["choices"][0]["finish_reason"] is None
        assert "usage" not in item
    found = chunks(data)
    assert {item.id for item in found} == {"chatcmpl-r1"}
    assert {item.created for item in found} == {1_700_000_000}
    assert {item.object for item in found} == {"chat.completion.chunk"}
    assert data.endswith(b"data: [DONE]\n\n")


def test_the_usage_chunk_is_the_last_and_the_only_one_without_choices() -> None:
    call = chat(stream=True, stream_options={"include_usage": True})
    data = call.opening() + call.delta(Delta(0, "He", (), "length")) + call.closing(Usage(3, 1))
    *before, last = events(data)[:-1]
    assert all(item["choices"] and item["usage"] is None for item in before)
    assert before[-1]["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 4
    chunks(data)


@pytest.mark.parametrize("include_usage", [False, True])
def test_several_choices_in_one_stream(include_usage: bool) -> None:
    call = chat(stream=True, n=3, stream_options={"include_usage": include_usage})
    data = call.opening()
    for delta in (
        Delta(2, "c"),
        Delta(0, "a", (), "stop"),
        Delta(2, "", (), "length"),
        Delta(1, "b"),
        Delta(1, "", (), "stop"),
    ):
        data += call.delta(delta)
    data += call.closing(Usage(1, 3))
    found = [item for item in chunks(data) if item.choices]
    roles = [item.choices[0].index for item in found if item.choices[0].delta.role]
    finished = {
        item.choices[0].index: item.choices[0].finish_reason
        for item in found
        if item.choices[0].finish_reason
    }
    assert roles == [0, 1, 2]
    assert finished == {0: "stop", 1: "stop", 2: "length"}
    usages = [item for item in chunks(data) if item.usage]
    assert len(usages) == 1
    assert usages[0].choices == [] if include_usage else usages[0].choices[0].index == 1


def test_logprobs_of_a_stream() -> None:
    call = chat(stream=True, logprobs=True)
    data = (
        call.opening() + call.delta(Delta(0, "", (TOKEN,))) + call.delta(Delta(0, "He", (TOKEN,)))
    )
    data += call.delta(Delta(0, "", (), "stop")) + call.closing(Usage(1, 2))
    tokens = [
        entry
        for item in chunks(data)
        if (logprobs := item.choices[0].logprobs) is not None
        for entry in logprobs.content or ()
    ]
    assert [entry.token for entry in tokens] == ["He", "He"]


def test_a_stream_that_fails_says_so_and_ends() -> None:
    call = chat(stream=True)
    error, done = events(call.failure(errors.WorkerLost()))
    assert error["error"]["type"] == "server_error"
    assert done == "[DONE]"


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8))
def test_any_text_survives_a_stream(texts: list[str]) -> None:
    call = chat(stream=True)
    data = call.opening() + b"".join(call.delta(Delta(0, text)) for text in texts)
    data += call.delta(Delta(0, "", (), "stop")) + call.closing(Usage())
    shown = "".join(item.choices[0].delta.content or "" for item in chunks(data))
    assert shown == "".join(texts)
