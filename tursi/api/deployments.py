"""Control of deployments, and their history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tursi.api.endpoint import Status, endpoint, identity, jsonable
from tursi.api.fleet import Fleet
from tursi.api.messages import (
    AllEventsQuery,
    CanaryBody,
    Crashes,
    CrashesQuery,
    Deployed,
    DeploymentBody,
    Deployments,
    DeployQuery,
    Events,
    EventsQuery,
    Generations,
    LimitsBody,
    Lines,
    Lives,
    LivesQuery,
    LogsQuery,
    NewDeploymentBody,
    RollbackBody,
    ScaleBody,
    Workers,
)
from tursi.api.stream import Follow
from tursi.errors import CrashNotFound, DeploymentNotFound
from tursi.model import (
    DeploymentStatus,
    Dossier,
    Event,
    Fit,
    Limits,
    Load,
    Reference,
    Request,
    Role,
    Schedule,
    Story,
)

_CONTROL: dict[str, Any] = {"role": Role.CONTROL}
_ACCEPTED: dict[str, Any] = {**_CONTROL, "reply": DeploymentStatus, "statuses": (202,)}


class DeploymentControl:
    """Handlers under ``/deployments`` and ``/events``."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @endpoint("GET", "/deployments", reply=Deployments, **_CONTROL)
    def list(self) -> Deployments:
        """List all deployments."""
        return Deployments([*self._fleet.deployments()])

    @endpoint(
        "POST",
        "/deployments",
        body=NewDeploymentBody,
        query=DeployQuery,
        reply=(Deployed, Fit),
        statuses=(200, 201),
        **_CONTROL,
    )
    async def create(
        self, name: str | None, model: str, by: str, **rest: Any
    ) -> Deployed | Status[Deployed] | Fit:
        """Deploy a model, or change its deployment, under its own or a given name."""
        chosen = name if name is not None else Reference.parse(model).short_name
        return await self.put(chosen, model, by=by, **rest)

    @endpoint(
        "PUT", "/deployments/<name>", body=DeploymentBody, query=DeployQuery,
        reply=(Deployed, Fit), statuses=(200, 201), **_CONTROL,
    )  # fmt: skip
    async def put(
        self,
        name: str,
        model: str,
        task: str | None,
        device: str | None,
        dtype: str | None,
        replicas: int | None,
        max_replicas: int | None,
        limits: LimitsBody | None,
        allow_pickle: bool | None,
        trust_remote_code: bool | None,
        quantization: str | None,
        load: Load | None,
        keep_alive: float | None,
        canary: int | None,
        dry_run: bool,
        by: str,
    ) -> Deployed | Status[Deployed] | Fit:
        """Create the deployment, or change it; the answer comes once that is durable."""
        request = Request(
            model=model,
            task=task,
            device=device or "auto",
            dtype=dtype or "auto",
            limits=limits.value() if limits else Limits(),
            allow_pickle=bool(allow_pickle),
            trust_remote_code=bool(trust_remote_code),
            quantization=quantization or "none",
        )
        before = self._before(name)
        least, most = _replicas(before, replicas, max_replicas)
        if dry_run:
            return await self._fleet.prospect.fit(
                name, request, least, most, beside=canary is not None
            )
        deployment, outcome = await self._fleet.deploy(
            name, request, least, by, _schedule(before, load, keep_alive), most, canary
        )
        reply = Deployed(deployment, outcome)
        return Status(201, reply) if outcome == "created" else reply

    def _before(self, name: str) -> DeploymentStatus | None:
        try:
            return self._fleet.deployment(name)
        except DeploymentNotFound:
            return None

    @endpoint("GET", "/deployments/<name>", reply=DeploymentStatus, **_CONTROL)
    def show(self, name: str) -> DeploymentStatus:
        """Show how the deployment is."""
        return self._fleet.deployment(name)

    @endpoint("DELETE", "/deployments/<name>", **_ACCEPTED)
    async def remove(self, name: str, by: str) -> DeploymentStatus:
        """Delete the deployment; its workers finish what they are at. Its history stays."""
        return await self._fleet.remove(name, by)

    @endpoint("POST", "/deployments/<name>/start", **_ACCEPTED)
    async def start(self, name: str, by: str) -> DeploymentStatus:
        """Start the deployment, also one that has given up."""
        return await self._fleet.start(name, by)

    @endpoint("POST", "/deployments/<name>/stop", **_ACCEPTED)
    async def stop(self, name: str, by: str) -> DeploymentStatus:
        """Stop the deployment; its workers finish what they are at."""
        return await self._fleet.stop(name, by)

    @endpoint("POST", "/deployments/<name>/load", **_ACCEPTED)
    async def load(self, name: str, by: str) -> DeploymentStatus:
        """Have the deployment in memory now, whatever its schedule."""
        return await self._fleet.load(name, by)

    @endpoint("POST", "/deployments/<name>/unload", **_ACCEPTED)
    async def unload(self, name: str, by: str) -> DeploymentStatus:
        """Free the deployment's memory after its running requests."""
        return await self._fleet.unload(name, by)

    @endpoint("POST", "/deployments/<name>/restart", **_ACCEPTED)
    async def restart(self, name: str, by: str) -> DeploymentStatus:
        """Restart the deployment's workers."""
        return await self._fleet.restart(name, by)

    @endpoint("POST", "/deployments/<name>/scale", body=ScaleBody, **_ACCEPTED)
    async def scale(
        self, name: str, replicas: int, max_replicas: int | None, by: str
    ) -> DeploymentStatus:
        """Run that many replicas of the deployment, or as many in a range as are needed."""
        return await self._fleet.scale(name, replicas, by, max_replicas)

    @endpoint("POST", "/deployments/<name>/canary", body=CanaryBody, **_ACCEPTED)
    async def canary(self, name: str, weight: int, by: str) -> DeploymentStatus:
        """Give the deployment's canary another share of the requests."""
        return await self._fleet.weigh(name, weight, by)

    @endpoint("POST", "/deployments/<name>/promote", **_ACCEPTED)
    async def promote(self, name: str, by: str) -> DeploymentStatus:
        """Let the deployment's canary take over from what it was tried beside."""
        return await self._fleet.promote(name, by)

    @endpoint("POST", "/deployments/<name>/rollback", body=RollbackBody, reply=Deployed, **_CONTROL)
    async def roll_back(self, name: str, generation: int | None, by: str) -> Deployed:
        """Go back to an earlier version of the deployment, or give up one that is on its way."""
        return Deployed(*await self._fleet.roll_back(name, generation, by))

    @endpoint("GET", "/deployments/<name>/memory", reply=Fit, **_CONTROL)
    async def memory(self, name: str) -> Fit:
        """Tell what each of the deployment's workers needs of memory, and what there is."""
        return await self._fleet.prospect.memory(name)

    # -- history ------------------------------------------------------------------------

    @endpoint("GET", "/deployments/<name>/workers", reply=Workers, **_CONTROL)
    def workers(self, name: str) -> Workers:
        """List the deployment's workers."""
        return Workers([*self._fleet.deployment(name).workers])

    @endpoint("GET", "/deployments/<name>/generations", reply=Generations, **_CONTROL)
    async def generations(self, name: str) -> Generations:
        """List the deployment's versions."""
        return Generations(await self._fleet.records.generations(name))

    @endpoint("GET", "/deployments/<name>/lives", query=LivesQuery, reply=Lives, **_CONTROL)
    async def lives(self, name: str, limit: int) -> Lives:
        """List the lives of the deployment's workers."""
        return Lives(await self._fleet.records.lives(name, limit))

    @endpoint("GET", "/deployments/<name>/crashes", query=CrashesQuery, reply=Crashes, **_CONTROL)
    async def crashes(self, name: str, limit: int) -> Crashes:
        """List the lives of the deployment's workers that ended unasked."""
        return Crashes(await self._fleet.records.crashes(name, limit))

    @endpoint("GET", "/deployments/<name>/crashes/<number>", reply=Dossier, **_CONTROL)
    async def crash(self, name: str, number: str) -> Dossier:
        """Show a crash with all its evidence."""
        found = identity(number)
        if found is None:
            raise CrashNotFound(
                f"{number[:50]!r} is no crash's id; `tursi crashes {name}` lists them."
            )
        return await self._fleet.records.crash(name, found)

    @endpoint("GET", "/deployments/<name>/why", reply=Story, **_CONTROL)
    async def why(self, name: str) -> Story:
        """Tell why the deployment is as it is."""
        return await self._fleet.records.why(name)

    @endpoint(
        "GET", "/deployments/<name>/logs", query=LogsQuery, reply=Lines, follow=str, **_CONTROL
    )
    async def logs(self, name: str, lines: int, follow: bool) -> Lines | Follow[str]:
        """Show what the deployment's workers have written."""
        if not follow:
            return Lines(await self._fleet.records.log_tail(name, lines))
        self._fleet.deployment(name)
        return Follow(
            subscribe=lambda callback: self._fleet.records.follow_log(name, callback),
            history=lambda: self._fleet.records.log_tail(name, lines),
            unseen=_beyond,
            encode=_line,
        )

    @endpoint(
        "GET", "/deployments/<name>/events", query=EventsQuery, reply=Events, follow=Event,
        **_CONTROL,
    )  # fmt: skip
    async def deployment_events(
        self,
        name: str,
        after: int,
        limit: int,
        follow: bool,
    ) -> Events | Follow[Event]:
        """List what has happened to the deployment."""
        self._fleet.deployment(name)
        return await self.events(after, limit, follow, name)

    @endpoint("GET", "/events", query=AllEventsQuery, reply=Events, follow=Event, **_CONTROL)
    async def events(
        self,
        after: int,
        limit: int,
        follow: bool,
        deployment: str | None,
    ) -> Events | Follow[Event]:
        """List what has happened."""
        if not follow:
            return Events(await self._fleet.records.events(deployment, after, limit))
        return Follow(
            subscribe=lambda callback: self._fleet.records.watch(deployment, callback),
            history=lambda: self._fleet.records.events(deployment, after, limit),
            unseen=_later,
            encode=_event,
        )


def _replicas(
    before: DeploymentStatus | None, least: int | None, most: int | None
) -> tuple[int, int | None]:
    """What a body says of their number, the rest as it was."""
    if least is None and before is not None:
        was = before.min_replicas or before.replicas
        return was, most if most is not None else before.max_replicas
    return least or 1, most


def _schedule(
    before: DeploymentStatus | None, load: Load | None, keep_alive: float | None
) -> Schedule | None:
    """What a body says of it, the rest as it was; ``None`` if it says nothing."""
    if load is None and keep_alive is None:
        return None
    was = Schedule(before.load, before.keep_alive) if before else Schedule()
    return Schedule(load or was.load, was.keep_alive if keep_alive is None else keep_alive)


def _beyond(history: Sequence[str], early: Sequence[str]) -> Sequence[str]:
    """Lines of ``early`` after those that ``history`` already ends with."""
    for length in range(min(len(history), len(early)), 0, -1):
        if history[-length:] == early[:length]:
            return early[length:]
    return early


def _line(text: str) -> bytes:
    return b"data: " + msgspec.json.encode(text) + b"\n\n"


def _later(history: Sequence[Event], early: Sequence[Event]) -> Sequence[Event]:
    last = history[-1].id if history else 0
    return [event for event in early if event.id > last]


def _event(event: Event) -> bytes:
    return b"id: %d\ndata: " % event.id + msgspec.json.encode(jsonable(event)) + b"\n\n"
