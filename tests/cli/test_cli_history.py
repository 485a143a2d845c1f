"""``tursi logs``, ``events`` and ``stats`` against scripted answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from threading import Event

import pytest
from scripted_api import Api, Reply, child, refusal, scripted_api

from tursi.cli.connection import Exit

EVENT = {
    "id": 7,
    "at": "2026-01-02T03:04:05Z",
    "kind": "phase",
    "deployment": "mini",
    "message": "mini-1-0 is ready",
    "cause": "it has been warmed up",
    "worker": None,
}


@pytest.fixture
def api() -> Iterator[Api]:
    with scripted_api() as running:
        yield running


def test_logs_prints_lines_made_harmless(api: Api) -> None:
    api.on("GET", "/deployments/mini/logs", {"lines": ["one", "two\x1b[2J"]})
    result = api.tursi("logs", "mini", "-n", "2")
    assert (result.exit_code, result.stdout) == (Exit.OK, "one\ntwo\\x1b[2J\n")
    assert api.asked[0].parameters == {"lines": "2"}
    assert json.loads(api.tursi("logs", "mini", "--json").stdout)["lines"][0] == "one"


def test_logs_of_objects_read_like_lines_and_are_objects_for_programs(api: Api) -> None:
    line = {"time": "2026-01-02T03:04:05Z", "stream": "err", "replica": 0, "message": "oh \x1b[2J"}
    texts = [json.dumps(line), "{no object", '{"message": 1}']
    api.on("GET", "/deployments/mini/logs", {"lines": texts})
    assert api.tursi("logs", "mini").stdout.splitlines() == [
        "2026-01-02T03:04:05Z err oh \\x1b[2J", "{no object", '{"message": 1}',
    ]  # fmt: skip
    assert json.loads(api.tursi("logs", "mini", "--json").stdout)["lines"] == [line, *texts[1:]]
    pieces = [f"data: {json.dumps(text)}\n\n" for text in texts[:2]]
    api.on("GET", "/deployments/mini/logs", Reply(pieces=pieces))
    followed = api.tursi("logs", "mini", "-f", "--json").stdout.splitlines()
    assert [json.loads(each) for each in followed] == [line, "{no object"]


def test_logs_follows_until_the_daemon_ends_the_stream(api: Api) -> None:
    # U+2028 is no line end in an event stream, whatever str.splitlines thinks.
    pieces = [
        ': keep-alive\n\ndata: "o',
        'ne"\r\n\r\n',
        'data: "tw\u2028o"\n\n',
    ]
    api.on("GET", "/deployments/mini/logs", Reply(pieces=pieces))
    result = api.tursi("logs", "mini", "-f")
    assert result.stdout == "one\ntw\\u2028o\n"
    assert result.exit_code == Exit.NO_DAEMON
    assert "has ended the stream" in result.stderr
    assert api.asked[0].parameters == {"lines": "100", "follow": "1"}
    assert api.tursi("logs", "mini", "-f", "--json").stdout == '"one"\n"tw\\u2028o"\n'


def test_ctrl_c_ends_following(api: Api) -> None:
    api.on("GET", "/events", Reply(pieces=[f"id: 7\ndata: {json.dumps(EVENT)}\n\n"], hold=Event()))
    code = "from tursi.cli import main; main()"
    command = [sys.executable, "-c", code, "--socket", str(api.socket), "events", "-f", "--json"]
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == EVENT
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (Exit.INTERRUPTED, b"tursi: interrupted\n")
    assert api.gone.wait(10)


def test_following_what_does_not_exist_is_not_found(api: Api) -> None:
    api.on("GET", "/deployments/x/logs", refusal(404, "deployment_not_found", "No such."))
    assert api.tursi("logs", "x", "-f").exit_code == Exit.NOT_FOUND
    assert api.tursi("logs", "x").exit_code == Exit.NOT_FOUND


def test_events_say_what_happened_and_why(api: Api) -> None:
    api.on("GET", "/events", {"events": [EVENT, {**EVENT, "deployment": None, "cause": None}]})
    lines = api.tursi("events", "mini", "-n", "5").stdout.splitlines()
    assert lines[0].endswith("  phase  mini: mini-1-0 is ready (cause: it has been warmed up)")
    assert lines[1].endswith("  phase  mini-1-0 is ready")
    assert api.asked[0].parameters == {"limit": "5", "deployment": "mini"}
    assert json.loads(api.tursi("events", "--json").stdout)["events"][0] == EVENT
    assert api.asked[1].parameters == {"limit": "50"}
    api.on("GET", "/events", {"events": []})
    assert api.tursi("events", "gone").stderr == "There are no events of gone.\n"


def test_events_follow(api: Api) -> None:
    api.on("GET", "/events", Reply(pieces=[f"id: 7\ndata: {json.dumps(EVENT)}\n\n"]))
    result = api.tursi("events", "-f")
    assert "mini-1-0 is ready" in result.stdout
    assert api.asked[0].parameters == {"limit": "50", "follow": "1"}


CRASH = {
    "id": 3, "deployment": "mini", "generation": 1, "replica": 0, "worker": "uuid",
    "at": "2026-01-02T03:04:05Z", "failure": "crash", "reason": "crashed with signal 11",
    "phase": "ready", "spawned_at": "2026-01-02T03:00:00Z", "ready_at": None,
    "exit_status": None, "signal": 11, "intent": None, "peak_rss": 3 * 1024 * 1024,
    "cpu_seconds": 1.5, "requests": ["r1", "r2"], "error": "ValueError: so",
}  # fmt: skip
DOSSIER = {
    **CRASH,
    "order": {"folder": "/models/mini", "task": None, "device": "cpu", "dtype": "auto"},
    "versions": {"torch": "2.13"},
    "traceback": "Traceback:\nValueError: so",
    "stacks": None,
    "log": ["one", "two\x1b[2J"],
    "usage": [{"at": "2026-01-02T03:04:00Z", "rss": 2048, "cpu_seconds": 0.5}],
}


def test_crashes_are_listed(api: Api) -> None:
    api.on("GET", "/deployments/mini/crashes", {"crashes": [CRASH]})
    result = api.tursi("crashes", "mini", "-n", "5")
    headers, row = (line.split() for line in result.stdout.splitlines())
    assert headers[:2] == ["ID", "WHEN"]
    assert row[0] == "3"
    assert row[3:8] == ["0", "ready", "crash", "3", "MiB"]
    assert api.asked[0].parameters == {"limit": "5"}
    assert json.loads(api.tursi("crashes", "mini", "--json").stdout)["crashes"] == [CRASH]
    api.on("GET", "/deployments/mini/crashes", {"crashes": []})
    assert api.tursi("crashes", "mini").stdout == "No worker of mini has ended unasked.\n"


def test_a_crash_is_shown_with_its_evidence(api: Api) -> None:
    api.on("GET", "/deployments/mini/crashes/3", DOSSIER)
    text = api.tursi("crashes", "mini", "3").stdout
    assert text.startswith("Crash 3 of mini: crashed with signal 11\n")
    for part in ("signal:      11", "held:        r1, r2", "torch 2.13", "  ValueError: so",
                 "2 KiB  0.5 s", "  two\\x1b[2J", "asked for:   cpu, auto"):  # fmt: skip
        assert part in text
    assert "stacks" not in text
    assert "exit status" not in text
    assert json.loads(api.tursi("crashes", "mini", "3", "--json").stdout) == DOSSIER


def test_an_unknown_crash_has_its_exit_code(api: Api) -> None:
    api.on("GET", "/deployments/mini/crashes/9", refusal(404, "crash_not_found", "None such."))
    result = api.tursi("crashes", "mini", "9")
    assert (result.exit_code, result.stderr) == (Exit.NOT_FOUND, "tursi: None such.\n")


def test_why_prints_sentences_and_the_chain(api: Api) -> None:
    story = {"sentences": ["It is so.", "And so."], "events": [EVENT], "crash": None}
    api.on("GET", "/deployments/mini/why", story)
    lines = api.tursi("why", "mini").stdout.splitlines()
    assert lines[:3] == ["It is so.", "And so.", ""]
    assert lines[3].endswith("phase  mini-1-0 is ready (cause: it has been warmed up)")
    assert json.loads(api.tursi("why", "mini", "--json").stdout) == story
    api.on("GET", "/deployments/mini/why", {**story, "events": []})
    assert api.tursi("why", "mini").stdout == "It is so.\nAnd so.\n"


ENTRY = {
    "id": 3,
    "at": "2026-01-02T03:04:05Z",
    "by": "uid 1000",
    "action": "deployments.stop",
    "target": "mini\x1b[2J",
    "status": 404,
    "code": "deployment_not_found",
    "request": "abc",
    "key": None,
    "uid": 1000,
    "address": None,
}


def test_audit_shows_who_did_what(api: Api) -> None:
    api.on("GET", "/audit", {"entries": [ENTRY]})
    result = api.tursi("audit", "--by", "uid 1000", "--action", "deployments", "-n", "5")
    assert result.exit_code == Exit.OK
    assert "uid 1000" in result.stdout
    assert "404 deployment_not_found" in result.stdout
    assert "mini\\x1b[2J" in result.stdout
    assert api.asked[0].parameters == {"who": "uid 1000", "action": "deployments", "limit": "5"}
    assert json.loads(api.tursi("audit", "--json").stdout)["entries"] == [ENTRY]


@pytest.mark.parametrize("since", ["90m", "7d", "2026-11-26T14:00", "2026-11-26T14:00+02:00"])
def test_audit_takes_times_as_people_write_them(api: Api, since: str) -> None:
    api.on("GET", "/audit", {"entries": []})
    result = api.tursi("audit", "--since", since)
    assert (result.exit_code, result.stdout) == (Exit.OK, "The audit has nothing of that.\n")
    assert datetime.fromisoformat(api.asked[0].parameters["since"]).tzinfo is not None
    assert api.tursi("audit", "--since", "yesterday").exit_code == Exit.USAGE
    assert api.tursi("audit", "--since", "9" * 30 + "d").exit_code == Exit.USAGE
