"""New certificates without a restart, on real sockets."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from self_signed import certificate, common_name, handshake

from twisted.internet import reactor as _reactor
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThread

from tursi.certificates import Certificates, certificates
from tursi.config import Listener
from tursi.errors import ConfigurationError
from tursi.listen import bind

reactor: Any = _reactor


class Echo(Protocol):
    def dataReceived(self, data: bytes) -> None:  # noqa: N802 - Twisted's name
        assert self.transport is not None
        self.transport.write(data)


def listener(folder: Path, **more: Any) -> Listener:
    files = f"privateKey={folder}/key.pem:certKey={folder}/cert.pem"
    return Listener(endpoint=f"ssl:0:interface=127.0.0.1:{files}", roles=(), **more)


def say(secured: ssl.SSLSocket) -> bytes:
    secured.sendall(b"hello")
    return secured.recv(10)


@pytest_twisted.ensureDeferred
async def test_new_connections_get_the_new_certificate_and_old_ones_stay(tmp_path: Path) -> None:
    certificate(tmp_path, "first")
    ours = Certificates(listener(tmp_path))
    echo = Factory.forProtocol(Echo)
    port: Any = bind(ours.reactor(reactor), listener(tmp_path), echo)
    number = port.getHost().port
    open_ones: list[socket.socket] = []

    async def connect() -> Any:
        secured = await deferToThread(handshake, number)
        open_ones.append(secured)
        return secured

    try:
        early = await connect()
        assert common_name(early) == "first"
        certificate(tmp_path, "second")
        assert common_name(await connect()) == "first"
        ours.reload()
        assert common_name(await connect()) == "second"
        for name in ("cert.pem", "key.pem"):
            content = (tmp_path / name).read_bytes()
            for broken in (b"", b"not a certificate", content[: len(content) // 2]):
                (tmp_path / name).write_bytes(broken)
                with pytest.raises(ConfigurationError):
                    ours.reload()
            (tmp_path / name).write_bytes(content)
        assert common_name(await connect()) == "second"
        assert await deferToThread(say, early) == b"hello"
    finally:
        for each in open_ones:
            each.close()
        await port.stopListening()


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    certificate(tmp_path, "one")
    other = (tmp_path / "key.pem").read_bytes()
    certificate(tmp_path, "two")
    (tmp_path / "key.pem").write_bytes(other)
    with pytest.raises(ConfigurationError, match="do not match"):
        certificates(listener(tmp_path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"key\.pem|cert\.pem"):
        certificates(listener(tmp_path))


def test_without_tls_there_are_none() -> None:
    plain = Listener(endpoint="tcp:0:interface=127.0.0.1", roles=())
    assert certificates(plain) is None
