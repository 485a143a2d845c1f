"""Requests and answers of a site in memory: the real parser on a transport that records."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPResponse
from io import BytesIO
from typing import Any

import msgspec
from fake_fleet import FakeFleet
from fake_keys import ADMIN, FakeKeys

from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from tursi.api import Front, Info, Keys
from tursi.api.channel import Channel
from tursi.api.daemon import Look
from tursi.api.site import Site
from tursi.config import Configuration, Http, Listener, Requests
from tursi.model import Role

HERE = IPv4Address("TCP", "127.0.0.1", 8430)
PEER = IPv4Address("TCP", "127.0.0.1", 50000)
INFO = Info(
    version="1.2.3",
    pid=42,
    started_at=1_700_000_000.0,
    state="/var/lib/tursi",
    listeners=(Listener(endpoint="tcp:8430", roles=(Role.INFERENCE,)),),
)


hot_path = True
"""Whether sites have the hot path; tests of both ways set it."""


@dataclass
class Reply:
    status: int
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert self.headers["Content-Type"] == "application/json"
        error: dict[str, Any] = self.json()["error"]
        if isinstance(error, str):
            # Hugging Face's shape.
            return {"message": error, **self.json()}
        assert error["message"]
        assert error["type"]
        assert "param" in error
        return error


class _Socket:
    def __init__(self, data: bytes) -> None:
        self._file = BytesIO(data)

    def makefile(self, mode: str) -> BytesIO:
        return self._file


def parse(data: bytes, method: str = "GET") -> Reply:
    """The first answer in ``data``."""
    response = HTTPResponse(_Socket(data), method=method)  # type: ignore[arg-type] # all it needs
    response.begin()
    body = response.read()
    return Reply(response.status, response.headers, body)


class Socket:
    """A Unix socket, with us at both ends."""

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        if option != socket.SO_PEERCRED:
            raise OSError
        return struct.pack("iII", os.getpid(), os.getuid(), os.getgid())


class Transport(StringTransport):
    """Records how the connection was closed; ``stall`` makes it a slow reader."""

    channel: Channel
    aborted = half_closed = False

    def leave(self) -> None:
        """The client is gone."""
        self.channel.connectionLost()

    def loseWriteConnection(self) -> None:  # noqa: N802 - Twisted's name
        self.half_closed = True

    def abortConnection(self) -> None:  # noqa: N802 - Twisted's name
        self.aborted = True
        self.loseConnection()

    def pauseProducing(self) -> None:  # noqa: N802 - Twisted's name
        # A real one may be told so although it is about to close.
        if not self.disconnecting:
            super().pauseProducing()

    def resumeProducing(self) -> None:  # noqa: N802 - Twisted's name
        if not self.disconnecting:
            super().resumeProducing()

    def getHandle(self) -> Socket:  # noqa: N802 - Twisted's name
        return Socket()

    def setTcpNoDelay(self, enabled: bool) -> None:  # noqa: N802 - Twisted's name
        pass

    def setTcpKeepAlive(self, enabled: bool) -> None:  # noqa: N802 - Twisted's name
        pass


def hot_or_not(http: Http, hot: bool | None = None) -> Http:
    """These settings, with the hot path or without, as the test wants it."""
    return msgspec.structs.replace(http, hot_path=hot_path if hot is None else hot)


class House:
    """A front with its fleet and clock."""

    def __init__(
        self,
        fleet: FakeFleet | None = None,
        *,
        http: Http | None = None,
        requests: Requests | None = None,
        hot: bool | None = None,
        look: Look | None = None,
    ) -> None:
        self.fleet = fleet or FakeFleet()
        self.clock = Clock()
        self.configuration = Configuration(
            http=hot_or_not(http or Http(), hot), requests=requests or Requests()
        )
        self.store = FakeKeys()
        self.keys = Keys(self.store, self.clock, lambda: 1_700_000_100.0)
        self.keys.ring.load(self.store.held)
        self.front = Front(self.fleet, INFO, self.configuration, self.clock, self.keys, look=look)

    def connect(self, roles: tuple[Role, ...] = tuple(Role)) -> tuple[Channel, Transport]:
        channel = self.accept(self.front.site(roles))
        assert channel is not None
        return channel, channel.transport

    def accept(self, site: Site, peer: IPv4Address = PEER) -> Channel | None:
        """A new connection to ``site``, if it takes one."""
        channel = site.buildProtocol(peer)
        if channel is None:
            return None
        transport = Transport(hostAddress=HERE, peerAddress=peer)
        transport.channel = channel
        channel.makeConnection(transport)
        return channel

    def send(self, data: bytes, roles: tuple[Role, ...] = tuple(Role)) -> Transport:
        channel, transport = self.connect(roles)
        channel.dataReceived(data)
        return transport

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str | None] | None = None,
        roles: tuple[Role, ...] = tuple(Role),
    ) -> Reply:
        """The answer to one request, which must be there at once."""
        transport = self.send(request(method, path, body, headers=headers), roles)
        return parse(transport.value(), method)


def request(
    method: str, path: str, body: Any = None, *, headers: Mapping[str, str | None] | None = None
) -> bytes:
    """A request as bytes, with a key for everything; a ``body`` that isn't bytes is sent as JSON.

    A header that is given as None is left out.
    """
    fields: dict[str, str | None] = {"Host": "localhost", "Authorization": f"Bearer {ADMIN}"}
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        fields["Content-Type"] = "application/json"
    if body is not None:
        fields["Content-Length"] = str(len(body))
    fields.update(headers or {})
    lines = [
        f"{method} {path} HTTP/1.1",
        *(f"{name}: {value}" for name, value in fields.items() if value is not None),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")
