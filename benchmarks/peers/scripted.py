"""The scripted worker for supervisors that don't speak its protocol: it is told to load at once.

Run: ``python -I -u scripted.py STAMPS``. Once it is ready it sends its pid and the
monotonic time to the datagram socket STAMPS.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import msgspec
from scripted_worker import ScriptedWorker, parser

from tursi import wire
from tursi.model import LoadOrder


def serve(daemon: socket.socket, stamps: str) -> None:
    """Play the daemon's part, and tell when the worker is ready."""
    order = msgspec.msgpack.encode(LoadOrder(deployment="peer", folder="/nonexistent"))
    daemon.sendall(wire.encode(wire.Kind.LOAD, 0, order))
    decoder = wire.Decoder()
    while data := daemon.recv(65536):
        for frame in decoder.feed(data):
            if frame.kind == wire.Kind.READY:
                now = time.monotonic()
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as teller:
                    teller.sendto(f"{os.getpid()} {now}".encode(), stamps)


def main() -> None:
    worker, daemon = socket.socketpair()
    threading.Thread(target=serve, args=(daemon, sys.argv[1]), daemon=True).start()
    ScriptedWorker(parser().parse_args([]), worker).run()


if __name__ == "__main__":
    main()
