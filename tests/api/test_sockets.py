"""What only real sockets show: who sends while it is refused, who reads slowly, who leaves."""

from __future__ import annotations

import http.client
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import pytest_twisted
from conversation import INFO, hot_or_not, request
from fake_fleet import End, FakeFleet, Head
from fake_keys import FakeKeys

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from tursi.api import Front, Keys
from tursi.config import Configuration, Http, Requests
from tursi.model import Role

reactor: Any = _reactor
pytestmark = pytest.mark.usefixtures("both_paths")
EVENTS = Head(200, "text/event-stream", {})
BODY = {"model": "small"}
LOCAL = {"Host": "tursi", "Authorization": None}


class Server:
    """A site on a port of its own."""

    def __init__(self, configuration: Configuration) -> None:
        self.fleet = FakeFleet()
        self.keys = FakeKeys()
        keys = Keys(self.keys, reactor)
        keys.ring.load(self.keys.held)
        self.site = Front(self.fleet, INFO, configuration, reactor, keys).site(tuple(Role))
        self.listening = reactor.listenTCP(0, self.site, interface="127.0.0.1")
        self.port: int = self.listening.getHost().port
        self.sockets: list[socket.socket] = []

    def connect(self, data: bytes) -> socket.socket:
        one = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        self.sockets.append(one)
        one.sendall(data)
        return one


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Server]:
    settings["http"] = hot_or_not(settings.get("http", Http()))
    server = Server(Configuration(**settings))
    try:
        yield server
    finally:
        for one in server.sockets:
            one.close()
        await server.listening.stopListening()
        await until(lambda: not server.site.channels)


async def until(look: Callable[[], Any], seconds: float = 10.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline
        await deferLater(reactor, 0.01)
    return found


def drain(one: socket.socket) -> bytes:
    """All that comes until the end."""
    parts = []
    while part := one.recv(65536):
        parts.append(part)
    return b"".join(parts)


def post_200_mb(port: int, chunked: bool) -> tuple[int, int]:
    """Status of the answer, and how many bytes could be sent before it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    size, piece, sent = 200 * 1024 * 1024, b"x" * 65536, 0
    connection.putrequest("POST", "/v1/embeddings")
    connection.putheader("Content-Type", "application/json")
    if chunked:
        connection.putheader("Transfer-Encoding", "chunked")
    else:
        connection.putheader("Content-Length", str(size))
    connection.endheaders()
    try:
        while sent < size:
            connection.send(b"10000\r\n" + piece + b"\r\n" if chunked else piece)
            sent += len(piece)
    except (BrokenPipeError, ConnectionResetError):
        pass
    try:
        response = connection.getresponse()
        response.read()
        return response.status, sent
    finally:
        connection.close()


@pytest.mark.parametrize("chunked", [False, True])
@pytest_twisted.ensureDeferred
async def test_200_mb_are_refused_while_they_arrive_and_the_client_hears_it(chunked: bool) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with serving() as server:
        status, _ = await deferToThread(post_200_mb, server.port, chunked)
        assert status == 413
        assert not server.fleet.passages
    # In KiB; the limit is 16 MiB, held once in pieces.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80 * 1024


@pytest_twisted.ensureDeferred
async def test_a_client_that_sends_on_after_its_refusal_is_cut() -> None:
    async with serving() as server:
        one = server.connect(
            request("POST", "/v1/embeddings", headers={"Content-Length": "100000000"})
        )

        def send_on() -> float:
            began = time.monotonic()
            with suppress(ConnectionError):
                while time.monotonic() - began < 10:
                    one.sendall(b"x" * 1000)
                    time.sleep(0.01)
            return time.monotonic() - began

        took = await deferToThread(send_on)
        assert 1 < took < 6


@pytest_twisted.ensureDeferred
async def test_a_client_that_trickles_is_cut_in_time() -> None:
    async with serving(http=Http(header_seconds=0.4, body_seconds=0.8)) as server:

        def trickle(data: bytes) -> tuple[bytes, float]:
            one = server.connect(b"")
            one.settimeout(0.05)
            began, answer = time.monotonic(), b""
            for byte in data:
                try:
                    one.sendall(bytes([byte]))
                    answer += one.recv(65536)
                except TimeoutError:
                    continue
                except OSError:
                    break
                if answer:
                    break
            return answer, time.monotonic() - began

        answer, took = await deferToThread(trickle, b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 50)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert 0.3 < took < 3


@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_cancels_its_stream_at_once() -> None:
    async with serving() as server:
        one = server.connect(request("POST", "/v1/chat/completions", BODY))
        (passage,) = await until(lambda: server.fleet.passages)
        passage.sink.head(EVENTS)
        passage.sink.body(b"data: 1\n\n")
        began = time.monotonic()
        one.close()
        await until(lambda: passage.cancelled)
        assert time.monotonic() - began < 1


@pytest_twisted.ensureDeferred
async def test_a_reader_that_stops_reading_loses_its_stream_and_nobody_elses() -> None:
    async with serving(requests=Requests(max_stream_buffer=65536)) as server:
        server.connect(request("POST", "/v1/chat/completions", BODY))
        other = server.connect(
            request("POST", "/v1/chat/completions", BODY, headers={"Connection": "close"})
        )
        await until(lambda: len(server.fleet.passages) == 2)
        slow, quick = server.fleet.passages
        reading: Deferred[bytes] = deferToThread(drain, other)
        for passage in (slow, quick):
            passage.sink.head(EVENTS)
        event, sent = b"data: " + b"x" * 1000 + b"\n\n", 0
        while not slow.cancelled:
            assert sent < 64 * 1024 * 1024
            slow.sink.body(event)
            sent += len(event)
            if sent % (50 * len(event)) == 0:
                quick.sink.body(event)
                await deferLater(reactor, 0)
        quick.sink.body(b"data: [DONE]\n\n")
        quick.sink.end(End())
        answer = await reading
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert not quick.cancelled


@pytest_twisted.ensureDeferred
async def test_a_large_answer_and_what_follows_come_whole_and_in_order() -> None:
    async with serving() as server:
        one = server.connect(
            request("POST", "/v1/embeddings", BODY) * 2
            + request("POST", "/v1/chat/completions", BODY)
            + request("GET", "/health", headers={"Connection": "close"})
        )
        pieces = [bytes([letter]) * 20_000_000 for letter in b"ab"]
        passages = server.fleet.passages
        await until(lambda: passages)
        passages[0].answer(pieces[0])
        # It has to read, or it would get no more.
        reading: Deferred[bytes] = deferToThread(drain, one)
        await until(lambda: passages[1:])
        passages[1].answer(pieces[1])
        await until(lambda: passages[2:])
        passages[2].sink.head(EVENTS)
        for _ in range(100):
            passages[2].sink.body(b"data: " + b"c" * 500 + b"\n\n")
        passages[2].sink.end(End())
        answer = await reading
        assert answer.count(b"HTTP/1.1 200 OK") == 4
        first, second, third, last = answer.split(b"HTTP/1.1 200 OK\r\n")[1:]
        for piece, found in zip(pieces, (first, second), strict=True):
            assert found.partition(b"\r\n\r\n")[2] == piece
        assert third.count(b"c" * 500) == 100
        assert third.endswith(b"0\r\n\r\n")
        assert b'"status"' in last


@pytest_twisted.ensureDeferred
async def test_connections_over_the_limit_are_closed() -> None:
    async with serving(http=Http(max_connections_per_peer=2)) as server:
        for _ in range(2):
            one = server.connect(request("GET", "/health"))
            assert (await deferToThread(one.recv, 100)).startswith(b"HTTP/1.1 200")
        over = server.connect(b"")
        assert await deferToThread(over.recv, 100) == b""
        server.sockets[0].close()
        await until(lambda: len(server.site.channels) == 1)
        again = server.connect(request("GET", "/health"))
        assert (await deferToThread(again.recv, 100)).startswith(b"HTTP/1.1 200")


@pytest_twisted.ensureDeferred
async def test_a_dead_peer_is_looked_for() -> None:
    async with serving() as server:
        server.connect(b"")
        (channel,) = await until(lambda: server.site.channels)
        handle = channel.transport.getHandle()
        assert handle.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest_twisted.ensureDeferred
async def test_who_asks_on_a_unix_socket_is_known(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    fleet = FakeFleet()
    front = Front(fleet, INFO, Configuration(), reactor, Keys(FakeKeys(), reactor))
    site = front.site((Role.CONTROL,))
    listening = reactor.listenUNIX(str(path), site)
    one = socket.socket(socket.AF_UNIX)
    try:
        one.connect(str(path))
        one.sendall(request("POST", "/deployments/small/stop", headers=LOCAL))
        await until(lambda: fleet.calls)
        assert fleet.calls == [("stop", "small", f"uid {os.getuid()}")]
    finally:
        one.close()
        await listening.stopListening()
        await until(lambda: not site.channels)
