"""``tursi run`` and ``tursi chat`` against scripted answers."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from threading import Event
from typing import Any

import pytest
from patience import until
from scripted_api import Api, Reply, child, refusal, scripted_api

from tursi.cli import loading
from tursi.cli.connection import Connection, Exit
from tursi.cli.run import cosine


@pytest.fixture
def api() -> Iterator[Api]:
    with scripted_api() as running:
        running.on("GET", "/v1/models/mini", {"id": "mini", "object": "model"})
        yield running


# -- what is no text ------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("run", "mini", "a\udcff"),
        ("down", "\udcff"),
        ("events", "\udcff"),
        ("up", "/\udcff", "--name", "x"),
    ],
)
def test_bytes_that_are_no_text_are_refused_in_one_line(
    api: Api, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathlib.Path.is_dir", lambda _: True)
    result = api.tursi(*command)
    assert result.exit_code == Exit.USAGE
    assert result.stderr == "tursi: What was given isn't valid UTF-8 (at '\\xff').\n"
    assert not api.asked


def test_a_turn_that_is_no_text_is_refused(api: Api) -> None:
    command = (
        *(sys.executable, "-c", "from tursi.cli import main; main()"),
        *("--socket", api.socket, "chat", "mini"),
    )
    with child(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _, stderr = process.communicate(b"a\xff\n", timeout=20)
    assert process.returncode == Exit.USAGE
    assert b"isn't valid UTF-8" in stderr
    assert b"Traceback" not in stderr


# -- while a model is loaded ------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PATIENCE_SECONDS", 0.0)


@pytest.mark.usefixtures("impatient")
def test_who_waits_for_a_load_is_shown_how_far_it_is(
    api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = {"stage": "load", "done": 3.0, "total": 4.0, "unit": "seconds"}
    coming = {"desired": "running", "phase": "loading", "generation": 1, "replicas": 1}
    coming |= {"workers": [], "progress": progress}
    worker = {"phase": "ready", "generation": 1}
    api.on("GET", "/deployments/mini", coming, {**coming, "phase": "ready", "workers": [worker]})
    with loading.shown_loading(Connection(api.socket), "mini"):
        until(lambda: len(api.asked) == 2, "it is looked at until it is there")
    assert capsys.readouterr().err == "mini: loading: 3 of 4 seconds (75 %)\n"


@pytest.mark.usefixtures("impatient")
def test_who_may_not_look_is_shown_nothing(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.on("GET", "/deployments/mini", refusal(403, "scope_missing", "The key doesn't do."))
    with loading.shown_loading(Connection(api.socket), "mini"):
        until(lambda: api.asked, "it is looked at")
    assert capsys.readouterr().err == ""


# -- run --------------------------------------------------------------------------


def test_one_text_shows_its_embedding(api: Api) -> None:
    api.on("POST", "/models/mini", [[0.25] * 10])
    result = api.tursi("run", "mini", "hello")
    assert result.stdout == f"10 dimensions: {' '.join(['0.2500'] * 8)} ...\n"
    assert api.asked[0].body == {"inputs": "hello"}
    assert json.loads(api.tursi("run", "mini", "hello", "--json").stdout) == [[0.25] * 10]


def test_several_texts_show_how_similar_they_are(api: Api) -> None:
    api.on("POST", "/models/mini", [[1, 0], [1, 1], [0, 0]])
    result = api.tursi("run", "mini", "a", "b", "c\x1b")
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["COSINE", "1", "2", "3", "TEXT"],
        ["1", "1.0000", "0.7071", "nan", "a"],
        ["2", "0.7071", "1.0000", "nan", "b"],
        ["3", "nan", "nan", "nan", "c\\x1b"],
    ]
    assert api.asked[0].body == {"inputs": ["a", "b", "c\x1b"]}


def test_labels_come_with_their_scores(api: Api) -> None:
    labels = [{"label": "POSITIVE", "score": 0.9}, {"label": "NEGATIVE", "score": 0.1}]
    api.on("POST", "/models/mini", [labels], [labels, labels])
    assert [line.split() for line in api.tursi("run", "mini", "good").stdout.splitlines()] == [
        ["LABEL", "SCORE"],
        ["POSITIVE", "0.9000"],
        ["NEGATIVE", "0.1000"],
    ]
    lines = api.tursi("run", "mini", "good", "bad").stdout.splitlines()
    assert (lines[0], lines[4], len(lines)) == ("good:", "bad:", 8)


def test_masks_show_their_proposals(api: Api) -> None:
    fill = {"score": 0.5, "token": 3, "token_str": "cat", "sequence": "the cat"}
    for answer in ([fill], [[fill], [fill]]):
        api.on("POST", "/models/mini", answer)
        lines = api.tursi("run", "mini", "the [MASK]").stdout.splitlines()
        assert lines[1].split() == ["cat", "0.5000", "the", "cat"]
    api.on("POST", "/models/mini", [[fill], [[fill], [fill]]])
    lines = api.tursi("run", "mini", "the [MASK]", "[MASK] [MASK]").stdout.splitlines()
    assert [len(lines), lines[0], lines[3]] == [7, "the [MASK]:", "[MASK] [MASK]:"]


def test_generated_text_keeps_its_lines(api: Api) -> None:
    api.on("POST", "/models/mini", [{"generated_text": "one\n\ttwo\x07"}])
    assert api.tursi("run", "mini", "x").stdout == "one\n\ttwo\\x07\n"
    api.on("POST", "/models/mini", [[{"generated_text": "A"}], [{"generated_text": "B"}]])
    assert api.tursi("run", "mini", "x", "y").stdout == "x:\nA\ny:\nB\n"


def test_an_unknown_shape_is_shown_as_it_is(api: Api) -> None:
    api.on("POST", "/models/mini", {"new": 1})
    assert json.loads(api.tursi("run", "mini", "x").stdout) == {"new": 1}


def test_cut_inputs_are_mentioned(api: Api) -> None:
    api.on("POST", "/models/mini", Reply([[1.0]], headers={"x-tursi-truncated": "1"}))
    assert "1 of the inputs were cut" in api.tursi("run", "mini", "long").stderr


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (refusal(404, "model_not_found", "No model."), Exit.NOT_FOUND),
        (Reply({"error": "Broken.", "code": "deployment_unavailable"}, 503), 5),
        (Reply({"error": "Loads.", "code": "model_loading", "retry_after": 3}, 503), 6),
    ],
)
def test_run_has_the_exit_codes_of_errors(api: Api, reply: Reply, expected: int) -> None:
    api.on("POST", "/models/org%2Fmini", reply)
    assert api.tursi("run", "org/mini", "x").exit_code == expected


def test_run_needs_a_text(api: Api) -> None:
    assert api.tursi("run", "mini").exit_code == Exit.USAGE


def test_cosine() -> None:
    assert cosine([3, 4], [3, 4]) == pytest.approx(1)
    assert cosine([1, 0], [0, 2]) == 0


# -- chat -------------------------------------------------------------------------


def stream(*pieces: str, end: str = "data: [DONE]\n\n", hold: Event | None = None) -> Reply:
    """A streamed answer in OpenAI's shape."""

    def chunk(delta: dict[str, Any]) -> str:
        return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n"

    usage = f"data: {json.dumps({'choices': [], 'usage': {}})}\n\n"
    opening = chunk({"role": "assistant", "content": ""})
    return Reply(
        pieces=[opening, *(chunk({"content": piece}) for piece in pieces), usage, end], hold=hold
    )


def test_chat_keeps_the_history(api: Api) -> None:
    api.on("POST", "/v1/chat/completions", stream("Hel", "lo\x1b"), stream("Bye"))
    result = api.tursi("chat", "mini", text="hi\n\nand now?\n/exit\nnot sent\n")
    assert (result.exit_code, result.stdout) == (Exit.OK, "Hello\\x1b\nBye\n")
    assert len(api.asked) == 3
    assert api.asked[2].body == {
        "model": "mini",
        "stream": True,
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Hello\x1b"},
            {"role": "user", "content": "and now?"},
        ],
    }


def test_chat_prints_turns_as_json(api: Api) -> None:
    api.on("POST", "/v1/chat/completions", stream("Hel", "lo"))
    result = api.tursi("chat", "mini", "--json", text="hi")
    assert json.loads(result.stdout) == {"role": "assistant", "content": "Hello"}


def test_chat_with_nothing_is_not_found_at_once(api: Api) -> None:
    api.on("GET", "/v1/models/none", refusal(404, "model_not_found", "No model."))
    assert api.tursi("chat", "none", text="hi\n").exit_code == Exit.NOT_FOUND
    assert len(api.asked) == 1


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (refusal(400, "task_not_supported", "The model embeds."), Exit.FAILED),
        (
            stream(
                "Hel",
                end='data: {"error": {"message": "The worker ended.", "code": "worker_lost"}}\n\n',
            ),
            Exit.FAILED,
        ),
        (stream("Hel", end=""), Exit.NO_DAEMON),
    ],
)
def test_an_answer_that_fails_ends_a_chat_from_a_pipe(
    api: Api, reply: Reply, expected: Exit
) -> None:
    api.on("POST", "/v1/chat/completions", reply)
    result = api.tursi("chat", "mini", text="hi\n")
    assert result.exit_code == expected
    assert result.stderr.splitlines()[-1].startswith("tursi: The ")


def test_ctrl_c_on_a_terminal_stops_the_answer_and_not_the_chat(api: Api) -> None:
    held = Event()
    failing = refusal(400, "context_length_exceeded", "It is too long.")
    api.on("POST", "/v1/chat/completions", stream("Once ", end="", hold=held), failing, stream("B"))
    command = [sys.executable, "-c", "from tursi.cli import main; main()"]
    command += ["--socket", str(api.socket), "chat", "mini"]
    master, slave = os.openpty()
    with child(command, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        shown = b""

        def expect(text: bytes, *, interrupted: bool = False) -> None:
            nonlocal shown
            deadline = time.monotonic() + 30
            while text not in shown:
                assert time.monotonic() < deadline, shown
                if select.select([master], [], [], 1)[0]:
                    shown += os.read(master, 4096)
                elif interrupted:
                    # readline misses a signal that comes right after its prompt.
                    process.send_signal(signal.SIGINT)
            shown = shown.partition(text)[2]

        expect(b"> ")
        os.write(master, b"tell me\n")
        expect(b"Once ")
        process.send_signal(signal.SIGINT)
        expect(b"Stopped.", interrupted=True)
        assert api.gone.wait(30)
        expect(b"> ")
        os.write(master, b"more\n")
        expect(b"tursi: It is too long.")
        expect(b"> ")
        process.send_signal(signal.SIGINT)
        expect(b"> ", interrupted=True)
        os.write(master, b"again\n")
        expect(b"B\r\n")
        expect(b"> ")
        os.write(master, b"\x04")
        process.wait(30)
        os.close(master)
    assert process.returncode == Exit.OK
    assert api.asked[-1].body["messages"] == [
        {"role": "user", "content": "tell me"},
        {"role": "assistant", "content": "Once "},
        {"role": "user", "content": "again"},
    ]
