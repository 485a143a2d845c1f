"""New certificates without a restart, on real sockets."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from cryptography.x509.oid import NameOID
from OpenSSL import SSL
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


def names(ours: Certificates) -> list[str]:
    """Of the certificates that a client is shown, from a handshake in memory."""
    client, server = SSL.Connection(SSL.Context(SSL.TLS_METHOD)), SSL.Connection(ours.getContext())
    client.set_connect_state()
    server.set_accept_state()
    for _ in range(4):
        for one, other in ((client, server), (server, client)):
            with suppress(SSL.WantReadError):
                one.do_handshake()
            with suppress(SSL.WantReadError):
                other.bio_write(one.bio_read(65536))
    chain = client.get_peer_cert_chain() or []
    found = [each.to_cryptography().subject for each in chain]
    return [str(each.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value) for each in found]


def test_the_whole_chain_of_the_file_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "cert.pem"
    certificate(tmp_path, "intermediate")
    between = file.read_bytes()
    certificate(tmp_path, "leaf")
    file.write_bytes(file.read_bytes() + between)
    ours = Certificates(listener(tmp_path))
    assert names(ours) == ["leaf", "intermediate"]
    assert not ours.reload()
    certificate(tmp_path, "renewed")
    assert ours.reload()
    assert names(ours) == ["renewed"]
    file.write_bytes(file.read_bytes() + between.replace(b"M", b"!"))
    with pytest.raises(ConfigurationError, match=r"cert\.pem has a certificate that can't be read"):
        ours.reload()
    assert names(ours) == ["renewed"]
