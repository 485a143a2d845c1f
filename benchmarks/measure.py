"""What the benchmarks share: load over keep-alive connections, and the CPU of a process tree."""

from __future__ import annotations

import json
import selectors
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Round:
    """One round of load against one server."""

    requests: int
    seconds: float
    cpu_seconds: float
    """On-CPU time of the server's whole process tree."""
    latencies: tuple[float, ...]
    replies: tuple[bytes, ...]
    """Bodies of the first few answers, for checking."""

    @property
    def cpu_per_request(self) -> float:
        """Microseconds."""
        return 1e6 * self.cpu_seconds / self.requests

    @property
    def per_cpu_second(self) -> float:
        """Requests for each second of CPU."""
        return self.requests / self.cpu_seconds

    def percentile(self, share: float) -> float:
        """Latency in milliseconds that this share of the requests stayed under."""
        ordered = sorted(self.latencies)
        return 1e3 * ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def request(path: str, body: object, port: int) -> bytes:
    """A POST with a JSON body, as it goes over the wire."""
    data = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    ).encode() + data


class _Connection:
    """One keep-alive connection with one request in flight."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""
        self.began = 0.0

    def send(self, data: bytes) -> None:
        self.began = time.perf_counter()
        self.socket.sendall(data)

    def receive(self) -> bytes | None:
        """The body once the answer is whole; raises if it isn't a 200."""
        data = self.socket.recv(262144)
        if not data:
            raise ConnectionError("the server closed the connection")
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        if not head.startswith(b"HTTP/1.1 200"):
            raise ValueError(self.buffer[:500])
        lowered = head.lower()
        start = lowered.find(b"content-length:")
        if start < 0:
            if not body.endswith(b"0\r\n\r\n"):
                return None
        elif len(body) < int(lowered[start + 15 :].split(b"\r\n", 1)[0]):
            return None
        self.buffer = b""
        return body


def load(
    port: int, payloads: Iterator[bytes], connections: int, seconds: float, server: psutil.Process
) -> Round:
    """Keep ``connections`` requests in flight for ``seconds``."""
    selector = selectors.DefaultSelector()
    for _ in range(connections):
        connection = _Connection(port)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.send(next(payloads))
    latencies: list[float] = []
    replies: list[bytes] = []
    before, began = tree_cpu(server), time.perf_counter()
    open_requests, ending = connections, False
    while open_requests:
        answered = selector.select(30)
        if not answered:
            raise TimeoutError("no answer came for 30 s")
        for key, _ in answered:
            body = key.data.receive()
            if body is None:
                continue
            now = time.perf_counter()
            latencies.append(now - key.data.began)
            if len(replies) < 64:
                replies.append(body)
            ending = ending or now - began >= seconds
            if ending:
                open_requests -= 1
                selector.unregister(key.data.socket)
                key.data.socket.close()
            else:
                key.data.send(next(payloads))
    elapsed = time.perf_counter() - began
    return Round(
        len(latencies), elapsed, tree_cpu(server) - before, tuple(latencies), tuple(replies)
    )


def tree_cpu(process: psutil.Process) -> float:
    """User and system seconds of a process and its living descendants."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        times = one.cpu_times()
        total += times.user + times.system
    return total


def alternate(
    runs: Sequence[tuple[str, Callable[[], Round]]], rounds: int
) -> dict[str, list[Round]]:
    """A B A B ..., so that what else the machine does hits both alike."""
    found: dict[str, list[Round]] = {name: [] for name, _ in runs}
    for _ in range(rounds):
        for name, run in runs:
            found[name].append(run())
    return found


def ratio(ours: Sequence[Round], theirs: Sequence[Round]) -> tuple[float, float, float]:
    """Median, least and greatest of our CPU per request over theirs, round by round."""
    ratios = [
        our.cpu_per_request / their.cpu_per_request for our, their in zip(ours, theirs, strict=True)
    ]
    return statistics.median(ratios), min(ratios), max(ratios)


def wait_for(port: int, process: psutil.Process, seconds: float = 120.0) -> None:
    """Wait until something listens there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise RuntimeError("the server ended before it listened")
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on {port}")
