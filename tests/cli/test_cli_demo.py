"""What ``make run`` runs, against a twistd that plays the daemon."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from patience import until
from scripted_api import child

from tursi.cli import demo
from tursi.cli.connection import Failure

WEIGHTS = b"not really weights"

DAEMON = """\
#!{python}
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from scripted_api import Reply, deployment, scripted_api

options = dict(each[2:].split("=", 1) for each in sys.argv[1:] if each.startswith("--"))
state, runtime = Path(options["state"]), Path(options["runtime"])
script = (state / "script").read_text()
if script == "refuse":
    sys.exit(print("tursi: The configuration is wrong.", file=sys.stderr) or 78)
if script == "crash":
    sys.exit(print("Traceback", file=sys.stderr) or 1)
if script == "busy":
    (state / "script").write_text("serve")
    sys.exit(print("tursi: Tursi is already running (pid 1).", file=sys.stderr) or 75)
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
if script == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with scripted_api() as api:
    api.on("GET", "/status", {{"pid": os.getpid(), "version": "1"}})
    status = deployment(name="all-MiniLM-L6-v2")
    loading = {{**deployment("loading"), "name": "all-MiniLM-L6-v2"}}
    api.on("POST", "/deployments", Reply({{"deployment": loading, "outcome": "created"}}, 201))
    api.on("GET", "/deployments/all-MiniLM-L6-v2", status)
    api.on("POST", "/models/all-MiniLM-L6-v2", [0.9, 0.5, -0.1, 0.0])
    runtime.mkdir(exist_ok=True)
    (runtime / "control.sock").unlink(missing_ok=True)
    os.link(api.socket, runtime / "control.sock")
    try:
        while script != "end":
            signal.pause()
    finally:
        (state / "stopped").touch()
"""

RUN = """\
import hashlib, sys
from pathlib import Path
from tursi.cli import demo
demo.WEIGHTS_SHA256 = {digest!r}
demo.TWISTD = Path({twistd!r})
demo.STOP_SECONDS = 3.0
sys.exit(demo.main(sys.argv[1:]))
"""


class Demo:
    """A folder to run demos in."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.model = folder / "model"
        self.twistd = folder / "twistd"
        inner = self.model / "package" / "model"
        inner.mkdir(parents=True)
        for name in ("config.json", "modules.json"):
            (inner / name).write_text("{}")
        (inner / "model.safetensors").write_bytes(WEIGHTS)
        self.state.mkdir()
        tests = str(Path(__file__).parent)
        self.twistd.write_text(DAEMON.format(python=sys.executable, tests=tests))
        self.twistd.chmod(0o755)
        self.play("serve")

    def play(self, script: str) -> None:
        """What the daemon does."""
        (self.state / "script").write_text(script)

    def start(self) -> AbstractContextManager[subprocess.Popen[str]]:
        """Run a demo."""
        digest = hashlib.sha256(WEIGHTS).hexdigest()
        code = RUN.format(digest=digest, twistd=str(self.twistd))
        return child(
            [sys.executable, "-c", code, f"--state={self.state}", f"--model={self.model}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until_it_serves(self, process: subprocess.Popen[str]) -> str:
        """Read its output up to the last line of the examples."""
        assert process.stdout is not None
        shown = ""
        for text in process.stdout:
            shown += text
            if text.startswith("Ctrl-C stops"):
                return shown
        pytest.fail(f"it ended: {shown}")


@pytest.fixture
def running() -> Iterator[Demo]:
    # Not pytest's tmp_path: a Unix socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="tursi-"))
    try:
        yield Demo(folder)
    finally:
        shutil.rmtree(folder)


def test_it_deploys_answers_explains_and_stops_at_ctrl_c(running: Demo) -> None:
    with running.start() as process:
        shown = running.until_it_serves(process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "all-MiniLM-L6-v2 is ready (feature-extraction, cpu, float32)." in shown
    assert re.search(r"0\.900 +#{18} +Refunds are paid", shown)
    assert re.search(r"curl http://127\.0\.0\.1:\d+/v1/embeddings", shown)
    assert "all-MiniLM-L6-v2: starting the worker" in stderr
    assert stderr.endswith("Stopping the daemon ...\n")
    assert (running.state / "stopped").exists()


def test_a_second_demo_says_so_in_one_line_and_leaves_the_first_alone(running: Demo) -> None:
    with running.start() as first:
        running.until_it_serves(first)
        with running.start() as second:
            _, stderr = second.communicate(timeout=30)
        assert second.returncode == 1
        assert stderr.startswith("tursi: A demo already runs on ")
        assert stderr.count("\n") == 1
        assert first.poll() is None
        first.terminate()
        first.communicate(timeout=30)
    assert first.returncode == 0


def test_after_kill_9_no_daemon_stays_and_the_next_demo_works(running: Demo) -> None:
    with running.start() as first:
        running.until_it_serves(first)
        first.kill()
        first.communicate(timeout=30)
    until((running.state / "stopped").exists, "it has stopped", 30)
    running.play("busy")
    with running.start() as second:
        running.until_it_serves(second)
        second.send_signal(signal.SIGINT)
        _, stderr = second.communicate(timeout=30)
    assert "An earlier daemon is still stopping ..." in stderr


def test_the_daemons_own_line_is_shown_when_it_refuses_to_start(running: Demo) -> None:
    running.play("refuse")
    with running.start() as process:
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr.splitlines()[1:]) == (
        1,
        ["tursi: The configuration is wrong."],
    )


@pytest.mark.parametrize("script", ["crash", "end"])
def test_a_daemon_that_ends_by_itself_is_noticed(running: Demo, script: str) -> None:
    running.play(script)
    with running.start() as process:
        _, stderr = process.communicate(timeout=30)
    assert process.returncode != 0
    assert stderr.splitlines()[-1].startswith("tursi: ")


def test_a_daemon_that_does_not_stop_is_killed(running: Demo) -> None:
    running.play("stubborn")
    with running.start() as process:
        running.until_it_serves(process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "was killed; nothing is lost" in stderr


def test_another_port_is_taken_when_the_usual_one_is_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert port < demo.free_port(port) < port + 20


def test_weights_are_checked_and_a_missing_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="There is no model in"):
        demo.model_folder(tmp_path)
    for name in ("config.json", "modules.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(Failure, match="run `make run` again"):
        demo.model_folder(tmp_path)


def test_a_runtime_folder_is_short_whatever_the_state_folder_is(tmp_path: Path) -> None:
    with demo.runtime_folder(Path("/s")) as folder:
        assert folder == Path("/s/run")
    with demo.runtime_folder(tmp_path / ("x" * 100)) as folder:
        assert folder.is_dir()
        assert len(str(folder / "control.sock")) < 108
    assert not folder.exists()
