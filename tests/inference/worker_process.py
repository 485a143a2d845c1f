"""A real worker process, spoken to as the daemon does."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tursi.model import Loaded, LoadOrder
from tursi.wire import (
    Ask,
    Decoder,
    End,
    Frame,
    Head,
    Kind,
    decode_end,
    decode_head,
    decode_tokens,
    encode,
    encode_ask,
)

DEADLINE = 60.0
"""Seconds for anything to happen."""


class WorkerProcess:
    """Its data socket, its pid, and every frame that has come."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.frames: list[Frame] = []
        self._decoder = Decoder()
        self.socket, theirs = socket.socketpair()
        with theirs, log.open("wb") as output:
            self.pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-m", "tursi.inference"],
                {"PATH": os.environ.get("PATH", ""), "HOME": str(log.parent)},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                    (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), 3),
                ],
                # As a daemon's child it would have a session of its own.
                setsid=True,
            )
        self._pidfd = os.pidfd_open(self.pid)
        self._status: int | None = None

    def send(self, kind: int, id_: int = 0, body: bytes = b"") -> None:
        self.socket.sendall(encode(kind, id_, body))

    def ask(self, id_: int, route: str, body: object, *, seconds: float = DEADLINE) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        ask = Ask(route, f"request-{id_}", "application/json", seconds, data)
        self.send(Kind.REQUEST, id_, encode_ask(ask))

    def until(self, condition: Callable[[], bool]) -> None:
        """Read frames until the condition holds."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.socket], [], [], left)[0]:
                raise TimeoutError(f"only {self.frames[-5:]} came; {self.log.read_text()[-3000:]}")
            data = self.socket.recv(1 << 20)
            if not data:
                raise EOFError(self.log.read_text()[-3000:])
            self.frames += self._decoder.feed(data)

    def of(self, kind: int, id_: int = 0) -> list[Frame]:
        return [frame for frame in self.frames if frame.kind == kind and frame.id == id_]

    def answer(self, id_: int) -> tuple[Head | None, bytes, End]:
        """Wait for the END of an answer; its head, its bytes and its end."""
        self.until(lambda: bool(self.of(Kind.END, id_)))
        parts = []
        for frame in self.frames:
            if frame.kind == Kind.BODY and frame.id == id_:
                parts.append(frame.body)
            elif frame.kind == Kind.TOKENS:
                parts += [data for stream, data in decode_tokens(frame.body) if stream == id_]
        heads = self.of(Kind.HEAD, id_)
        head = decode_head(heads[0].body) if heads else None
        (end,) = self.of(Kind.END, id_)
        return head, b"".join(parts), decode_end(end.body)

    def load(self, folder: Path, **order: Any) -> Loaded:
        self.send(Kind.LOAD, 0, msgspec.msgpack.encode(LoadOrder("test", str(folder), **order)))
        self.until(lambda: bool(self.of(Kind.READY) or self.of(Kind.FAILED)))
        (ready,) = self.of(Kind.READY)
        return msgspec.msgpack.decode(ready.body, type=Loaded)

    def signal(self, number: int) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def status(self) -> int:
        """Wait for the process to end; what ``waitstatus_to_exitcode`` makes of its end."""
        if self._status is None:
            if not select.select([self._pidfd], [], [], DEADLINE)[0]:
                raise TimeoutError("the worker doesn't end")
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def close(self) -> None:
        self.socket.close()
        if self._status is None:
            self.signal(signal.SIGKILL)
            self.status()
        os.close(self._pidfd)


@contextmanager
def worker_process(log: Path) -> Iterator[WorkerProcess]:
    """A worker that is gone afterwards."""
    process = WorkerProcess(log)
    try:
        yield process
    finally:
        process.close()
