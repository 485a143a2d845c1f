"""A fetcher that has been taken over: it tries what none should, and tells what came of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from tursi import wire


def connect(host: str | None, port: int | None) -> None:
    socket.create_connection((host or "", port or 0), 5).close()


def main(repository: str, cache: str) -> None:
    state = Path(os.environ["TURSI_STATE"])
    hub = urlsplit(os.environ["HF_ENDPOINT"])
    attempts: dict[str, Callable[[], object]] = {
        "read the database": (state / "tursi.sqlite").read_bytes,
        "write to the state": lambda: (state / "mine").write_text("x"),
        "list the state": lambda: list(state.iterdir()),
        "read secrets": Path("/etc/shadow").read_bytes,
        "write to the temporary folder": lambda: (state.parent / "mine").write_text("x"),
        "end the daemon": lambda: os.kill(int(os.environ["HF_HOME"].rpartition("/")[2]), 0),
        "write to the cache": lambda: (Path(cache) / "mine").write_text("x"),
        "reach the hub": lambda: connect(hub.hostname, hub.port),
        "end itself": lambda: os.kill(os.getpid(), signal.SIGCONT),
    }
    Path(cache).mkdir(parents=True, exist_ok=True)
    done = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError:
            continue
        done.append(name)
    words = wire.LastWords("fetch_failed", json.dumps(done))
    frame = wire.encode(wire.Kind.FAILED, 0, msgspec.msgpack.encode(words))
    socket.socket(fileno=3).sendall(frame)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3])
