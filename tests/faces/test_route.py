from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from asking import route
from hypothesis import given
from hypothesis import strategies as st

from tursi import errors
from tursi.errors import InvalidRequest, TursiError, by_code
from tursi.faces import TABLE
from tursi.faces.route import STATUS, Context, Whole, addressed, decoded, require_task, status_of
from tursi.model import Task, Usage
from tursi.tasks import Delta, EmbedRequest

ROUTES = (
    "openai.embeddings",
    "openai.chat",
    "openai.completions",
    "openai.embeddings.model",
    "openai.chat.model",
    "openai.completions.model",
    "huggingface",
)


@pytest.mark.parametrize(
    "half", [r"\ud800", r"a\udc00b", r"\ud800\u0041", r"\uDBFFx", r"\ude00\ud83d"]
)
def test_half_of_a_surrogate_pair_is_called_that(half: str) -> None:
    for body in (f'{{"model": "{half}"}}', f'{{"input": "{half}", "model": "m"}}'):
        with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
            addressed(body.encode())
    assert addressed(rb'{"model": "\ud83d\ude00"}') == ("\N{GRINNING FACE}", None)


@pytest.mark.parametrize(
    ("path", "name", "model"),
    [
        ("/v1/embeddings", "openai.embeddings", None),
        ("/v1/chat/completions", "openai.chat", None),
        ("/v1/completions", "openai.completions", None),
        ("/models/a", "huggingface", "a"),
        ("/models/org/a", "huggingface", "org/a"),
        ("/models/org%2Fa", "huggingface", "org/a"),
        ("/models/a/v1/embeddings", "openai.embeddings.model", "a"),
        ("/models/org/a/v1/chat/completions", "openai.chat.model", "org/a"),
        ("/models/org%2Fa/v1/completions", "openai.completions.model", "org/a"),
    ],
)
def test_a_path_leads_to_its_route(path: str, name: str, model: str | None) -> None:
    match = TABLE.find(path)
    assert match is not None
    assert (match.route.name, match.model) == (name, model)


@pytest.mark.parametrize(
    "path", ["", "/", "/v1", "/v1/embeddings/", "/V1/embeddings", "/models/", "/models/a/b/c", "/x"]
)
def test_other_paths_lead_nowhere(path: str) -> None:
    assert TABLE.find(path) is None


def test_every_route_is_found_by_its_name() -> None:
    assert [route(name).name for name in ROUTES] == list(ROUTES)
    assert TABLE.named("nothing") is None


def test_every_route_has_types_that_make_an_openapi_document() -> None:
    for name in ROUTES:
        one = route(name)
        schemas, components = msgspec.json.schema_components(
            (*one.body, *one.reply), ref_template="#/components/schemas/{name}"
        )
        assert len(schemas) == len(one.body) + len(one.reply)
        assert components
        assert one.summary


def test_every_status_belongs_to_a_known_error() -> None:
    assert set(STATUS) <= set(by_code())
    assert status_of(errors.InternalError()) == 500
    assert status_of(errors.WeightsCorrupt()) == 500


def test_the_model_is_read_without_judging_the_rest() -> None:
    assert addressed(b'{"input": 3, "model": "a", "more": [[[]]]}') == ("a", None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'"a"',
        b"{",
        b"\xff",
        b'{"model": null}',
        b'{"model": ""}',
        b'{"model": 1}',
        b'{"model": "a", "x": "\xff"}',
        b'{"model":' + b"[" * 20000 + b"]" * 20000 + b"}",
        b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    ],
)
def test_a_body_without_a_model_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        addressed(body)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("null", None),
        ("30", 30.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("-1", -1.0),
        ("-0.5", -0.5),
        ('"10m"', 600.0),
        ('"-1m"', -60.0),
        ('"1h30m"', 5400.0),
        ('"300ms"', 0.3),
        ("1e30", 366 * 86400.0),
        ('"2000000h"', 366 * 86400.0),
    ],
)
def test_how_long_the_model_shall_stay(said: str, seconds: float | None) -> None:
    body = f'{{"model": "a", "input": "b", "keep_alive": {said}}}'.encode()
    assert addressed(body) == ("a", seconds)
    # Whatever the body calls it, the path counts.
    assert addressed(body, "b") == ("b", seconds)


@pytest.mark.parametrize("said", ["true", "[]", "{}", '"10"', '"soon"', '""', "1e999"])
def test_what_is_no_duration_is_refused(said: str) -> None:
    body = f'{{"model": "a", "keep_alive": {said}}}'.encode()
    for model in (None, "a"):
        with pytest.raises(InvalidRequest) as refused:
            addressed(body, model)
        assert refused.value.param == "keep_alive"


def test_a_body_for_a_path_is_looked_at_only_where_it_may_say_how_long() -> None:
    assert addressed(b"\xff{", "a") == ("a", None)
    assert addressed(b'{"inputs": "the \\"keep_alive\\" field', "a") == ("a", None)
    assert addressed(b'{"inputs": {"keep_alive": []}}', "a") == ("a", None)


class _Inner(msgspec.Struct):
    number: int


class _Outer(msgspec.Struct):
    items: list[_Inner]
    names: dict[int, str] = {}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"{}", "items", "lacks the field 'items'"),
        (b'{"items": [{}]}', "items[0].number", "lacks the field 'items[0].number'"),
        (b'{"items": [{"number": "x"}]}', "items[0].number", "expected `int`, got `str`"),
        (b'{"items": [], "names": {"a": "b"}}', "names", "expected `int`"),
        (b"[1]", None, "expected `object`, got `array`"),
        (b'{"items": NaN}', None, "isn't valid JSON"),
        (b"", None, "is empty"),
        (b"\xff\xfe", None, "UTF-8"),
        (b'{"items":' + b"[" * 20000, None, "nested too deeply"),
        (b'{"items": [], "items": []}', None, "has the field 'items' more than once"),
        (b'{"items": [{"number": 1, "\\u006eumber": 2}]}', None, "'number' more than once"),
    ],
)
def test_a_refused_body_names_the_place(body: bytes, param: str | None, words: str) -> None:
    decoder = msgspec.json.Decoder(list[Any] if b"[[" in body else _Outer)
    with pytest.raises(InvalidRequest) as caught:
        decoded(decoder, body.removeprefix(b'{"items":') if b"[[" in body else body)
    assert caught.value.param == param
    assert words in caught.value.message
    assert caught.value.message.endswith(".")


def test_what_is_skipped_may_be_of_any_size_and_depth() -> None:
    decoder = msgspec.json.Decoder(_Outer)
    assert decoded(decoder, b'{"items": [], "more": %b}' % (b"9" * 9000)) == _Outer([])
    for depth in range(700, 1010):
        nested = b"[" * depth + b"]" * depth
        with suppress(InvalidRequest):
            assert decoded(decoder, b'{"items": [], "more": %b}' % nested) == _Outer([])


def test_the_wrong_task_names_the_right_route() -> None:
    context = Context("bert", Task.FEATURE_EXTRACTION, "r", 0)
    require_task(context, frozenset({Task.FEATURE_EXTRACTION}))
    with pytest.raises(errors.TaskNotSupported, match=r"feature-extraction.*/v1/embeddings"):
        require_task(context, frozenset({Task.TEXT_GENERATION}))


def test_a_whole_call_has_no_stream() -> None:
    call = Whole(EmbedRequest(("a",)), lambda result: result)
    assert call.stream is False
    pieces = (
        call.opening(),
        call.delta(Delta(0, "a")),
        call.closing(Usage()),
        call.failure(errors.WorkerLost()),
    )
    assert pieces == (b"",) * 4


_FIELDS = st.sampled_from(
    [
        "model",
        "input",
        "inputs",
        "prompt",
        "messages",
        "parameters",
        "role",
        "content",
        "type",
        "text",
        "stream",
        "stop",
        "n",
        "seed",
        "logprobs",
        "top_logprobs",
        "temperature",
        "max_tokens",
        "echo",
        "best_of",
        "logit_bias",
        "encoding_format",
        "dimensions",
        "source_sentence",
        "sentences",
        "text_pair",
        "top_k",
        "details",
        "truncate",
        "targets",
        "tools",
        "stream_options",
        "include_usage",
        "response_format",
        "chat_template_kwargs",
        "truncate_prompt_tokens",
        "truncation_direction",
        "function_to_apply",
        "grammar",
    ]
)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "text", "float", "base64", "hello", "\ud800", "\0"])
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(_FIELDS | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
_OBJECTS = st.dictionaries(_FIELDS, _VALUES, max_size=8)
_BODIES = st.binary(max_size=64) | _OBJECTS.map(lambda value: json.dumps(value).encode())


@given(name=st.sampled_from(ROUTES), task=st.sampled_from(list(Task)), body=_BODIES)
def test_no_body_raises_anything_but_an_error_of_ours(name: str, task: Task, body: bytes) -> None:
    try:
        call = route(name).decode(body, "", Context("m", task, "r", 0))
    except TursiError as error:
        answer = route(name).error(error)
        assert answer.status == 400
        json.loads(answer.body)
    else:
        assert isinstance(call.stream, bool)


@given(data=st.binary(max_size=64))
def test_no_path_raises(data: bytes) -> None:
    TABLE.find("/models/" + data.decode("latin-1"))
