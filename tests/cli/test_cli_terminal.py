"""Tables on terminals of all widths."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from scripted_api import scripted_api

from tursi.cli.terminal import prose, table

ROWS = [("one", "ready", "/a/very/long/folder/of/a/model"), ("another", None, "/short")]


def shown(capsys: pytest.CaptureFixture[str], *spare: str) -> list[str]:
    table(("NAME", "PHASE", "MODEL"), ROWS, spare=spare)
    return click.unstyle(capsys.readouterr().out).splitlines()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    return monkeypatch


WHOLE = [
    "NAME     PHASE  MODEL",
    "one      ready  /a/very/long/folder/of/a/model",
    "another  -      /short",
]


def test_a_file_gets_whole_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert shown(capsys) == WHOLE


def test_a_terminal_gets_its_last_column_folded_where_it_has_room(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.setenv("COLUMNS", "41")
    assert [line.rstrip() for line in shown(capsys)] == [
        WHOLE[0],
        "one      ready  /a/very/long/folder/of/a/",
        "                model",
        WHOLE[2],
    ]


def test_a_narrow_terminal_gets_whole_lines(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # It wraps them itself; columns of a few characters each could not be read.
    terminal.setenv("COLUMNS", "30")
    assert [line.rstrip() for line in shown(capsys)] == WHOLE


def test_a_narrow_terminal_goes_without_what_can_be_spared(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.setenv("COLUMNS", "33")
    assert [line.rstrip() for line in shown(capsys, "PHASE", "NAME")] == [
        "NAME     MODEL",
        "one      /a/very/long/folder/of/a",
        "         /model",
        "another  /short",
    ]
    terminal.setenv("COLUMNS", "17")
    assert [line.rstrip() for line in shown(capsys, "MODEL")] == [
        "NAME     PHASE",
        "one      ready",
        "another  -",
    ]


def test_where_there_is_room_nothing_is_spared(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.setenv("COLUMNS", "80")
    assert [line.rstrip() for line in shown(capsys, "PHASE")] == WHOLE


def test_a_file_gets_what_could_be_spared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert shown(capsys, "PHASE") == WHOLE


def test_sentences_are_broken_between_words_in_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    text = "one two-three four five /a/long/folder/of/a/model\x1b"
    prose(text)
    assert capsys.readouterr().out == "one two-three four five /a/long/folder/of/a/model\\x1b\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    prose(text, indent=2)
    assert capsys.readouterr().out.splitlines() == [
        "one two-three four", "  five", "  /a/long/folder/of/a/model\\x1b",
    ]  # fmt: skip


def test_output_that_can_not_be_written_is_told_in_a_sentence() -> None:
    program = "from tursi.cli import main; main()"
    with scripted_api() as api, Path("/dev/full").open("wb") as full:
        api.on("GET", "/deployments/mini/why", {"sentences": ["It is so."], "events": []})
        words = [sys.executable, "-c", program, "--socket", str(api.socket), "why", "mini"]
        ended = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    told = "tursi: The output can't be written: No space left on device.\n"
    assert (ended.returncode, ended.stderr) == (1, told)


def test_a_narrow_terminal_gets_wide_columns_folded(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.setenv("COLUMNS", "80")
    name, model = "n" * 70, "m" * 70
    table(("NAME", "PHASE", "MODEL"), [(name, "ready", model)])
    lines = click.unstyle(capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    assert "".join(lines).count("n") == 70
    assert "".join(lines).count("m") == 70
    assert len(lines) <= 4
