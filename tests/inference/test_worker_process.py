from __future__ import annotations

import base64
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import minilm
import models
import msgspec
import numpy as np
import pytest
from worker_process import WorkerProcess, worker_process

from tursi.model import LoadOrder, Progress
from tursi.wire import PROTOCOL_VERSION, Hello, Kind, LastWords

REFERENCE = json.loads((Path(__file__).parent / "minilm-reference.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with worker_process(tmp_path_factory.mktemp("embedder") / "log") as process:
        process.load(minilm.minilm_folder(), device="cpu")
        yield process


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    folder = models.chat(tmp_path_factory.mktemp("chat"), context=16_384)
    with worker_process(folder / "log") as process:
        process.load(folder, device="cpu")
        yield process


def long_chat(**more: object) -> dict[str, object]:
    """A request that takes far longer than any test."""
    messages = [{"role": "user", "content": "hello"}]
    return {
        "model": "test",
        "messages": messages,
        "max_tokens": 16_000,
        "ignore_eos": True,
        "stream": True,
    } | more


def test_it_greets_before_it_loads_and_tells_how_far_it_is(embedder: WorkerProcess) -> None:
    kinds = [frame.kind for frame in embedder.frames]
    assert kinds[0] == Kind.HELLO
    hello = msgspec.msgpack.decode(embedder.frames[0].body, type=Hello)
    assert (hello.protocol, hello.pid) == (PROTOCOL_VERSION, embedder.pid)
    stat = Path(f"/proc/{embedder.pid}/stat").read_text("ascii")
    assert hello.start_time == int(stat.rpartition(")")[2].split()[19])
    ready = kinds.index(Kind.READY)
    assert set(kinds[1:ready]) == {Kind.PROGRESS}
    stages = [
        msgspec.msgpack.decode(frame.body, type=Progress).stage
        for frame in embedder.frames[1:ready]
    ]
    # Where the disk is slow its reading is told too.
    assert [each for each in dict.fromkeys(stages) if each != "read"] == ["import", "load", "warm"]


def test_embeddings_go_all_the_way(embedder: WorkerProcess) -> None:
    texts = [item["text"] for item in REFERENCE["items"]]
    embedder.ask(
        1, "openai.embeddings", {"model": "m", "input": texts, "encoding_format": "base64"}
    )
    head, body, end = embedder.answer(1)
    assert head is not None
    assert (head.status, head.content_type, end.error) == (200, "application/json", "")
    for item, entry in zip(REFERENCE["items"], json.loads(body)["data"], strict=True):
        vector = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
        assert vector[:: REFERENCE["step"]] == pytest.approx(item["values"], abs=5e-4)
    assert end.usage.prompt_tokens == 16
    assert end.usage.batch_size == 2


def test_many_requests_are_answered_together(embedder: WorkerProcess) -> None:
    for id_ in range(100, 164):
        embedder.ask(id_, "openai.embeddings", {"model": "m", "input": "hello " * (id_ - 99)})
    ends = [embedder.answer(id_)[2] for id_ in range(100, 164)]
    assert {end.error for end in ends} == {""}
    assert max(end.usage.batch_size for end in ends) > 4


@pytest.mark.parametrize(
    ("route", "body", "code"),
    [
        ("openai.embeddings", b"{", "invalid_request"),
        ("openai.embeddings", b'{"model": "m", "input": "\xff"}', "invalid_request"),
        ("openai.embeddings", {"model": "m", "input": "word " * 300}, "context_length_exceeded"),
        ("openai.chat", {"model": "m", "messages": []}, "task_not_supported"),
    ],
)
def test_bad_requests_are_refused_in_the_protocols_shape(
    embedder: WorkerProcess, route: str, body: object, code: str
) -> None:
    id_ = 200 + len(embedder.frames)
    embedder.ask(id_, route, body)
    head, answer, end = embedder.answer(id_)
    assert head is not None
    assert (head.status, end.error) == (400, code)
    assert json.loads(answer)["error"]["message"]


def test_an_unknown_route_ends_at_once(embedder: WorkerProcess) -> None:
    embedder.ask(300, "nobody.knows", {})
    assert embedder.answer(300)[2].error == "route_not_found"


def test_a_chat_streams(chat: WorkerProcess) -> None:
    request = long_chat(max_tokens=12, temperature=0)
    chat.ask(1, "openai.chat", request)
    chat.ask(2, "openai.chat", request | {"stream": False})
    head, stream, end = chat.answer(1)
    assert head is not None
    assert (head.status, head.content_type, end.error) == (200, "text/event-stream", "")
    events = stream.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    text = "".join(
        choice["delta"].get("content") or "" for delta in deltas for choice in delta["choices"]
    )
    whole = json.loads(chat.answer(2)[1])
    assert text == whole["choices"][0]["message"]["content"]
    assert end.usage.completion_tokens == whole["usage"]["completion_tokens"] == 12


def test_a_ping_is_answered_and_a_cancel_obeyed_while_it_computes(chat: WorkerProcess) -> None:
    chat.ask(10, "openai.chat", long_chat())
    chat.until(lambda: bool(chat.of(Kind.HEAD, 10)))
    began = time.monotonic()
    chat.send(Kind.PING, 77)
    chat.send(Kind.CANCEL, 10)
    chat.until(lambda: bool(chat.of(Kind.PONG, 77)))
    end = chat.answer(10)[2]
    assert time.monotonic() - began < 1.0
    assert end.error == "request_cancelled"
    assert 0 < end.usage.completion_tokens < 16_000


def test_a_deadline_is_kept(chat: WorkerProcess) -> None:
    began = time.monotonic()
    chat.ask(20, "openai.chat", long_chat(), seconds=0.3)
    _, stream, end = chat.answer(20)
    assert 0.25 < time.monotonic() - began < 1.3
    assert end.error == "deadline_exceeded"
    assert b'"error"' in stream


@pytest.mark.parametrize("how", ["frame", "signal"])
def test_it_finishes_what_it_has_and_ends(tmp_path: Path, how: str) -> None:
    folder = models.chat(tmp_path, context=2048)
    with worker_process(tmp_path / "log") as process:
        process.load(folder, device="cpu")
        process.ask(1, "openai.chat", long_chat(max_tokens=300))
        process.until(lambda: bool(process.of(Kind.HEAD, 1)))
        if how == "frame":
            process.send(Kind.SHUTDOWN)
        else:
            process.signal(signal.SIGTERM)
            # The signal is noticed before this PING, or the request below
            # might still be taken.
            process.send(Kind.PING, 5)
            process.until(lambda: bool(process.of(Kind.PONG, 5)))
        process.ask(2, "openai.chat", long_chat())
        assert process.answer(2)[2].error == "shutting_down"
        _, stream, end = process.answer(1)
        assert stream.endswith(b"data: [DONE]\n\n")
        assert end.usage.completion_tokens == 300
        assert process.status() == 0


def test_the_end_of_the_daemon_is_its_end(tmp_path: Path) -> None:
    folder = models.chat(tmp_path, context=16_384)
    with worker_process(tmp_path / "log") as process:
        process.load(folder, device="cpu")
        process.ask(1, "openai.chat", long_chat())
        process.until(lambda: bool(process.of(Kind.HEAD, 1)))
        process.socket.close()
        assert process.status() == 0


def test_a_model_that_can_not_be_loaded_leaves_last_words(tmp_path: Path) -> None:
    with worker_process(tmp_path / "log") as process:
        folder = models.without_config(tmp_path / "model")
        with pytest.raises(ValueError, match="not enough values"):
            process.load(folder)
        (failed,) = process.of(Kind.FAILED)
        words = msgspec.msgpack.decode(failed.body, type=LastWords)
        assert words.code == "model_files_missing"
        assert "has no config.json" in words.message
        assert process.status() == 66


def test_sigterm_while_loading_ends_it(tmp_path: Path) -> None:
    with worker_process(tmp_path / "log") as process:
        order = LoadOrder("test", str(minilm.minilm_folder()))
        process.send(Kind.LOAD, 0, msgspec.msgpack.encode(order))
        process.until(lambda: bool(process.of(Kind.PROGRESS)))
        process.signal(signal.SIGTERM)
        assert process.status() == 0


def test_a_broken_protocol_ends_it(tmp_path: Path) -> None:
    with worker_process(tmp_path / "log") as process:
        process.socket.sendall(b"\xff" * 64)
        assert process.status() == 70
        assert "WireError" in process.log.read_text("utf-8")
