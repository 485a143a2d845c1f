from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from asking import ask, events, refusal, route
from huggingface_hub import (
    FillMaskOutputElement,
    TextClassificationOutputElement,
    TextGenerationOutput,
    TextGenerationStreamOutput,
)

from tursi import errors
from tursi.faces.route import Call
from tursi.model import Task, Usage
from tursi.tasks import (
    Choice,
    Classifications,
    ClassifyRequest,
    Delta,
    Embeddings,
    EmbedRequest,
    Fill,
    FillMaskRequest,
    Fills,
    Generated,
    GenerateRequest,
    Label,
    Sampling,
    Similarities,
    SimilarityRequest,
    TaskResult,
    TokenLogprob,
)

HE = TokenLogprob("He", 7, -0.5)
YO = TokenLogprob("yo", 8, float("-inf"))


def shown(body: dict[str, Any], task: Task, result: TaskResult) -> Any:
    answer = ask("huggingface", body, task).whole(result)
    assert (answer.status, answer.content_type) == (200, "application/json")
    return json.loads(answer.body)


# -- feature extraction and sentence similarity -------------------------------------


@pytest.mark.parametrize(
    ("body", "request_"),
    [
        ({"inputs": "a"}, EmbedRequest(("a",))),
        ({"inputs": ["a", "b"], "parameters": {}}, EmbedRequest(("a", "b"))),
        (
            {"inputs": "a", "normalize": True, "truncate": False, "prompt_name": "query"},
            EmbedRequest(("a",), normalize=True, truncate=False, prompt_name="query"),
        ),
        (
            {"inputs": "a", "normalize": False, "parameters": {"normalize": True, "dimensions": 2}},
            EmbedRequest(("a",), normalize=False, dimensions=2),
        ),
        ({"inputs": "a", "truncation_direction": "right"}, EmbedRequest(("a",))),
        (
            {"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}, "parameters": {}},
            SimilarityRequest("a", ("b", "c")),
        ),
        (
            {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "truncate": True},
            SimilarityRequest("a", ("b",), truncate=True),
        ),
    ],
)
def test_embedding_bodies(body: dict[str, Any], request_: object) -> None:
    assert ask("huggingface", body, Task.FEATURE_EXTRACTION).request == request_


def test_one_text_gives_a_list_with_one_vector() -> None:
    result = Embeddings(struct.pack("<2f", 0.5, 2), 1, 2, Usage(3))
    assert shown({"inputs": "a"}, Task.FEATURE_EXTRACTION, result) == [[0.5, 2.0]]


def test_cut_inputs_are_counted_in_a_header() -> None:
    call = ask("huggingface", {"inputs": ["a", "b"]}, Task.FEATURE_EXTRACTION)
    result = Embeddings(struct.pack("<2f", 0.5, 2), 2, 1, Usage(3), truncated=(0, 1))
    assert call.whole(result).headers == {"x-tursi-truncated": "2"}


def test_similarities_are_a_plain_list() -> None:
    body = {"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}}
    result = Similarities((1.0, 0.25), Usage(3))
    assert shown(body, Task.FEATURE_EXTRACTION, result) == [1.0, 0.25]


# -- text classification ------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "request_"),
    [
        ({"inputs": "a"}, ClassifyRequest(("a",))),
        ({"inputs": ["a", "b"]}, ClassifyRequest(("a", "b"))),
        ({"inputs": {"text": "a", "text_pair": "b"}}, ClassifyRequest((("a", "b"),))),
        (
            {"inputs": [{"text": "a"}, {"text": "a", "text_pair": "b"}, "c"]},
            ClassifyRequest(("a", ("a", "b"), "c")),
        ),
        (
            {"inputs": "a", "parameters": {"top_k": 2, "function_to_apply": "sigmoid"}},
            ClassifyRequest(("a",), top_k=2, function="sigmoid"),
        ),
        (
            {"inputs": "a", "parameters": {"truncate": True, "top_k": None}},
            ClassifyRequest(("a",), truncate=True),
        ),
    ],
)
def test_classification_bodies(body: dict[str, Any], request_: ClassifyRequest) -> None:
    assert ask("huggingface", body, Task.TEXT_CLASSIFICATION).request == request_


@pytest.mark.parametrize("inputs", ["a", ["a"], {"text": "a", "text_pair": "b"}])
def test_labels_are_nested_even_for_one_text(inputs: Any) -> None:
    result = Classifications(((Label("POSITIVE", 0.75), Label("NEGATIVE", 0.25)),), Usage(3))
    found = shown({"inputs": inputs}, Task.TEXT_CLASSIFICATION, result)
    assert len(found) == 1
    labels = TextClassificationOutputElement.parse_obj_as_list(found[0])
    assert [(item.label, item.score) for item in labels] == [("POSITIVE", 0.75), ("NEGATIVE", 0.25)]


# -- fill-mask ------------------------------------------------------------------------

FILL = Fill(0.5, 9, "fox", "The fox.")


@pytest.mark.parametrize(
    ("body", "request_"),
    [
        ({"inputs": "[MASK]"}, FillMaskRequest(("[MASK]",), top_k=5)),
        ({"inputs": ["[MASK]"]}, FillMaskRequest(("[MASK]",), top_k=5)),
        (
            {"inputs": "[MASK]", "parameters": {"top_k": 2, "targets": ["a", "b"]}},
            FillMaskRequest(("[MASK]",), top_k=2, targets=("a", "b")),
        ),
        (
            {"inputs": "[MASK]", "parameters": {"targets": "a", "truncate": True}},
            FillMaskRequest(("[MASK]",), targets=("a",), truncate=True),
        ),
    ],
)
def test_fill_mask_bodies(body: dict[str, Any], request_: FillMaskRequest) -> None:
    assert ask("huggingface", body, Task.FILL_MASK).request == request_


def test_fill_mask_answers_by_the_number_of_masks_and_texts() -> None:
    one, two = ((FILL,),), ((FILL,), (FILL,))
    fill = {"score": 0.5, "token": 9, "token_str": "fox", "sequence": "The fox."}
    for inputs, items, expected in (
        ("a", (one,), [fill]),
        ("a", (two,), [[fill], [fill]]),
        (["a"], (one,), [[fill]]),
        (["a", "b"], (one, two), [[fill], [[fill], [fill]]]),
    ):
        found = shown({"inputs": inputs}, Task.FILL_MASK, Fills(items, Usage(3)))
        assert found == expected
    (element,) = FillMaskOutputElement.parse_obj_as_list([fill])
    assert element.token_str == "fox"


# -- text generation ------------------------------------------------------------------


def generate(inputs: Any = "a", stream: bool | None = None, **parameters: Any) -> Call:
    body = {"inputs": inputs, "parameters": parameters, "stream": stream}
    return ask("huggingface", body, Task.TEXT_GENERATION)


def sampling(**parameters: Any) -> Sampling:
    request = generate(**parameters).request
    assert isinstance(request, GenerateRequest)
    return request.sampling


def test_generation_is_greedy_unless_sampling_is_asked_for() -> None:
    assert sampling() == Sampling(max_tokens=100, temperature=0.0)
    assert sampling(do_sample=True).temperature == 1.0
    assert sampling(temperature=0.5).temperature == 0.5
    assert sampling(top_p=0.5).temperature == 1.0
    assert sampling(top_k=5, do_sample=False).temperature == 0.0


def test_every_parameter_of_generation() -> None:
    found = sampling(
        max_new_tokens=5,
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        repetition_penalty=1.1,
        frequency_penalty=0.5,
        stop=["x"],
        stop_sequences=["y"],
        seed=4,
    )
    assert found == Sampling(
        max_tokens=5,
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        repetition_penalty=1.1,
        frequency_penalty=0.5,
        stop=("x", "y"),
        seed=4,
    )


def test_the_prompt_is_repeated_only_where_asked() -> None:
    result = Generated((Choice(0, "He", "stop"),), Usage(3, 1))
    plain = json.loads(generate().whole(result).body)
    full = json.loads(generate(return_full_text=True).whole(result).body)
    assert plain == [{"generated_text": "He"}]
    assert full == [{"generated_text": "aHe"}]


def test_a_list_of_texts_gives_a_list_of_lists() -> None:
    result = Generated((Choice(0, "He", "stop"), Choice(1, "Ho", "stop")), Usage(3, 2))
    found = json.loads(generate(["a", "b"], return_full_text=True).whole(result).body)
    assert found == [[{"generated_text": "aHe"}], [{"generated_text": "bHo"}]]


@pytest.mark.parametrize(
    ("parameters", "finish", "shown_as"),
    [
        ({}, "stop", "eos_token"),
        ({"stop": ["x"]}, "stop", "stop_sequence"),
        ({}, "length", "length"),
    ],
)
def test_the_client_reads_details(parameters: Any, finish: Any, shown_as: str) -> None:
    call = generate(details=True, seed=4, **parameters)
    assert isinstance(call.request, GenerateRequest)
    assert call.request.logprobs == 0
    result = Generated((Choice(0, "Heyo", finish, (HE, YO)),), Usage(3, 2))
    found = TextGenerationOutput.parse_obj_as_instance(json.loads(call.whole(result).body)[0])
    assert found.details is not None
    assert found.details.finish_reason == shown_as
    assert (found.details.generated_tokens, found.details.seed) == (2, 4)
    assert [token.logprob for token in found.details.tokens] == [-0.5, -9999.0]


def test_the_client_reads_a_stream_of_tokens() -> None:
    call = generate(stream=True, details=True, return_full_text=True)
    assert call.stream
    data = call.opening()
    for delta in (
        Delta(0, "", (HE,)),
        Delta(0, "Heyo", (YO, HE)),
        Delta(0, ""),
        Delta(0, "!", (YO,), "length"),
    ):
        data += call.delta(delta)
    data += call.closing(Usage(3, 4))
    found = [TextGenerationStreamOutput.parse_obj_as_instance(item) for item in events(data)]
    assert [item.index for item in found] == [1, 2, 3, 4]
    assert "".join(item.token.text for item in found) == "Heyo!"
    assert [item.generated_text for item in found] == [None, None, None, "aHeyo!"]
    details = found[-1].details
    assert details is not None
    assert (details.finish_reason, details.generated_tokens, details.input_length) == (
        "length",
        4,
        3,
    )


def test_a_stream_may_end_without_a_token() -> None:
    call = generate(stream=True)
    data = call.delta(Delta(0, "He", (HE,))) + call.delta(Delta(0, "", (), "stop"))
    first, last = events(data + call.closing(Usage(3, 1)))
    assert first["token"] == {"id": 7, "text": "He", "logprob": -0.5, "special": False}
    assert last["token"] == {"id": 0, "text": "", "logprob": None, "special": True}
    assert last["generated_text"] == "He"
    assert last["details"] is None


def test_a_stream_may_end_without_a_reason() -> None:
    call = generate(stream=True)
    (last,) = events(call.closing(Usage(3, 0)))
    assert last["generated_text"] == ""


def test_a_stream_that_fails_says_so() -> None:
    (item,) = events(generate(stream=True).failure(errors.WorkerLost()))
    assert (item["error"], item["error_type"]) == (errors.WorkerLost().message, "generation")


# -- refusals -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "body", "param"),
    [
        (Task.FEATURE_EXTRACTION, {"inputs": ""}, "inputs"),
        (Task.FEATURE_EXTRACTION, {"inputs": []}, "inputs"),
        (Task.FEATURE_EXTRACTION, {"inputs": 3}, "inputs"),
        (Task.FEATURE_EXTRACTION, {"inputs": {}}, "inputs.source_sentence"),
        (
            Task.FEATURE_EXTRACTION,
            {"inputs": {"source_sentence": "a", "sentences": []}},
            "inputs.sentences",
        ),
        (
            Task.FEATURE_EXTRACTION,
            {"inputs": "a", "truncation_direction": "left"},
            "truncation_direction",
        ),
        (
            Task.FEATURE_EXTRACTION,
            {"inputs": "a", "parameters": {"encoding_format": "base64"}},
            "encoding_format",
        ),
        (Task.TEXT_CLASSIFICATION, {"inputs": ""}, "inputs"),
        (Task.TEXT_CLASSIFICATION, {"inputs": []}, "inputs"),
        (Task.TEXT_CLASSIFICATION, {"inputs": {"text_pair": "b"}}, "inputs.text"),
        (Task.TEXT_CLASSIFICATION, {"inputs": "a", "parameters": {"top_k": 0}}, "parameters.top_k"),
        (
            Task.TEXT_CLASSIFICATION,
            {"inputs": "a", "parameters": {"function_to_apply": "relu"}},
            "parameters.function_to_apply",
        ),
        (Task.FILL_MASK, {"inputs": {"a": 1}}, "inputs"),
        (Task.FILL_MASK, {"inputs": "a", "parameters": {"targets": []}}, "parameters.targets"),
        (Task.TEXT_GENERATION, {"inputs": ["a"], "stream": True}, "inputs"),
        (Task.TEXT_GENERATION, {"inputs": [1]}, "inputs[0]"),
        *(
            (
                Task.TEXT_GENERATION,
                {"inputs": "a", "parameters": {name: value}},
                f"parameters.{name}",
            )
            for name, value in (
                ("max_new_tokens", 0),
                ("temperature", -1),
                ("top_p", 0),
                ("top_p", 2),
                ("repetition_penalty", 0),
                ("seed", -1),
                ("stop", "x"),
                ("best_of", 2),
                ("num_return_sequences", 2),
                ("decoder_input_details", True),
                ("top_n_tokens", 3),
                ("typical_p", 0.5),
                ("watermark", True),
                ("adapter_id", "x"),
                ("grammar", {"type": "json", "value": {}}),
                ("truncate", 5),
            )
        ),
    ],
)
def test_a_bad_body_is_refused_by_its_field(task: Task, body: dict[str, Any], param: str) -> None:
    error = refusal("huggingface", body, task)
    assert error.param == param
    answer = route("huggingface").error(error)
    found = json.loads(answer.body)
    assert answer.status == 400
    assert found["error"] == error.message
    assert (found["code"], found["error_type"]) == ("invalid_request", "validation")


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize(
    "body", [b"", b"{}", b"{nope", b"[]", b'{"inputs": NaN}', b'{"inputs": null}']
)
def test_what_has_no_inputs_is_refused(task: Task, body: bytes) -> None:
    assert route("huggingface").error(refusal("huggingface", body, task)).status == 400


def test_errors_carry_what_programs_read() -> None:
    full = route("huggingface").error(errors.QueueFull(retry_after=3))
    assert json.loads(full.body) == {
        "error": errors.QueueFull().message,
        "code": "queue_full",
        "error_type": "overloaded",
        "retry_after": 3,
    }
    assert (full.status, full.headers) == (429, {"Retry-After": "3"})
    lost = json.loads(route("huggingface").error(errors.WorkerLost(reference="life")).body)
    assert lost["reference"] == "life"
    defect = json.loads(route("huggingface").error(errors.InternalError(reference="abc")).body)
    assert defect["incident"] == "abc"
