"""The daemon itself: status, health, metrics, and the description of all this."""

from __future__ import annotations

import platform
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from tursi.api.endpoint import Status, Text, endpoint
from tursi.api.fleet import Fleet
from tursi.api.info import Info
from tursi.api.messages import (
    Counts,
    DaemonStatus,
    Document,
    Health,
    ListenerView,
    Liveness,
    Readiness,
    Reloaded,
)
from tursi.api.metrics import Metrics
from tursi.fleet import Part
from tursi.model import Desired, Phase, Role

Look = Callable[[], Awaitable[tuple[str, list[Part]]]]
"""Gives how the daemon is, in a word and by part."""

_AT_REST = frozenset({Phase.STOPPED, Phase.FAILED, Phase.QUARANTINED, Phase.WEDGED})
_PACKAGES = ("twisted", "klein", "msgspec", "torch", "transformers", "huggingface-hub")


Reload = Callable[[], Awaitable[Reloaded]]
"""Reads the configuration again and applies it, or raises why it stays as it was."""


async def nothing_to_reload() -> Reloaded:
    """Where there is no configuration file."""
    return Reloaded([], [])


class Daemon:
    """Handlers for what concerns no single deployment; ``document`` describes them all."""

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics,
        info: Info,
        document: Document,
        look: Look,
        reload: Reload,
    ) -> None:
        self._look = look
        self._reload = reload
        self._fleet = fleet
        self._metrics = metrics
        self._info = info
        self._document = document

    @endpoint("GET", "/status", role=Role.CONTROL, reply=DaemonStatus)
    def status(self) -> DaemonStatus:
        """Show how the daemon is."""
        info, deployments = self._info, self._fleet.deployments()
        return DaemonStatus(
            version=info.version,
            pid=info.pid,
            started_at=info.started_at,
            state=info.state,
            listeners=[ListenerView(each.endpoint, [*each.roles]) for each in info.listeners],
            versions=_versions(),
            counts=Counts(
                deployments=len(deployments),
                workers=sum(len(each.workers) for each in deployments),
                ready=sum(each.ready for each in deployments),
                queued=sum(each.queued for each in deployments),
                in_flight=sum(each.in_flight for each in deployments),
            ),
            containment=info.containment,
            trouble=[
                f"{part.name}: {part.message}"
                for part in self._fleet.health()[1]
                if not part.healthy
            ],
        )

    @endpoint("POST", "/reload", role=Role.CONTROL, reply=Reloaded)
    async def reload(self) -> Reloaded:
        """Read the configuration again and apply what has changed; keep the old on any error."""
        return await self._reload()

    @endpoint("GET", "/health", role=Role.HEALTH, reply=Health, statuses=(200, 503))
    async def health(self) -> Health | Status[Health]:
        """Tell how all parts are; ``degraded`` means that one isn't well, 503 that all is lost."""
        status, parts = await self._look()
        reply = Health(status, parts)
        return Status(503, reply) if status == "unhealthy" else reply

    @endpoint("GET", "/live", role=Role.HEALTH, reply=Liveness)
    def live(self) -> Liveness:
        """Tell that the daemon answers; looks at nothing."""
        return Liveness(alive=True)

    @endpoint("GET", "/ready", role=Role.HEALTH, reply=Readiness, statuses=(200, 503))
    def ready(self) -> Readiness | Status[Readiness]:
        """Tell whether any deployment is still on its way."""
        waiting = [
            each.name
            for each in self._fleet.deployments()
            if each.desired is Desired.RUNNING and not each.ready and each.phase not in _AT_REST
        ]
        reply = Readiness(not waiting, waiting)
        return Status(503, reply) if waiting else reply

    @endpoint("GET", "/metrics", role=Role.METRICS, reply=bytes, media="text/plain")
    def metrics(self, accept: str) -> Text:
        """Tell everything that is counted, in the formats of Prometheus."""
        return Text(*self._metrics.text(accept))

    @endpoint("GET", "/openapi.json", role=None, reply=Document)
    def openapi(self) -> Document:
        """Describe this interface in OpenAPI 3.1."""
        return self._document


@cache
def _versions() -> dict[str, str]:
    """What the installation is made of."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
