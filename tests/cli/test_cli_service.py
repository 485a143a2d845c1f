"""``tursi start``, ``stop``, ``restart``, ``reload`` and ``status`` on real daemons."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from patience import gone, until

from tursi import instance
from tursi.cli import main, process, service
from tursi.cli.service import DEAD_WITH_LOCK, DEAD_WITH_PID_FILE, RUNS, STOPPED, UNKNOWN


class Place:
    """Folders for a daemon, and the command on them."""

    def __init__(self, folder: Path) -> None:
        self.state, self.runtime = folder / "state", folder / "state" / "run"
        self.configuration = folder / "tursi.toml"
        self.configure()

    def configure(self, settings: str = "", endpoint: str = "tcp:0:interface=127.0.0.1") -> None:
        self.configuration.write_text(
            f'[[http.listeners]]\nendpoint = "{endpoint}"\nroles = ["inference"]\n{settings}'
        )

    def tursi(self, command: str, *options: str) -> Result:
        arguments: Sequence[str] = [command, "--state", str(self.state), *options]
        return CliRunner().invoke(main, arguments, env={"TURSI_SOCKET": ""})

    def with_a_url(self, command: str) -> Result:
        """By the socket, as ``--state`` has none of a URL."""
        environment = {
            "TURSI_SOCKET": str(self.runtime / "control.sock"),
            "TURSI_URL": "http://127.0.0.1:1",
        }
        return CliRunner().invoke(main, [command], env=environment)

    def start(self) -> Result:
        return self.tursi("start", "--config", str(self.configuration))

    @property
    def pid(self) -> int:
        return int((self.runtime / "tursi.pid").read_text())

    def kill(self) -> None:
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: gone(pid), "it has ended", 30)


@pytest.fixture
def place() -> Iterator[Place]:
    # Not pytest's tmp_path: a Unix socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="tursi-", ignore_cleanup_errors=True) as folder:
        one = Place(Path(folder))
        yield one
        if (one.runtime / "tursi.pid").exists():
            one.kill()


def test_the_story_of_a_service(place: Place) -> None:
    assert place.tursi("status").exit_code == STOPPED
    assert json.loads(place.tursi("status", "--json").stdout)["running"] is False
    stopped = place.tursi("stop")
    assert (stopped.exit_code, stopped.stdout) == (0, "Tursi isn't running.\n")

    started = place.start()
    assert started.exit_code == 0, started.output
    first = place.pid
    assert started.stdout.startswith(f"Tursi runs (pid {first}) and listens on unix:")
    again = place.start()
    assert (again.exit_code, again.stdout) == (0, f"Tursi is already running (pid {first}).\n")
    assert place.tursi("status").exit_code == RUNS
    # The daemon of a URL is another one, whose process nobody can see from here.
    assert place.with_a_url("start").stdout == again.stdout
    elsewhere = place.with_a_url("status")
    assert elsewhere.exit_code == UNKNOWN
    assert elsewhere.stderr.startswith("tursi: No daemon answers at http://127.0.0.1:1 ")
    told = json.loads(place.tursi("status", "--json").stdout)
    assert (told["running"], told["pid"]) == (True, first)
    by_socket = ["--socket", str(place.runtime / "control.sock")]
    assert CliRunner().invoke(main, [*by_socket, "status"]).exit_code == RUNS
    # It says where its database is, to whom has only named its socket.
    restored = CliRunner().invoke(main, [*by_socket, "db", "restore", "copy"])
    assert f"already running (pid {first})" in restored.stderr

    assert place.tursi("reload").stdout == "Nothing has changed.\n"
    place.configure("[hub]\noffline = true\n")
    assert place.tursi("reload").stdout == "Changed: hub.offline.\n"
    place.configure("[hub]\nofline = true\n")
    refused = place.tursi("reload")
    assert refused.exit_code == 1
    assert "unknown field `ofline`" in refused.stderr
    # Who couldn't be started again isn't stopped.
    refused = place.tursi("restart")
    assert refused.exit_code == 1
    assert "unknown field `ofline`" in refused.stderr
    assert place.pid == first
    assert place.tursi("status").exit_code == RUNS
    place.configure()

    restarted = place.tursi("restart", "--json")
    assert restarted.exit_code == 0, restarted.output
    found = json.loads(restarted.stdout)
    assert (found["outcome"], found["pid"]) == ("started", place.pid)
    assert place.pid != first
    # With the same configuration, though it was not named again.
    assert "tcp:0:interface=127.0.0.1" in found["listeners"]

    last = place.pid
    stopped = place.tursi("stop")
    assert (stopped.exit_code, stopped.stdout) == (0, f"Tursi (pid {last}) has stopped.\n")
    assert gone(last)
    assert not list(place.runtime.iterdir())
    assert place.tursi("status").exit_code == STOPPED


def test_a_daemon_that_was_killed_is_told_and_cleared_away(place: Place) -> None:
    place.start()
    place.kill()
    dead = place.tursi("status")
    assert dead.exit_code == DEAD_WITH_PID_FILE
    assert "ended without saying so" in dead.stderr
    (place.runtime / "tursi.pid").unlink()
    assert place.tursi("status").exit_code == DEAD_WITH_LOCK
    assert place.tursi("stop").stdout == "Tursi isn't running.\n"
    assert not list(place.runtime.iterdir())
    assert place.tursi("status").exit_code == STOPPED


def test_a_daemon_that_hangs_is_told_and_killed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.1)
    place.start()
    pid = place.pid
    os.kill(pid, signal.SIGSTOP)
    hung = place.tursi("status")
    assert hung.exit_code == UNKNOWN
    assert f"runs (pid {pid}) but doesn't answer" in hung.stderr
    file = place.runtime / "tursi.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "stop_seconds": 0.1}))
    assert instance.read_status(file) is not None
    killed = place.tursi("stop")
    assert killed.exit_code == 0
    assert killed.stdout.startswith(f"Tursi (pid {pid}) did not stop in time and was killed")
    assert gone(pid)
    assert not list(place.runtime.iterdir())


def test_of_a_folder_that_may_not_be_read_it_cannot_be_told(place: Place) -> None:
    place.state.mkdir(mode=0o000)
    # What root may do isn't asked of the folder.
    capabilities = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if not os.getuid() else []
    if capabilities:
        if shutil.which("setpriv") is None:
            pytest.skip("only setpriv takes root's rights away")
        os.chown(place.state, 65534, -1)
    tursi = Path(sys.executable).with_name("tursi")
    done = subprocess.run(
        [*capabilities, tursi, "status", "--state", place.state],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == UNKNOWN, done.stderr
    assert "can't be told whether Tursi runs" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("case", ["setting", "port"])
def test_what_keeps_it_from_starting_is_said(place: Place, case: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        if case == "setting":
            place.configure("[http]\nwrong = 1\n")
        else:
            place.configure(endpoint=f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1")
        failed = place.start()
    assert failed.exit_code == 1
    said = {"setting": "unknown field `wrong`", "port": "already listens"}[case]
    assert said in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    assert place.tursi("status").exit_code == STOPPED
