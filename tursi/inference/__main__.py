"""``python -I -m tursi.inference``: one worker, its data socket on descriptor 3."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import msgspec

from tursi import heartbeat, wire
from tursi.inference.connection import Connection

DATA_DESCRIPTOR = 3
_SOFTWARE_ERROR = 70
_MALLOC_TRIM_THRESHOLD = -1
_MALLOC_MMAP_THRESHOLD = -3


def main() -> None:
    """Say HELLO, then serve until the daemon ends it."""
    faulthandler.enable()
    # Before HELLO: from then on the daemon may ask. The handler is written in C
    # and needs no interpreter lock.
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
    data = socket.socket(fileno=DATA_DESCRIPTOR)
    data.set_inheritable(False)
    connection = Connection(data)
    page, descriptor = heartbeat.share()
    connection.greet(wire.encode(wire.Kind.HELLO, 0, msgspec.msgpack.encode(_hello())), descriptor)
    pulse = heartbeat.Pulse(page)
    pulse.start()
    _tune_process()
    # The faces and the loop come after HELLO, so that the daemon sees at once
    # that the process lives.
    from tursi.faces import TABLE
    from tursi.inference.worker import Worker

    try:
        status = Worker(connection, TABLE, page, pulse).run()
    except Exception:  # noqa: BLE001 - the daemon broke the protocol, or we have a defect
        traceback.print_exc()
        status = _SOFTWARE_ERROR
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: finalizing an interpreter with torch's threads in it can
    # crash or hang, and there is nothing left to save.
    os._exit(status)


def _hello() -> wire.Hello:
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        start_time = int(fields[19])
    except OSError:
        start_time = 0
    return wire.Hello(protocol=wire.PROTOCOL_VERSION, pid=os.getpid(), start_time=start_time)


def _tune_process() -> None:
    # A reader thread must not wait 5 ms for the interpreter while the compute
    # thread runs Python.
    sys.setswitchinterval(0.0005)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        # Without these glibc maps and unmaps every buffer over 128 KiB, and
        # page faults dominate large bodies.
        library.mallopt(_MALLOC_MMAP_THRESHOLD, 64 << 20)
        library.mallopt(_MALLOC_TRIM_THRESHOLD, 128 << 20)


if __name__ == "__main__":
    main()
