"""Certificates of listeners with TLS: read at the start, and anew when asked."""

from __future__ import annotations

from ssl import TLSVersion
from typing import Any

from zope.interface import implementer

from twisted.internet.interfaces import IOpenSSLContextFactory

from tursi.config import Listener
from tursi.errors import ConfigurationError
from tursi.listen import look_at


@implementer(IOpenSSLContextFactory)
class Certificates:
    """The certificate and private key that an ``ssl:`` endpoint names.

    As the context factory of the listener it gives each new connection what was
    read last; those that are open keep what they have.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._context: Any = None
        self.reload()

    def reload(self) -> None:
        """Read the files again; ``ConfigurationError`` leaves all as it was."""
        try:
            context = look_at(self._listener).context.getContext()
        except ConfigurationError:
            raise
        except Exception:  # noqa: BLE001 - OpenSSL's errors are of many kinds and say little
            raise ConfigurationError(
                f"http.listeners: the certificate of {self._listener.endpoint!r} and its private "
                "key don't belong together."
            ) from None
        context.set_min_proto_version(TLSVersion.TLSv1_2)
        self._context = context

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


def certificates(listener: Listener) -> Certificates | None:
    """Those of the listener if it has TLS; ``ConfigurationError`` if they can't be used."""
    return None if look_at(listener).context is None else Certificates(listener)
