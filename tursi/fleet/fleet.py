"""The fleet: every deployment, brought and kept to what the store says is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import random
from typing import Any

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from tursi.config import Configuration
from tursi.errors import (
    DeploymentNotFound,
    DeploymentUnavailable,
    InvalidRequest,
    ModelNotFound,
    StartingUp,
    TursiError,
)
from tursi.fleet.archives import Archives
from tursi.fleet.autoscale import TICK_SECONDS, Autoscale
from tursi.fleet.catalogue import Catalogue
from tursi.fleet.convergence import RESET, Convergence, MakeWorker
from tursi.fleet.crashes import Crashes
from tursi.fleet.footprints import Footprints
from tursi.fleet.journal import Journal
from tursi.fleet.ledger import Ledger
from tursi.fleet.logs import Logs
from tursi.fleet.measuring import Measuring
from tursi.fleet.member import Member
from tursi.fleet.memory import Memory
from tursi.fleet.outlook import Outlook
from tursi.fleet.passage import Passage, Work
from tursi.fleet.prospect import Prospect
from tursi.fleet.pulls import Pulls
from tursi.fleet.queue import RequestQueue, shutting_down
from tursi.fleet.records import Records
from tursi.fleet.residence import Residence
from tursi.fleet.routing import Routing
from tursi.hub import Hub
from tursi.model import (
    Caller,
    Deployment,
    DeploymentStatus,
    Desired,
    Footprint,
    Gpu,
    Host,
    Load,
    LoadOrder,
    Phase,
    Reference,
    Request,
    Resolution,
    Schedule,
    check_replicas,
    check_weight,
    deployment_name,
)
from tursi.rollup import Observation
from tursi.store import Outcome, Store
from tursi.supervision.link import Sink

log = Logger()

MEASURE_SECONDS = 5.0
PRUNE_SECONDS = 3600.0
CLIENT_ERROR, SERVER_ERROR = 400, 500
"""The least statuses of their kind."""
REMEMBERED_LIVES = 100
"""Of each deployment, when a daemon begins; more failures than these make no difference."""
REMEMBERED_EVENTS = 1000


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the daemon's health."""

    name: str
    healthy: bool
    message: str
    kind: str = "deployment"
    """``deployment``, ``starts``, ``device``, or of the daemon: database, loop, disk, drops."""


class Fleet:
    """Owns what runs; every change is durable in the store before it is answered.

    ``now`` gives UTC epoch seconds, ``reactor`` monotonic timers.
    """

    def __init__(
        self,
        *,
        store: Store,
        hub: Hub,
        make_worker: MakeWorker,
        configuration: Configuration,
        logs: Path,
        reactor: Any,
        now: Callable[[], float],
        available: Callable[[], int | None],
        host: Host = Host(),  # noqa: B008 - a frozen value
        gpus: Callable[[], Sequence[Gpu]] = tuple,
        random: Callable[[], float] = random,
    ) -> None:
        self._store = store
        self._hub = hub
        self._configuration = configuration
        self._reactor = reactor
        self._now = now
        self._host = host
        self._random = random
        self._members: dict[str, Member] = {}
        self._ledger = Ledger(store=store, look=self.deployments, now=now, reactor=reactor)
        self._journal = Journal(store, now, reactor)
        self._crashes = Crashes(store, self._journal, configuration.storage.crashes)
        self._logs = Logs(logs, configuration.workers.log_lives)
        self.pulls = Pulls(store=store, hub=hub, journal=self._journal, reactor=reactor, now=now)
        self.archives = Archives(
            members=self._members,
            hub=hub,
            journal=self._journal,
            deploy=self.deploy,
            host=host,
            now=now,
        )
        self.catalogue = Catalogue(
            members=self._members,
            hub=hub,
            pulls=self.pulls,
            archives=self.archives,
            footprint=self._needs,
            journal=self._journal,
            limit=configuration.hub.cache_bytes,
        )
        self._footprints = Footprints(store=store, hub=hub, now=now, soon=self.look)
        self._memory = Memory(
            members=self._members,
            footprints=self._footprints,
            settings=configuration.memory,
            host=host,
            available=available,
            gpus=gpus,
            suspects=lambda: self._convergence.devices.suspects,
            orders=self._orders,
            clock=_clock(reactor),
        )
        self._residence = Residence(self._members, self._memory, _clock(reactor))
        self.prospect = Prospect(
            member=self._member,
            members=self._members,
            memory=self._memory,
            residence=self._residence,
            footprints=self._footprints,
            hub=hub,
            pulls=self.pulls,
            order=lambda *wish: self._convergence.order(*wish),  # noqa: PLW0108 - it is made later
            gpus=gpus,
            host=host,
            clock=_clock(reactor),
        )
        self._measuring = Measuring(members=self._members, footprints=self._footprints, gpus=gpus)
        self._convergence = Convergence(
            members=self._members,
            journal=self._journal,
            crashes=self._crashes,
            logs=self._logs,
            store=store,
            hub=hub,
            make_worker=make_worker,
            settings=configuration.workers,
            host=host,
            memory=self._memory,
            prospect=self.prospect,
            residence=self._residence,
            measuring=self._measuring,
            reactor=reactor,
            now=now,
        )
        self.records = Records(
            member=self._member,
            members=self._members,
            store=store,
            journal=self._journal,
            crashes=self._crashes,
            ledger=self._ledger,
            logs=self._logs,
            devices=self._convergence.devices,
            governor=self._convergence.governor,
            residence=self._residence,
            workers=lambda: self._configuration.workers,
            now=now,
        )
        self._outlook = Outlook(
            members=self._members,
            residence=self._residence,
            governor=self._convergence.governor,
            clock=_clock(reactor),
            now=now,
        )
        self._autoscale = Autoscale(
            members=self._members,
            memory=self._memory,
            journal=self._journal,
            host=host,
            target=configuration.requests.scale_wait_seconds,
            clock=lambda: float(reactor.seconds()),
            soon=self._convergence.soon,
        )
        self._measurement = LoopingCall(self._measure)
        self._pruning = LoopingCall(self._prune_soon)
        self._scaling = LoopingCall(self._autoscale.tick)
        for loop in (self._measurement, self._pruning, self._scaling):
            loop.clock = reactor
        self._opened = False
        self._closed: TursiError | None = StartingUp(retry_after=1)

    # -- life ----------------------------------------------------------------------

    async def open(self) -> None:
        """Bring up what the store says should run."""
        await self._crashes.open()
        await self._footprints.open()
        for deployment in await self._store.deployments():
            self._members[deployment.name] = self._made(deployment)
            await self._remember(deployment.name)
        held = [member.deployment for member in self._members.values()]
        for at, device in await self._crashes.lost_contexts(held):
            self._convergence.devices.lost(device, max(0.0, self._now() - at))
        self._ledger.start()
        self._measurement.start(MEASURE_SECONDS, now=False)
        self._pruning.start(PRUNE_SECONDS, now=True)
        self._scaling.start(TICK_SECONDS, now=False)
        await self.pulls.open()
        self._opened, self._closed = True, None
        self._convergence.soon()

    async def _remember(self, name: str) -> None:
        """How its workers have failed since somebody last had that forgotten."""
        events = await self._store.events(name, 0, REMEMBERED_EVENTS)
        since = max((event.at for event in events if event.kind == RESET), default=0.0)
        lives = await self._store.lives(name, REMEMBERED_LIVES)
        self._convergence.remember([life for life in reversed(lives) if life.spawned_at > since])
        for life in reversed(lives):
            self._members[name].learn(life)

    async def close(self) -> None:
        """Refuse new requests, drain and stop every worker, and store what is counted."""
        self._closed = shutting_down()
        self.pulls.close()
        self.archives.close()
        for member in self._members.values():
            member.queue.close(shutting_down())
        await DeferredList(self._convergence.close(), consumeErrors=True)
        for loop in (self._measurement, self._pruning, self._scaling):
            if loop.running:
                loop.stop()
        await self._footprints.write()
        await self._ledger.stop()
        await self._journal.close()

    def configure(self, configuration: Configuration) -> list[str]:
        """Go by this from now on; the deployments whose workers are replaced for it."""
        self._configuration = configuration
        self._crashes.keep(configuration.storage.crashes)
        self._memory.configure(configuration.memory)
        self._autoscale.configure(configuration.requests.scale_wait_seconds)
        self.catalogue.configure(configuration.hub.cache_bytes)
        self._logs.keep(configuration.workers.log_lives)
        for member in self._members.values():
            member.queue.configure(configuration.requests)
        return self._convergence.configure(configuration.workers, configuration.requests)

    def look(self) -> None:
        """See whether what has changed on this machine lets anything be loaded."""
        self._convergence.soon()

    def hurry(self) -> None:
        """Don't wait any more for what is in flight."""
        self._convergence.hurry()

    def describe(self) -> list[str]:
        """How every deployment and worker is, in lines."""
        return [line for _, member in sorted(self._members.items()) for line in member.describe()]

    def _needs(self, member: Member) -> Footprint | None:
        return self._memory.of(member)

    # -- inference --------------------------------------------------------------------

    def submit(self, model: str, work: Work, sink: Sink) -> Passage:
        """Hand a request to the deployment ``model`` names; raises what to answer instead."""
        if self._closed is not None:
            raise self._closed.with_traceback(None)
        member = self._find(model)
        if member.deployment.schedule.load is not Load.ON_DEMAND:
            return member.queue.submit(work, sink)
        self._use(member, work.caller)
        passage = member.queue.submit(work, sink)
        if work.keep_alive is not None:
            member.keep_alive = work.keep_alive
        return passage

    def _use(self, member: Member, caller: Caller) -> None:
        """Note that it is used, and have it loaded if it isn't."""
        now = self._reactor.seconds()
        member.used_at = now
        member.uses.add(now)
        if not member.awake and member.deployment.desired is Desired.RUNNING:
            member.wake(now, demanded=True)
            name = member.deployment.name
            cause = f"a request of {caller}"
            self._journal.note("load", f"{name} is loaded", deployment=name, cause=cause)
            self._convergence.soon()

    def count(self, seen: Observation) -> None:
        """Count a request, the refused ones too."""
        member = self._members.get(seen.deployment)
        if member is not None and seen.generation:
            # A stream that breaks has begun well, and what clients do wrong is theirs.
            broken = bool(seen.code) and seen.status < CLIENT_ERROR
            failed = broken or seen.status >= SERVER_ERROR
            member.routing.count(seen.generation, seen.seconds, failed=failed)
            self._autoscale.count(seen.deployment, seen.waited + seen.usage.queue_seconds)
        self._ledger.count(seen)

    def find(self, model: str) -> str:
        """The deployment's name for its name or full reference; ``ModelNotFound``."""
        return self._find(model).deployment.name

    def _find(self, model: str) -> Member:
        self._check_opened()
        member = self._members.get(model)
        if member is not None and not member.leaving:
            return member
        for member in self._members.values():
            wanted, stable = member.deployment.generation, member.deployment.stable
            found = wanted.request.model == model or (
                stable is not None and stable.request.model == model
            )
            if found and not member.leaving:
                return member
        raise ModelNotFound(
            f"The model {model[:200]!r} does not exist; GET /v1/models lists those that do.",
            param="model",
        )

    def _queue(self, member: Member) -> RequestQueue:
        name = member.deployment.name

        def finished() -> None:
            if member.finished:
                self._convergence.soon()
            if member.deployment.schedule.load is Load.ON_DEMAND:
                member.used_at = self._reactor.seconds()
                self._convergence.used(member)

        def poisoned(request_id: str) -> None:
            self._journal.note(
                "request.refused",
                f"request {request_id} is refused for an hour",
                deployment=name,
                cause="two workers ended while they held it",
            )

        def stage() -> str:
            said, trouble = member.stage(), self._convergence.governor.trouble
            if trouble is None or said != Phase.QUEUED.value:
                return said
            return f"{said}: {trouble.rstrip('.')}"

        return RequestQueue(
            name=name,
            clock=self._reactor,
            settings=self._configuration.requests,
            workers=member.takers,
            routing=member.routing,
            unavailable=member.unavailable,
            stage=stage,
            outlook=lambda position: self._outlook.of(member, position),
            crash=lambda: member.crash,
            finished=finished,
            poisoned=poisoned,
        )

    # -- control ----------------------------------------------------------------------

    async def deploy(
        self,
        name: str | None,
        request: Request,
        replicas: int | None,
        by: str,
        schedule: Schedule | None = None,
        max_replicas: int | None = None,
        canary: int | None = None,
        imported: Resolution | None = None,
    ) -> tuple[DeploymentStatus, str]:
        """Create the deployment, or change it to ``request``; says which it was.

        Without ``replicas`` an existing deployment keeps its number, and without
        ``schedule`` when it is loaded. A new one is loaded at once, to see whether it can be.
        With ``canary`` what is new gets so many percent of the requests, and no more.
        ``imported`` is what the request means where its files came in an archive.
        """
        self._check_open()
        checked = request.checked(self._host)
        if name is None:
            name = Reference.parse(checked.model).short_name
        name = deployment_name(name)
        if replicas is None:
            member = self._members.get(name)
            replicas = member.deployment.replicas if member and not member.leaving else 1
        check_replicas(replicas, max_replicas)
        if canary is not None:
            check_weight(canary)
        deployment, outcome = await self._store.save(
            name,
            checked,
            replicas,
            by=by,
            at=self._now(),
            schedule=schedule,
            max_replicas=max_replicas,
            canary=canary,
            imported=imported,
        )
        return await self._changed(deployment, outcome)

    async def roll_back(
        self, name: str, number: int | None, by: str
    ) -> tuple[DeploymentStatus, str]:
        """Go back to an earlier generation, as a new one; ``None``: the last other one."""
        self._check_open()
        self._member(name)
        deployment, outcome = await self._store.roll_back(name, number, by=by, at=self._now())
        return await self._changed(deployment, outcome)

    async def _changed(
        self, deployment: Deployment, outcome: Outcome
    ) -> tuple[DeploymentStatus, str]:
        """Act on what the store has made durable; says what came of it."""
        said = outcome.value
        known = self._members.get(deployment.name)
        given_up = known is not None and known.deployment.failed
        member = self._adopt(deployment)
        if outcome is Outcome.UNCHANGED and given_up and not deployment.failed:
            said = "retried"
        if outcome in {Outcome.UNCHANGED, Outcome.STARTED} and self._convergence.retry(member):
            said = "retried" if outcome is Outcome.UNCHANGED else said
        self._convergence.soon()
        await self._keep(member, loaded=member.awake)
        return member.status(), said

    async def remove(self, name: str, by: str) -> DeploymentStatus:
        """Delete the deployment; its workers drain in the background."""
        self._check_open()
        member = self._member(name)
        await self._store.delete(name, by=by, at=self._now())
        member.leaving = True
        member.queue.close()
        member.drop_fetch()
        status = member.status()
        self._convergence.forget(member)
        self._convergence.soon()
        return status

    async def start(self, name: str, by: str) -> DeploymentStatus:
        """Want it running, and try again where it had given up."""
        self._check_open()
        self._member(name)
        deployment = await self._store.set_desired(name, Desired.RUNNING, by=by, at=self._now())
        member = self._adopt(deployment)
        self._convergence.retry(member)
        self._convergence.soon()
        await self._keep(member, loaded=member.awake)
        return member.status()

    async def stop(self, name: str, by: str) -> DeploymentStatus:
        """Want it stopped; its workers drain."""
        self._check_open()
        self._member(name)
        deployment = await self._store.set_desired(name, Desired.STOPPED, by=by, at=self._now())
        member = self._adopt(deployment)
        member.drop_fetch()
        member.queue.pump()
        self._convergence.soon()
        return member.status()

    async def load(self, name: str, by: str) -> DeploymentStatus:
        """Have it in memory, whatever its schedule; ``DeploymentUnavailable`` if it is stopped."""
        self._check_open()
        member = self._member(name)
        if member.deployment.desired is Desired.STOPPED:
            raise DeploymentUnavailable(
                f"The deployment {name} is stopped; `tursi up` starts it again."
            )
        await self._keep(member, loaded=True)
        if not member.awake:
            self._journal.note("load", f"{by} loads {name}", deployment=name, cause=by)
        member.wake(self._reactor.seconds())
        member.used_at = self._reactor.seconds()
        self._convergence.soon()
        return member.status()

    async def unload(self, name: str, by: str) -> DeploymentStatus:
        """Free its memory, unless it is to be there always (``InvalidRequest``)."""
        self._check_open()
        member = self._member(name)
        if member.deployment.schedule.load is Load.ALWAYS:
            raise InvalidRequest(
                f"{name} is to be loaded always; change that with `tursi up --load on_demand`."
            )
        await self._keep(member, loaded=False)
        self._convergence.unload(member, by)
        return member.status()

    async def _keep(self, member: Member, *, loaded: bool) -> None:
        """Have the next daemon know whether it is in memory, where nothing else decides that."""
        deployment = member.deployment
        if deployment.schedule.load is Load.MANUAL and deployment.loaded is not loaded:
            member.adopt(await self._store.set_loaded(deployment.name, loaded))

    async def restart(self, name: str, by: str) -> DeploymentStatus:
        """Drain its workers and start them again."""
        self._check_open()
        member = self._member(name)
        self._journal.note("restart", f"{by} restarts {name}", deployment=name, cause=by)
        self._convergence.retry(member)
        # It comes back whether or not requests wait for it.
        member.demanded = False
        for worker in member.serving():
            worker.restart()
        self._convergence.soon()
        return member.status()

    async def scale(
        self, name: str, replicas: int, by: str, max_replicas: int | None = None
    ) -> DeploymentStatus:
        """Run that many replicas, or as many up to ``max_replicas`` as are needed."""
        self._check_open()
        self._member(name)
        check_replicas(replicas, max_replicas)
        at = self._now()
        return await self._act_on(
            await self._store.set_replicas(name, replicas, max_replicas, by=by, at=at)
        )

    async def weigh(self, name: str, weight: int, by: str) -> DeploymentStatus:
        """Give the canary that share of the requests, in percent; ``NoCanary``."""
        self._check_open()
        self._member(name)
        check_weight(weight)
        deployment = await self._store.set_canary(name, weight, by=by, at=self._now())
        return await self._act_on(deployment)

    async def promote(self, name: str, by: str) -> DeploymentStatus:
        """Let the canary take over once it is ready; ``NoCanary``."""
        self._check_open()
        self._member(name)
        deployment = await self._store.promote(name, by=by, at=self._now())
        # Like anything new it is loaded once, to see whether it can be.
        self._member(name).wake(self._reactor.seconds())
        return await self._act_on(deployment)

    async def _act_on(self, deployment: Deployment) -> DeploymentStatus:
        member = self._adopt(deployment)
        self._convergence.soon()
        await self._keep(member, loaded=member.awake)
        return member.status()

    @property
    def busy(self) -> bool:
        """Whether any request waits or is with a worker."""
        return any(member.busy for member in self._members.values())

    def deployment(self, name: str) -> DeploymentStatus:
        """How it is; ``DeploymentNotFound``."""
        self._check_opened()
        found = self._members.get(name)
        if found is None:
            raise _not_found(name)
        return self._measuring.shown(found.status())

    def deployments(self) -> list[DeploymentStatus]:
        """All of them, by name."""
        self._check_opened()
        shown = self._measuring.shown
        return [shown(member.status()) for _, member in sorted(self._members.items())]

    def health(self) -> tuple[str, list[Part]]:
        """``healthy`` or ``degraded``, and the health of each deployment."""
        parts = [
            Part(
                status.name,
                status.desired is Desired.STOPPED
                or status.phase not in {Phase.FAILED, Phase.QUARANTINED, Phase.WEDGED},
                member.health(),
            )
            for member, status in self._statuses()
        ]
        trouble = self._convergence.governor.trouble
        if trouble is not None:
            parts.append(Part("starts", healthy=False, message=trouble, kind="starts"))
        for device, sentence in self._convergence.devices.suspects.items():
            parts.append(Part(device, healthy=False, message=sentence, kind="device"))
        return "healthy" if all(part.healthy for part in parts) else "degraded", parts

    def _statuses(self) -> list[tuple[Member, DeploymentStatus]]:
        self._check_opened()
        return [(member, member.status()) for _, member in sorted(self._members.items())]

    def _member(self, name: str) -> Member:
        self._check_opened()
        member = self._members.get(name)
        if member is None or member.leaving:
            raise _not_found(name)
        return member

    def _check_opened(self) -> None:
        """Before it has been read what there is, nothing can be said of anything."""
        if not self._opened:
            raise StartingUp(retry_after=1)

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed.with_traceback(None)

    def _adopt(self, deployment: Deployment) -> Member:
        """Take over what the store has just made durable."""
        member = self._members.get(deployment.name)
        if member is None:
            member = self._members[deployment.name] = self._made(deployment)
            member.wake(self._reactor.seconds())
        elif member.leaving:
            # Removed a moment ago and wanted again: its old workers still retire.
            member.leaving = False
            member.queue = self._queue(member)
        if deployment.generation.number != member.deployment.generation.number:
            member.drop_fetch()
            member.lost = False
            member.queue.forgive()
            member.load_seconds = None
            member.wake(self._reactor.seconds())
        started = member.deployment.desired is not deployment.desired
        if deployment.schedule.load is Load.ALWAYS or started:
            member.wake(self._reactor.seconds())
        member.adopt(deployment)
        return member

    def _made(self, deployment: Deployment) -> Member:
        return Member(deployment, Routing(deployment, self._random), self._queue)

    def _orders(self, member: Member) -> LoadOrder | None:
        return self._convergence.orders(member)

    def _measure(self) -> Deferred[None]:
        self._measuring.sample()
        return Deferred.fromCoroutine(self._footprints.write())

    def _prune_soon(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._prune())

    async def _prune(self) -> None:
        try:
            await self._store.prune(self._configuration.storage, at=self._now())
        except TursiError as error:
            log.warn("pruning waits for the database: {message}", message=error.message)
        await self.catalogue.collect(self._now())


def _clock(reactor: Any) -> Callable[[], float]:
    # Looked up each time: the service replaces it before anything runs.
    return lambda: float(reactor.seconds())


def _not_found(name: str) -> DeploymentNotFound:
    return DeploymentNotFound(f"There is no deployment {name[:100]!r}; `tursi ps` lists them.")
