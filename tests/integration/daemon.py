"""A real daemon in a process of its own, for tests that start, use and kill it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from patience import until

TWISTD = Path(sys.executable).with_name("twistd")
PLUGINS = Path(__file__).with_name("plugins")
"""Where ``twistd scripted`` is, which is ``twistd tursi`` with scripted workers."""


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Daemon:
    """One state folder and the daemon that runs on it, now and after restarts."""

    def __init__(
        self,
        folder: Path,
        *,
        scripted: bool,
        settings: str = "",
        program: Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """``program`` is what is run instead of twistd, with these ``options`` too."""
        self.folder = folder
        self.options = options
        self.program = program
        self.state = folder / "state"
        self.runtime = folder / "run"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.configuration = folder / "tursi.toml"
        self.configuration.write_text(
            "[[http.listeners]]\n"
            f'endpoint = "tcp:{self.port}:interface=127.0.0.1:backlog=1024"\n'
            'roles = ["inference", "health", "metrics"]\n' + settings
        )
        self.scripted = scripted
        self.log = folder / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.daemonized: psutil.Process | None = None
        self.handed_over: list[int] = []
        """Descriptors that the program gets."""
        self.control = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.runtime / "control.sock")),
            base_url="http://localhost",
            timeout=60,
        )
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def arguments(self, *twistd: str) -> list[str]:
        """The command line of twistd with these options of its own."""
        return [
            *([str(TWISTD)] if self.program is None else [sys.executable, str(self.program)]),
            *twistd, "scripted" if self.scripted else "tursi",
            "--config", str(self.configuration),
            "--state", str(self.state),
            "--runtime", str(self.runtime),
            *self.options,
        ]  # fmt: skip

    def environment(self, given: Mapping[str, str] | None = None) -> dict[str, str]:
        """Ours, with the plugin that tests have."""
        path = os.pathsep.join(
            each for each in (str(PLUGINS), os.environ.get("PYTHONPATH")) if each
        )
        return {**os.environ, "PYTHONPATH": path, **(given or {})}

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Start it in the foreground and wait until it answers."""
        self.launch(environment)
        until(self._answers, "the daemon answers", 30)

    def launch(self, environment: Mapping[str, str] | None = None) -> None:
        """Start it in the foreground, and don't wait."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.arguments("-n", "--pidfile="),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self.environment(environment),
                pass_fds=self.handed_over,
            )

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        try:
            return self.control.get("/status").status_code == 200
        except httpx.TransportError:
            return False

    def daemonize(self, *twistd: str) -> psutil.Process:
        """Start it as a daemon, and wait until it answers; the process is ours to end."""
        started = subprocess.run(
            self.arguments(*twistd),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment(),
            timeout=60,
            check=False,
        )
        assert started.returncode == 0, started
        self.daemonized = process = psutil.Process(int((self.runtime / "tursi.pid").read_text()))

        def answers() -> bool:
            assert process.is_running(), (self.state / "tursi.log").read_text()[-4000:]
            try:
                return self.control.get("/status").status_code == 200
            except httpx.TransportError:
                return False

        until(answers, "the daemon answers", 30)
        return process

    def stop(self, seconds: float = 60.0) -> int:
        """SIGTERM, and its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """``kill -9``."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def script(self, name: str = "script", **options: Any) -> Path:
        """A folder that passes for a model and makes a scripted worker behave as told."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        # A safetensors file without a tensor.
        (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        (folder / "scripted.json").write_text(json.dumps(options))
        return folder

    def deploy(self, name: str, model: Path | str, **fields: Any) -> dict[str, Any]:
        """Create or change a deployment; its status."""
        answer = self.control.put(f"/deployments/{name}", json={"model": str(model), **fields})
        assert answer.status_code in {200, 201}, answer.text
        status: dict[str, Any] = answer.json()["deployment"]
        return status

    def status(self, name: str) -> dict[str, Any]:
        """How a deployment is."""
        answer = self.control.get(f"/deployments/{name}")
        assert answer.status_code == 200, answer.text
        status: dict[str, Any] = answer.json()
        return status

    def wait(self, name: str, phase: str = "ready", seconds: float = 60.0) -> dict[str, Any]:
        """Wait until the deployment is in that phase."""

        def look() -> dict[str, Any] | None:
            status = self.status(name)
            if phase == "ready":
                assert status["phase"] != "failed", status
                served = status["phase"] == "ready" and status["ready"] == status["replicas"]
                return status if served else None
            return status if status["phase"] == phase else None

        return until(look, f"{name} is {phase}: {self.status(name)}", seconds)

    def tree(self) -> list[psutil.Process]:
        """Every process that belongs to this state folder, by the mark in its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TURSI_STATE") == str(self.state):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def close(self) -> None:
        """Stop whatever still runs."""
        if self.daemonized is not None and self.daemonized.is_running():
            self.daemonized.terminate()
            _, alive = psutil.wait_procs([self.daemonized], timeout=30)
            for each in alive:
                each.kill()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
        self.control.close()
        self.client.close()


@contextmanager
def daemon(
    *,
    scripted: bool = False,
    settings: str = "",
    environment: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Iterator[Daemon]:
    """A started daemon on an empty state folder; stopped and cleaned up at the end."""
    # Not pytest's tmp_path: a Unix socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="tursi-"))
    running = Daemon(folder, scripted=scripted, settings=settings, options=options)
    try:
        running.start(environment)
        yield running
    finally:
        running.close()
        shutil.rmtree(folder, ignore_errors=True)
