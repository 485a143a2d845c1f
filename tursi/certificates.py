"""Certificates of listeners with TLS: read at the start, and anew when asked."""

from __future__ import annotations

import re
from pathlib import Path
from ssl import TLSVersion
from typing import Any

from zope.interface import implementer

from twisted.internet.endpoints import _parse  # there is no public way
from twisted.internet.interfaces import IOpenSSLContextFactory
from twisted.internet.ssl import Certificate

from tursi.config import Listener
from tursi.errors import ConfigurationError
from tursi.listen import look_at

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


@implementer(IOpenSSLContextFactory)
class Certificates:
    """The certificate and private key that an ``ssl:`` endpoint names.

    As the context factory of the listener it gives each new connection what was
    read last; those that are open keep what they have.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._context: Any = None
        self._shown: list[bytes] = []
        self.reload()

    def reload(self) -> bool:
        """Read the files again, and tell whether there are others now.

        ``ConfigurationError`` leaves all as it was.
        """
        options = look_at(self._listener).context
        try:
            if not options.extraCertChain:
                options.extraCertChain = [each.original for each in _chain(self._listener)[1:]]
            context = options.getContext()
        except ConfigurationError:
            raise
        except Exception:  # noqa: BLE001 - OpenSSL's errors are of many kinds and say little
            raise ConfigurationError(
                f"http.listeners: the certificate of {self._listener.endpoint!r} and its private "
                "key don't belong together."
            ) from None
        context.set_min_proto_version(TLSVersion.TLSv1_2)
        self._context = context
        shown = [Certificate(each) for each in (options.certificate, *options.extraCertChain)]
        before, self._shown = self._shown, [each.dump() for each in shown]
        return self._shown != before

    def getContext(self) -> Any:  # noqa: N802 - Twisted's name
        """The context for a new connection."""
        return self._context

    def reactor(self, reactor: Any) -> Any:
        """``reactor``, as the endpoint is to see it: with these in place of its own."""
        return _Secured(reactor, self)


class _Secured:
    def __init__(self, reactor: Any, certificates: Certificates) -> None:
        self._reactor = reactor
        self._certificates = certificates

    def listenSSL(  # noqa: N802 - Twisted's name
        self,
        port: int,
        factory: Any,
        contextFactory: Any,  # noqa: ARG002, N803 - the same
        **rest: Any,
    ) -> Any:
        return self._reactor.listenSSL(port, factory, self._certificates, **rest)


def _chain(listener: Listener) -> list[Any]:
    """All certificates of the file ``certKey``, of which Twisted takes the first only."""
    args, given = _parse(listener.endpoint)
    given = {**dict(zip(("port", "privateKey", "certKey"), args[1:], strict=False)), **given}
    path = Path(given.get("certKey") or given["privateKey"])
    try:
        return [Certificate.loadPEM(each) for each in _PEM.findall(path.read_bytes())]
    except Exception:  # noqa: BLE001 - OpenSSL's errors are of many kinds and say little
        raise ConfigurationError(
            f"http.listeners: {path} has a certificate that can't be read."
        ) from None


def certificates(listener: Listener) -> Certificates | None:
    """Those of the listener if it has TLS; ``ConfigurationError`` if they can't be used."""
    return None if look_at(listener).context is None else Certificates(listener)
