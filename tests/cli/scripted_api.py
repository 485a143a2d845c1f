"""A small HTTP server on a Unix socket that plays scripted answers of the control API."""

from __future__ import annotations

import json
import shutil
import socketserver
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from click.testing import CliRunner, Result

from tursi.cli import main


@dataclass
class Asked:
    """A request as the server saw it."""

    method: str
    path: str
    parameters: dict[str, str]
    body: Any


@dataclass
class Reply:
    """What to answer; with ``pieces`` the answer is a stream of them."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[str] | None = None
    hold: threading.Event | None = None
    """Wait for it before the end of a stream (or ten seconds)."""


class Api:
    """Scripted answers by method and path; the last of several stays."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.asked: list[Asked] = []
        self.gone = threading.Event()
        """Set when a client has left a stream."""
        self._replies: dict[tuple[str, str], list[Reply]] = {}

    def on(self, method: str, path: str, *replies: Any) -> None:
        """Answer with these, one after the other."""
        self._replies[method, path] = [
            reply if isinstance(reply, Reply) else Reply(reply) for reply in replies
        ]

    def reply(self, asked: Asked) -> Reply:
        """The next scripted answer."""
        self.asked.append(asked)
        replies = self._replies.get((asked.method, asked.path))
        if not replies:
            return refusal(404, "route_not_found", f"There is nothing at {asked.path}.")
        return replies.pop(0) if len(replies) > 1 else replies[0]

    def tursi(self, *arguments: str, text: str | None = None) -> Result:
        """Run the command against this server."""
        return CliRunner().invoke(main, ["--socket", str(self.socket), *arguments], input=text)


def refusal(status: int, code: str, message: str, **more: Any) -> Reply:
    """An error in the control API's shape."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return Reply({"error": {**error, **more}}, status)


def worker(phase: str = "ready", **fields: Any) -> dict[str, Any]:
    """A WorkerStatus as the API shows it."""
    return {
        "name": "mini-1-0", "replica": 0, "phase": phase, "since": "2026-01-02T03:04:05Z",
        "uuid": None, "generation": 1, "pid": 77, "reason": None, "failure": None, "restarts": 0,
        "next_try_at": None, "progress": None, "in_flight": 0, "rss": 300 * 1024 * 1024,
        "cpu_seconds": 1.5, "task": None, "device": None, "dtype": None, **fields,
    }  # fmt: skip


def deployment(phase: str = "ready", **fields: Any) -> dict[str, Any]:
    """A DeploymentStatus as the API shows it, with one worker in the same phase."""
    return {
        "name": "mini", "model": "org/mini", "task": "feature-extraction", "desired": "running",
        "phase": phase, "replicas": 1, "ready": int(phase == "ready"), "generation": 1,
        "device": "cpu", "dtype": "float32", "commit": None,
        "created_at": "2026-01-02T03:04:05Z", "updated_at": "2026-01-02T03:04:05Z",
        "reason": None, "failure": None, "next_try_at": None, "progress": None, "queued": 0,
        "in_flight": 0, "workers": [worker(phase)], "load": "always", "keep_alive": None, **fields,
    }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: Api

    def _any(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        reply = self.api.reply(Asked(self.command, parts.path, dict(parse_qsl(parts.query)), body))
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.pieces is None:
            raw = reply.body
            content = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for piece in reply.pieces:
            self.wfile.write(piece.encode())
        self.wfile.flush()
        if reply.hold is not None:
            # A client that leaves ends the input.
            self.connection.settimeout(60)
            if not reply.hold.is_set() and self._client_is_gone():
                self.api.gone.set()
        self.close_connection = True

    def _client_is_gone(self) -> bool:
        try:
            return bool(self.connection.recv(1) == b"")
        except ConnectionError:
            # It has left something unread.
            return True

    do_GET = do_PUT = do_POST = do_DELETE = _any  # noqa: N815 - the names of http.server

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextmanager
def child(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that is killed if the test fails, rather than waited for."""
    with subprocess.Popen([str(each) for each in command], **options) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


@contextmanager
def scripted_api() -> Iterator[Api]:
    """A running server and its script."""
    # Not pytest's tmp_path: a Unix socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="tursi-"))
    api = Api(folder / "control.sock")
    handler: Callable[..., BaseHTTPRequestHandler] = type("Handler", (_Handler,), {"api": api})
    try:
        with _Server(str(api.socket), handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            try:
                yield api
            finally:
                server.shutdown()
                thread.join(10)
    finally:
        shutil.rmtree(folder)
