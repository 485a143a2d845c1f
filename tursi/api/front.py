"""The HTTP front put together: one for the daemon, a site of it for each listener."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote_to_bytes

from klein.resource import KleinResource

from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from tursi.api.access import Access
from tursi.api.archives import ArchiveControl
from tursi.api.audit import Audit
from tursi.api.daemon import Daemon, Look, Reload, nothing_to_reload
from tursi.api.database import Database
from tursi.api.deployments import DeploymentControl
from tursi.api.endpoint import endpoints, router
from tursi.api.fleet import Fleet
from tursi.api.inference import Inference
from tursi.api.info import Info
from tursi.api.keys import Keys
from tursi.api.messages import Document
from tursi.api.metrics import Metrics
from tursi.api.models import Models
from tursi.api.openapi import document
from tursi.api.pulls import PullControl
from tursi.api.request import Request
from tursi.api.site import Site
from tursi.api.statistics import StatisticsControl
from tursi.config import Configuration
from tursi.errors import InvalidRequest, RouteNotFound
from tursi.faces import TABLE
from tursi.faces.openai import errors
from tursi.faces.route import Answer
from tursi.fleet import Part
from tursi.lag import Lag
from tursi.model import Role


class Front:
    """What all listeners have in common.

    ``reactor`` gives monotonic time and timers, ``keys`` who may ask, ``look`` how the
    daemon is (absent: as its deployments are), ``lag`` how late the event loop is;
    ``group`` is the id of the control group.
    """

    def __init__(
        self,
        fleet: Fleet,
        info: Info,
        configuration: Configuration,
        reactor: Any,
        keys: Keys,
        reload: Reload = nothing_to_reload,
        *,
        look: Look | None = None,
        lag: Lag | None = None,
        group: int | None = None,
    ) -> None:
        self._keyring = keys.ring
        self._group = group
        self._configuration = configuration
        self._reactor = reactor
        self._audit = Audit(fleet, time.time, reactor.seconds)
        metrics = Metrics(fleet, info, self._audit, lag)
        description: Document = {}
        owners = (
            DeploymentControl(fleet),
            Database(fleet),
            Models(fleet, info),
            PullControl(fleet),
            ArchiveControl(fleet),
            keys,
            StatisticsControl(fleet, info, keys.names, reactor.seconds),
            Daemon(fleet, metrics, info, description, look or _of(fleet), reload),
        )
        self.handlers = [each for owner in owners for each in endpoints(owner)]
        description.update(document(info.version, self.handlers, TABLE))
        self.klein = router(lambda: self._configuration.requests.deadline_seconds, *owners)
        self._uploads = frozenset(
            (each.method.encode("ascii"), each.path.encode("ascii"))
            for each, _ in self.handlers
            if each.upload is not None
        )
        self._audit.watch(self.klein.url_map, self.handlers)
        self._inference = Inference(fleet, metrics, configuration, keys.ring)
        self._root = Root(self._inference, self.klein.resource())
        # Unique without any randomness: no two daemons have the same pid at the
        # same time.
        prefix = f"{int(info.started_at * 1000):x}-{info.pid:x}-"
        numbers = itertools.count(1)
        self._new_id = lambda: f"{prefix}{next(numbers):x}".encode("ascii")

    def configure(self, configuration: Configuration, group: int | None) -> None:
        """Go by these from now on; each site is then to be told by ``adapt``."""
        self._configuration = configuration
        self._group = group
        self._inference.configure(configuration)

    def adapt(
        self, site: Site, roles: Iterable[Role], *, is_open: bool = True, is_proxied: bool = False
    ) -> None:
        """Bring ``site`` to the configuration, and to these roles."""
        access = self._access(roles, is_open=is_open, is_proxied=is_proxied)
        site.configure(access, self._configuration.http)

    def _access(self, roles: Iterable[Role], *, is_open: bool, is_proxied: bool) -> Access:
        http = self._configuration.http
        return Access(
            http.hosts,
            roles,
            self._keyring,
            origins=http.origins,
            is_open=is_open and not http.require_keys,
            is_proxied=is_proxied,
            group=self._group,
        )

    def site(
        self, roles: Iterable[Role], *, is_open: bool = True, is_proxied: bool = False
    ) -> Site:
        """The site of a listener with these roles.

        Where it ``is_open``, inference needs no key; ``is_proxied`` means that all
        clients come by a proxy.
        """
        http = self._configuration.http
        return Site(
            self._root,
            self._inference,
            self._access(roles, is_open=is_open, is_proxied=is_proxied),
            http,
            self._audit,
            uploads=self._uploads,
            new_id=self._new_id,
            reactor=self._reactor,
        )


def _of(fleet: Fleet) -> Look:
    async def look() -> tuple[str, list[Part]]:
        return fleet.health()

    return look


class Root(Resource):
    """Where every request begins: the hot routes first, then Klein."""

    isLeaf = True  # noqa: N815 - Twisted's name

    def __init__(self, inference: Inference, klein: KleinResource) -> None:
        super().__init__()
        self._inference = inference
        self._klein = klein

    def render(self, request: Request) -> int:
        """Answer later, or already."""
        if request.is_preflight:
            request.respond(Answer(204, "text/plain", b""))
            return NOT_DONE_YET
        if request.match is not None and request.method == b"POST":
            self._inference.render(request, request.match)
            return NOT_DONE_YET
        if not request.path.startswith(b"/") or request.path.startswith(b"//"):
            # Twisted would drop the first byte, whatever it is, and the doubled slash.
            request.respond(errors.answer(RouteNotFound("The path must begin with one '/'.")))
            return NOT_DONE_YET
        segments = [unquote_to_bytes(each) for each in request.path[1:].split(b"/")]
        if not _is_text(segments):
            # Klein would put a traceback into the log for each.
            request.respond(errors.answer(InvalidRequest("The path isn't valid UTF-8.")))
            return NOT_DONE_YET
        request.prepath, request.postpath = [], segments
        self._klein.render(request)
        return NOT_DONE_YET


def _is_text(segments: Iterable[bytes]) -> bool:
    try:
        b"/".join(segments).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
