"""What the command says when there is no daemon, or one that behaves strangely."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from scripted_api import Api, Reply, child, refusal, scripted_api

from tursi import __version__
from tursi.cli import main
from tursi.cli.connection import Connection, Exit, Failure, failure, path


@pytest.fixture
def api() -> Iterator[Api]:
    with scripted_api() as running:
        yield running


def test_without_a_daemon_it_says_where_it_looked_and_how_to_start_one(api: Api) -> None:
    absent = api.socket.with_name("absent.sock")
    result = CliRunner().invoke(main, ["ps"], env={"TURSI_SOCKET": str(absent)})
    assert result.exit_code == Exit.NO_DAEMON
    assert result.stderr == (
        f"tursi: No daemon answers at {absent} (there is no such socket). Start one with "
        "`tursi start`, or name its socket with --socket or TURSI_SOCKET.\n"
    )


def test_the_socket_is_that_of_the_runtime_folder(api: Api) -> None:
    api.on("GET", "/deployments", {"deployments": []})
    environment = {"TURSI_SOCKET": "", "TURSI_RUNTIME_DIR": str(api.socket.parent)}
    assert CliRunner().invoke(main, ["ps"], env=environment).exit_code == Exit.OK


def test_a_stale_socket_is_told_from_none(api: Api) -> None:
    stale = api.socket.with_name("stale.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(stale))
    result = CliRunner().invoke(main, ["--socket", str(stale), "status"])
    assert result.exit_code == Exit.NO_DAEMON
    assert "(nobody listens on it)" in result.stderr


def test_a_path_that_no_socket_can_have_is_a_usage_error(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 108)
    result = CliRunner().invoke(main, ["--socket", str(long), "ps"])
    assert result.exit_code == Exit.USAGE
    assert "over 107 bytes" in result.stderr


def test_a_socket_of_another_group_says_what_to_do(api: Api) -> None:
    api.socket.chmod(0o600)
    code = (
        "import os, sys\n"
        "from tursi.cli import main\n"
        "import httpx, httpcore, rich.console\n"
        # Root may open everything: become somebody else, who may not see the interpreter's files.
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "else: os.chmod(sys.argv[1], 0)\n"
        "main(['--socket', sys.argv[1], 'ps'])\n"
    )
    api.socket.parent.chmod(0o755)
    finished = subprocess.run(
        [sys.executable, "-c", code, str(api.socket)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == Exit.NO_DAEMON, finished.stderr
    assert f"You may not use the control socket {api.socket}" in finished.stderr


def test_what_is_no_tursi_is_recognised(api: Api) -> None:
    api.on("GET", "/deployments", Reply(b"<html>"))
    result = api.tursi("ps")
    assert (result.exit_code, "isn't JSON" in result.stderr) == (Exit.FAILED, True)


def test_a_connection_that_breaks_is_told_in_one_line(api: Api) -> None:
    api.on("GET", "/deployments", Reply(b"", headers={"content-encoding": "none"}, pieces=[]))
    assert api.tursi("ps").exit_code == Exit.FAILED
    quiet = api.socket.with_name("quiet.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(quiet))
        listener.listen(1)
        code = "from tursi.cli import main; main()"
        command = [sys.executable, "-c", code, "--socket", quiet, "ps"]
        with child(command, stderr=subprocess.PIPE, text=True) as process:
            listener.settimeout(30)
            listener.accept()[0].close()
            _, stderr = process.communicate(timeout=30)
    assert process.returncode == Exit.NO_DAEMON
    assert stderr.startswith(f"tursi: The connection to the daemon at {quiet} broke")


def test_an_answer_that_does_not_come_has_a_deadline(api: Api) -> None:
    quiet = api.socket.with_name("quiet.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(quiet))
        listener.listen(1)
        with pytest.raises(Exception, match="not answered within 0 s") as raised:
            Connection(quiet).call("GET", "/status", seconds=0.2)
    assert raised.value.exit_code == Exit.TRY_LATER  # type: ignore[attr-defined] # a Failure


@pytest.mark.parametrize(
    ("body", "status", "expected", "said"),
    [
        ({"error": {"message": "Gone.", "code": "deployment_not_found"}}, 404, 4, "Gone."),
        ({"error": "Gone.", "code": "model_not_found"}, 404, 4, "Gone."),
        (
            {"error": {"message": "Full.", "code": "queue_full", "retry_after": 2}},
            429,
            6,
            "Full. (try again in 2 s)",
        ),
        ({"error": "Loads.", "code": "model_loading", "retry_after": 1}, 503, 6, "Loads. (try"),
        ({"error": {"message": "It failed.", "code": "deployment_unavailable"}}, 503, 5, "It fai"),
        ({"error": {"message": "Bad.", "code": "invalid_request"}}, 400, 1, "Bad."),
        (
            {"error": {"message": "Oops.", "code": "internal_error", "incident": "i1"}},
            500,
            1,
            "Oops. (incident i1)",
        ),
        (
            {"error": {"message": "Stops.", "code": "shutting_down", "retry_after": 5}},
            503,
            3,
            "Stops. (try again in 5 s)",
        ),
        (
            {"error": {"message": "A", "code": "api_key_required"}},
            401,
            1,
            "The daemon needs an API",
        ),
        (None, 502, 1, "The daemon answered with status 502."),
        (["x"], 500, 1, "The daemon answered with status 500."),
    ],
)
def test_errors_have_exit_codes(body: object, status: int, expected: int, said: str) -> None:
    found = failure(body, status)
    assert (found.exit_code, found.message[: len(said)]) == (expected, said)


def test_path_segments_are_encoded() -> None:
    assert path("models", "org/a b") == "/models/org%2Fa%20b"
    with pytest.raises(Failure, match="The name is empty"):
        path("models", "")


def test_version_works_with_and_without_a_daemon(api: Api) -> None:
    absent = str(api.socket.with_name("absent.sock"))
    result = CliRunner().invoke(main, ["--socket", absent, "version"])
    assert (result.exit_code, result.stdout) == (Exit.OK, f"tursi {__version__}\n")
    api.on("GET", "/status", {"version": "9.9"})
    assert "daemon 9.9 (restart it" in api.tursi("version").stdout
    assert json.loads(api.tursi("version", "--json").stdout) == {
        "client": __version__,
        "daemon": "9.9",
    }
    api.on("GET", "/status", refusal(500, "internal_error", "Oops."))
    assert api.tursi("version").exit_code == Exit.FAILED


def test_status_shows_everything_the_daemon_says(api: Api) -> None:
    found = {
        "version": "1",
        "started_at": "2026-01-02T03:04:05Z",
        "listeners": [{"endpoint": "tcp:8430", "roles": ["inference", "health"]}],
        "versions": {"torch": "2", "python": "3"},
        "state": "/s\x1b",
        "containment": {"limits": "rlimits and watch", "because": "no\x1b", "landlock": 7},
    }
    api.on("GET", "/status", found)
    output = api.tursi("status").output
    for expected in ("2026-01-0", "tcp:8430 (inference, health)", "torch 2, python 3", "/s\\x1b"):
        assert expected in output
    assert "rlimits and watch (no\\x1b), Landlock 7, network not closed" in output
    assert json.loads(api.tursi("status", "--json").output) == {"running": True, **found}


def test_help_needs_neither_a_daemon_nor_slow_imports() -> None:
    code = (
        "import sys; from tursi.cli import main; main(['--help'], standalone_mode=False);"
        "sys.exit(bool({'httpx', 'rich', 'twisted', 'msgspec'} & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "TURSI_SOCKET": "/nowhere"},
    )
    assert finished.returncode == 0, finished.stderr


def test_a_reader_that_has_seen_enough_ends_it_quietly(api: Api) -> None:
    api.on("GET", "/deployments/mini/logs", {"lines": ["x" * 1000] * 1000})
    script = "import sys; from tursi.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "--socket", str(api.socket), "logs", "mini"]
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(3) == b"xxx"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == Exit.OK
