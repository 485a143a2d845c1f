from __future__ import annotations

import math
from typing import Any

import pytest

from tursi import claims
from tursi.model import Loaded, Progress, Usage
from tursi.wire import End, Head, LastWords, WireError


def test_what_is_honest_passes() -> None:
    for head in (
        Head(200, "application/json", {}),
        Head(503, "application/json", {"Retry-After": "5"}),
        Head(503, "application/json", {"x-should-retry": "false"}),
        Head(200, "text/event-stream", {}),
    ):
        assert claims.head(head) == head
    end = End(Usage(1, 2, 3, 0.5, 60.0), "context_length_exceeded")
    assert claims.end(end) == end
    for step in (Progress("load", 0.5, 2, "tensors"), Progress("warm")):
        assert claims.progress(step) == step
    loaded = Loaded("fill-mask", "cuda:0", "bfloat16", versions={"torch": "2.10.0+cu128"})
    assert claims.loaded(loaded) == loaded
    words = LastWords("load_failed", "It can't.", "Traceback:\n\tline\nError: x")
    assert claims.last_words(words) == words


@pytest.mark.parametrize(
    "head",
    [
        Head(101, "application/json", {}),
        Head(199, "application/json", {}),
        Head(999, "application/json", {}),
        Head(0, "application/json", {}),
        Head(200, "application/json\r\nSet-Cookie: a=b", {}),
        Head(200, "text/html", {}),
        Head(200, "", {}),
        Head(200, "application/json", {"Content-Length": "0"}),
        Head(200, "application/json", {"Transfer-Encoding": "chunked"}),
        Head(200, "application/json", {"Set-Cookie": "a=b"}),
        Head(200, "application/json", {"X-Accel-Redirect": "/etc/shadow"}),
        Head(200, "application/json", {"Access-Control-Allow-Origin": "*"}),
        Head(200, "application/json", {"Retry-After": "1\r\nSet-Cookie: a=b"}),
        Head(200, "application/json", {"Retry-After": "\u2028"}),
        Head(200, "application/json", {"Retry-After\r\nA": "1"}),
    ],
)
def test_an_answer_that_would_be_more_than_one_is_none(head: Head) -> None:
    with pytest.raises(WireError):
        claims.head(head)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, -1.0, 1e30])
def test_times_that_nothing_can_be_added_to(seconds: float) -> None:
    with pytest.raises(WireError):
        claims.end(End(Usage(queue_seconds=seconds), ""))
    with pytest.raises(WireError):
        claims.end(End(Usage(compute_seconds=seconds), ""))
    with pytest.raises(WireError):
        claims.loaded(Loaded("fill-mask", "cpu", "float32", load_seconds=seconds))
    if not 0 < seconds < math.inf:
        for amounts in ((seconds, None), (None, seconds)):
            with pytest.raises(WireError):
                claims.progress(Progress("load", *amounts))


@pytest.mark.parametrize("parts", [(-1, 2), (1, 10**30)])
def test_files_that_can_not_be_counted(parts: tuple[int, int]) -> None:
    assert claims.progress(Progress("load", part=1, parts=2)) == Progress("load", part=1, parts=2)
    with pytest.raises(WireError):
        claims.progress(Progress("load", 1.0, 2.0, "bytes", *parts))


def test_an_error_that_nobody_knows_is_an_internal_one() -> None:
    assert claims.end(End(Usage(), "a_code_of_its_own")).error == "internal_error"


@pytest.mark.parametrize(
    "said",
    [
        {"task": "fill-mask\n"},
        {"task": "x" * 100_000},
        {"device": "cpu\x1b[2J"},
        {"dtype": ""},
        {"dtype": "float32" * 100},
    ],
)
def test_a_model_of_no_kind(said: dict[str, Any]) -> None:
    with pytest.raises(WireError) as raised:
        claims.loaded(Loaded(**{"task": "fill-mask", "device": "cpu", "dtype": "float32", **said}))
    assert len(str(raised.value)) < 300


def test_words_are_made_harmless_and_cut() -> None:
    forged = "a\n2026-01-01 b\x1b[31m\u202e\u2066\x9b\r"
    harmless = "a\\x0a2026-01-01 b\\x1b[31m\\u202e\\u2066\\x9b\\x0d"
    assert claims.progress(Progress(forged)).stage == harmless
    assert claims.last_words(LastWords("c", forged)).message == harmless
    assert claims.last_words(LastWords("c", "m", forged)).traceback.count("\n") == 1
    versions = claims.loaded(
        Loaded("fill-mask", "cpu", "float32", versions={str(n): forged * 99 for n in range(99)})
    ).versions
    assert len(versions) == 32
    choices = claims.loaded(
        Loaded("fill-mask", "cuda:0,cuda:1", "float32", choices={str(n): forged for n in range(99)})
    ).choices
    assert (len(choices), {*choices.values()}) == (16, {harmless})
    assert len(claims.progress(Progress("x" * 10**6)).stage) < 200
    assert len(claims.last_words(LastWords("c", "x" * 10**6)).message) < 1100
    long = "x" * 10**6 + "the end"
    assert claims.last_words(LastWords("c", "m", long)).traceback.endswith("the end")
    assert len(claims.last_words(LastWords("c", "m", long)).traceback) == claims.MAX_TRACEBACK
