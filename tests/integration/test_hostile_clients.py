"""Clients that mean harm, against a daemon that runs: the others hardly notice."""

from __future__ import annotations

import resource
import selectors
import socket
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
from daemon import Daemon, daemon
from patience import until

HALF_OPEN = 1000
MIB = 1024 * 1024


@pytest.fixture(scope="module", autouse=True)
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def flooded() -> Iterator[Daemon]:
    with daemon(scripted=True, settings="[http]\nheader_seconds = 4\n") as one:
        one.deploy("echo", one.script(echo=True))
        one.wait("echo")
        yield one


def resident(one: Daemon) -> int:
    assert one.process is not None
    return int(psutil.Process(one.process.pid).memory_info().rss)


def cpu(one: Daemon) -> float:
    assert one.process is not None
    times = psutil.Process(one.process.pid).cpu_times()
    return float(times.user + times.system)


def open_from(one: Daemon, address: str) -> socket.socket:
    # All of 127.0.0.0/8 is this machine.
    return socket.create_connection(
        ("127.0.0.1", one.port), timeout=30, source_address=(address, 0)
    )


def p99(one: Daemon, count: int = 200) -> float:
    """Of requests by a good client, each on a connection of its own, in seconds."""
    times = []
    body = {"model": "echo", "input": "hello"}
    for _ in range(count):
        began = time.monotonic()
        with httpx.Client(base_url=one.url, timeout=30) as client:
            assert client.post("/v1/embeddings", json=body).status_code == 200
        times.append(time.monotonic() - began)
    return sorted(times)[int(0.99 * count)]


def test_a_thousand_half_open_connections_hold_nobody_up(flooded: Daemon) -> None:
    p99(flooded, 20)
    before = resident(flooded)
    loris = []
    try:
        for number in range(HALF_OPEN):
            one = open_from(flooded, f"127.0.1.{number % 5 + 1}")
            one.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nX-A: ")
            loris.append(one)
        # Most of them at most 256 from one address.
        assert flooded.control.get("/status").status_code == 200
        assert p99(flooded) < 0.5
        for one in loris:
            try:
                one.send(b"a")
            except OSError:
                continue
        assert p99(flooded, 50) < 0.5
        assert resident(flooded) - before < 50 * MIB
        # However they go on, each is cut in its time.
        with selectors.DefaultSelector() as selector:
            for one in loris:
                selector.register(one, selectors.EVENT_READ)
            until(lambda: len(selector.select(0)) == len(loris), "all are cut", 30)
    finally:
        for one in loris:
            one.close()


def test_a_flood_from_everywhere_is_outlived(flooded: Daemon) -> None:
    loris = []
    try:
        for number in range(HALF_OPEN + 300):
            one = open_from(flooded, f"127.0.2.{number % 200 + 1}")
            one.sendall(b"GET")
            loris.append(one)
        assert p99(flooded, 50) < 0.5
        assert flooded.control.get("/status").status_code == 200
    finally:
        for one in loris:
            one.close()


@pytest.mark.parametrize("path", ["/v1/embeddings", "/models/echo", "/deployments", "/nothing"])
def test_ten_gigabytes_are_refused_before_they_arrive(flooded: Daemon, path: str) -> None:
    with open_from(flooded, "127.0.0.1") as one:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**10}\r\n\r\n"
        one.sendall(head.encode())
        assert one.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("size", [6, 65536])
def test_endless_chunks_cost_little(flooded: Daemon, size: int) -> None:
    before, used = resident(flooded), cpu(flooded)
    cut = False
    deadline = time.monotonic() + 30
    piece = (b"%x\r\n" % size + b"x" * size + b"\r\n") * max(1, 65536 // size)
    with open_from(flooded, "127.0.0.1") as one:
        one.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        while not cut and time.monotonic() < deadline:
            try:
                one.sendall(piece)
            except OSError:
                cut = True
    assert cut
    assert resident(flooded) - before < 40 * MIB
    # For two seconds it reads on, and throws away, so that the client can hear of it.
    assert cpu(flooded) - used < 3.5
    series = until(
        lambda: (
            'tursi_requests_refused_total{code="payload_too_large"}'
            in flooded.client.get("/metrics").text
        ),
        "it is counted",
    )
    assert series


def test_who_reads_nothing_is_cut(flooded: Daemon) -> None:
    with open_from(flooded, "127.0.0.1") as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        before = resident(flooded)
        asked = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        one.settimeout(2)
        try:
            for _ in range(2000):
                one.sendall(asked)
        except OSError:
            pass
        assert resident(flooded) - before < 20 * MIB
    assert flooded.client.get("/health").status_code == 200
