"""Health of a real daemon, and hooks with real programs and a real server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from daemon import daemon
from patience import until

WRITE = """#!{python}
import os, sys
with open({out!r}, "a") as file:
    file.write(sys.stdin.read())
    file.write(" ".join(sys.argv[1:]) + " " + ",".join(sorted(os.environ)) + "\\n")
"""


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.told.append((self.path, json.loads(body)))  # type: ignore[attr-defined] # ours
        if self.path == "/hang":
            time.sleep(3)
        self.send_response(302 if self.path == "/elsewhere" else 204)
        self.send_header("Location", "/told")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def server() -> Iterator[ThreadingHTTPServer]:
    one = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    one.told = []  # type: ignore[attr-defined] # ours
    thread = threading.Thread(target=one.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield one
    finally:
        one.shutdown()
        thread.join()
        one.server_close()


def test_hooks_are_told_and_hold_up_nothing(tmp_path: Path) -> None:
    out, program, hanging = tmp_path / "out", tmp_path / "hook", tmp_path / "hanging"
    program.write_text(WRITE.format(python=sys.executable, out=str(out)))
    hanging.write_text(f"#!/bin/sh\nsleep 600 &\necho $! >> {tmp_path}/pids\nsleep 600\n")
    for each in (program, hanging):
        each.chmod(0o755)
    with server() as listening:
        told: list[tuple[str, dict[str, Any]]] = listening.told  # type: ignore[attr-defined] # ours
        url = f"http://127.0.0.1:{listening.server_port}"
        hooks = f"""
[[hooks]]
on = ["worker.ready", "worker.crashed"]
command = ["{program}", "a b", "$HOME;*"]
[[hooks]]
on = ["worker.ready"]
command = ["{hanging}"]
seconds = 1
[[hooks]]
on = ["*"]
command = ["/nonexistent/program"]
[[hooks]]
on = ["worker.*", "health.*"]
url = "{url}/told"
[[hooks]]
on = ["worker.ready"]
url = "{url}/elsewhere"
[[hooks]]
on = ["*"]
url = "{url}/hang"
seconds = 0.5
[[hooks]]
on = ["*"]
url = "http://127.0.0.1:1/nobody"
"""
        with daemon(scripted=True, settings=hooks) as running:
            running.deploy("mini", running.script())
            status = running.wait("mini")
            psutil.Process(status["workers"][0]["pid"]).send_signal(signal.SIGSEGV)
            until(lambda: out.exists() and out.read_text().count("\n") >= 4, "the hook was called")
            ready, words, crashed, _ = out.read_text().splitlines()[:4]
            assert json.loads(ready)["event"] == "worker.ready"
            assert json.loads(crashed)["event"] == "worker.crashed"
            assert "signal" in json.loads(crashed)["cause"].lower()
            assert words.startswith("a b $HOME;* ")
            variables = set(words.rsplit(" ", 1)[1].split(","))
            assert not variables & {"HF_TOKEN", "NOTIFY_SOCKET", "TURSI_SECRET"}
            running.wait("mini")
            kinds = lambda path: [each["event"] for where, each in told if where == path]  # noqa: E731
            until(lambda: "worker.crashed" in kinds("/told"), "the URL was called")
            assert kinds("/elsewhere")
            assert len(kinds("/told")) == len(
                [kind for kind in kinds("/told") if kind.startswith(("worker.", "health."))]
            )

            # What hangs is killed with all that it has started.
            def killed() -> bool:
                pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
                return bool(pids) and not any(psutil.pid_exists(pid) for pid in pids)

            until(killed, "the hanging hook is killed")
            log = running.log.read_text()
            assert "took longer than 1 s" in log
            assert "/nonexistent/program failed for" in log.replace("the hook ", "")
            assert "exited with status 127" in log
            began = time.monotonic()
            assert running.control.get("/status").status_code == 200
            assert time.monotonic() - began < 5
            assert running.stop() == 0
        assert not running.tree()


def test_the_doctor_sees_a_running_daemon() -> None:
    with daemon(scripted=True) as running:
        done = subprocess.run(
            [
                *(sys.executable, "-c", "from tursi.cli import main; main(prog_name='tursi')"),
                *("--socket", str(running.runtime / "control.sock"), "doctor", "--json"),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            env={"PATH": "/usr/bin:/bin", "HOME": str(running.folder)},
            check=False,
        )
        found = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
        assert running.process is not None
        assert f"(pid {running.process.pid})" in found["daemon"]["message"]
        assert found["control socket"]["level"] == "ok"
        assert found["database"]["message"].startswith(str(running.state))
        assert found["cache folder"]["message"].startswith(str(running.state / "cache"))
        assert found["configuration"]["message"] == f"{running.configuration} is valid"
        assert "port" not in found


def test_the_parts_of_the_health() -> None:
    with daemon(scripted=True) as running:
        assert running.client.get("/live").json() == {"alive": True}
        assert running.client.get("/ready").json() == {"ready": True, "waiting": []}
        found = running.client.get("/health")
        assert found.status_code == 200
        parts = {each["name"]: each for each in found.json()["parts"]}
        assert {"database", "event loop", "state", "cache", "logs", "hooks"} <= parts.keys()
        assert parts["database"] == {
            "name": "database", "healthy": True, "message": "answers", "kind": "database",
        }  # fmt: skip
        text = running.client.get("/metrics").text
        assert 'tursi_event_loop_lag_seconds_bucket{le="+Inf"}' in text
        assert "tursi_event_loop_worst_lag_seconds" in text
        assert str(running.folder) not in found.text
        running.deploy("mini", running.script("broken", fail="model_refused:no"))
        running.wait("mini", "failed")
        until(
            lambda: running.client.get("/health").json()["status"] == "degraded", "it is degraded"
        )
