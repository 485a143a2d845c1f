"""The fleet: every deployment, brought and kept to what the store says is wanted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi import wire
from tursi.config import Configuration
from tursi.errors import (
    DeploymentNotFound,
    HubUnreachable,
    InternalError,
    InvalidRequest,
    ModelLoading,
    ModelNotFound,
    TursiError,
)
from tursi.fleet.member import Fetch, Member
from tursi.fleet.queue import Passage, RequestQueue, Work, shutting_down
from tursi.fleet.statistics import Statistics
from tursi.hub import Hub
from tursi.model import (
    CatalogueEntry,
    Deployment,
    DeploymentStatus,
    Desired,
    Event,
    Generation,
    LoadOrder,
    Minute,
    Phase,
    Progress,
    Reference,
    Request,
    Resolution,
    Task,
    WorkerLife,
    WorkerStatus,
    deployment_name,
)
from tursi.plan import Action, Admit, Create, Key, Resolve, Retire, decide
from tursi.store import Outcome, Store
from tursi.supervision.link import Sink
from tursi.supervision.worker import Observer, Worker

log = Logger()

MAX_REPLICAS = 64
STATISTICS_SECONDS = 5.0
PRUNE_SECONDS = 3600.0
_FETCH_RETRY_SECONDS = (5.0, 300.0)
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,2})?")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


class MakeWorker(Protocol):
    """Builds a replica; the service knows the monitor, the command and the folders."""

    def __call__(self, *, name: str, key: Key, order: LoadOrder, observer: Observer) -> Worker:
        """A worker that has not been started."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the daemon's health."""

    name: str
    healthy: bool
    message: str


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
        reactor: Any,
        now: Callable[[], float],
    ) -> None:
        self._store = store
        self._hub = hub
        self._make_worker = make_worker
        self._configuration = configuration
        self._reactor = reactor
        self._now = now
        self._members: dict[str, Member] = {}
        self._statistics = Statistics(now)
        self._watchers: list[tuple[str | None, Callable[[Event], None]]] = []
        self._phases: dict[str, Phase] = {}
        self._flushing = LoopingCall(self._flush)
        self._pruning = LoopingCall(self._prune)
        self._flushing.clock = self._pruning.clock = reactor
        self._converging: Any = None
        self._serial = 0
        self._closed: TursiError | None = ModelLoading("The daemon is starting.", retry_after=1)
        self._pending: set[Deferred[Any]] = set()

    # -- life ----------------------------------------------------------------------

    async def open(self) -> None:
        """Bring up what the store says should run."""
        for deployment in await self._store.deployments():
            self._members[deployment.name] = Member(deployment, self._queue)
        self._flushing.start(STATISTICS_SECONDS, now=False)
        self._pruning.start(PRUNE_SECONDS, now=True)
        self._closed = None
        self._soon()

    async def close(self) -> None:
        """Refuse new requests, drain and stop every worker, and store what is counted."""
        self._closed = shutting_down()
        if self._converging is not None:
            self._converging.cancel()
            self._converging = None
        stopping: list[Deferred[None]] = []
        for member in self._members.values():
            member.queue.close(shutting_down())
            if member.fetch is not None:
                member.fetch.cancel()
            stopping += [worker.stop() for worker in member.workers.values()]
        await DeferredList(stopping, consumeErrors=True)
        for loop in (self._flushing, self._pruning):
            if loop.running:
                loop.stop()
        await self._flush()
        await DeferredList(list(self._pending), consumeErrors=True)

    # -- inference --------------------------------------------------------------------

    def submit(self, model: str, work: Work, sink: Sink) -> Passage:
        """Hand a request to the deployment ``model`` names; raises what to answer instead."""
        if self._closed is not None:
            raise self._closed
        return self._find(model).queue.submit(work, sink)

    def find(self, model: str) -> str:
        """The deployment's name for its name or full reference; ``ModelNotFound``."""
        return self._find(model).deployment.name

    def models(self) -> list[DeploymentStatus]:
        """What clients may name as a model."""
        return self.deployments()

    def _find(self, model: str) -> Member:
        member = self._members.get(model)
        if member is not None and not member.leaving:
            return member
        for member in self._members.values():
            if member.deployment.generation.request.model == model and not member.leaving:
                return member
        raise ModelNotFound(
            f"The model {model[:200]!r} does not exist; GET /v1/models lists those that do.",
            param="model",
        )

    def _queue(self, member: Member) -> RequestQueue:
        name = member.deployment.name

        def finished(status: int, seconds: float, end: wire.End | None) -> None:
            self._statistics.count(name, status, seconds, end)

        return RequestQueue(
            clock=self._reactor,
            settings=self._configuration.requests,
            workers=member.serving,
            unavailable=member.unavailable,
            stage=member.stage,
            finished=finished,
        )

    # -- control ----------------------------------------------------------------------

    async def deploy(
        self, name: str | None, request: Request, replicas: int, by: str
    ) -> tuple[DeploymentStatus, str]:
        """Create the deployment, or change it to ``request``; says which it was."""
        self._check_open()
        reference = Reference.parse(request.model)
        checked = _checked(replace(request, model=str(reference)), replicas)
        chosen = deployment_name(name if name is not None else reference.short_name)
        deployment, outcome = await self._store.save(
            chosen, checked, replicas, by=by, at=self._now()
        )
        said = outcome.value
        member = self._adopt(deployment)
        if outcome in {Outcome.UNCHANGED, Outcome.STARTED} and self._retry(member):
            said = "retried" if outcome is Outcome.UNCHANGED else said
        self._soon()
        return member.status(), said

    async def remove(self, name: str, by: str) -> DeploymentStatus:
        """Delete the deployment; its workers drain in the background."""
        self._check_open()
        member = self._member(name)
        await self._store.delete(name, by=by, at=self._now())
        member.leaving = True
        member.queue.close()
        self._drop_fetch(member)
        status = member.status()
        self._forget(member)
        self._soon()
        return status

    async def start(self, name: str, by: str) -> DeploymentStatus:
        """Want it running, and try again where it had given up."""
        self._check_open()
        self._member(name)
        deployment = await self._store.set_desired(name, Desired.RUNNING, by=by, at=self._now())
        member = self._adopt(deployment)
        self._retry(member)
        self._soon()
        return member.status()

    async def stop(self, name: str, by: str) -> DeploymentStatus:
        """Want it stopped; its workers drain."""
        self._check_open()
        self._member(name)
        deployment = await self._store.set_desired(name, Desired.STOPPED, by=by, at=self._now())
        member = self._adopt(deployment)
        self._drop_fetch(member)
        member.queue.pump()
        self._soon()
        return member.status()

    async def restart(self, name: str, by: str) -> DeploymentStatus:
        """Drain its workers and start them again."""
        self._check_open()
        member = self._member(name)
        await self._record("restart", f"{by} restarts {name}", deployment=name, cause=by)
        self._retry(member)
        for worker in member.serving():
            worker.restart()
        return member.status()

    async def scale(self, name: str, replicas: int, by: str) -> DeploymentStatus:
        """Run that many replicas."""
        self._check_open()
        self._member(name)
        _check_replicas(replicas)
        deployment = await self._store.set_replicas(name, replicas, by=by, at=self._now())
        member = self._adopt(deployment)
        self._soon()
        return member.status()

    def deployment(self, name: str) -> DeploymentStatus:
        """How it is; ``DeploymentNotFound``."""
        found = self._members.get(name)
        if found is None:
            raise _not_found(name)
        return found.status()

    def deployments(self) -> list[DeploymentStatus]:
        """All of them, by name."""
        return [member.status() for _, member in sorted(self._members.items())]

    def worker_statuses(self, name: str) -> Sequence[WorkerStatus]:
        """Its replicas as they are now."""
        return self.deployment(name).workers

    async def generations(self, name: str) -> list[Generation]:
        """Its generations, oldest first."""
        self._member(name)
        return await self._store.generations(name)

    async def lives(self, name: str, limit: int) -> list[WorkerLife]:
        """Its latest worker lives, newest first."""
        self._member(name)
        return await self._store.lives(name, limit)

    async def events(self, deployment: str | None, after: int, limit: int) -> list[Event]:
        """The newest ``limit`` events after the id ``after``, oldest first."""
        return await self._store.events(deployment, after, limit)

    def watch(
        self, deployment: str | None, callback: Callable[[Event], None]
    ) -> Callable[[], None]:
        """Call back with each new event until the returned function is called."""
        entry = (deployment, callback)
        self._watchers.append(entry)
        return lambda: self._watchers.remove(entry) if entry in self._watchers else None

    async def statistics(self, name: str, minutes: int) -> list[Minute]:
        """Its last ``minutes`` minutes, those without a request left out."""
        self._member(name)
        await self._flush()
        return await self._store.minutes(name, int(self._now() // 60) - minutes + 1)

    async def catalogue(self) -> list[CatalogueEntry]:
        """The models on this machine's disk."""
        users: dict[str, list[str]] = {}
        for name, member in sorted(self._members.items()):
            resolution = member.deployment.generation.resolution
            if resolution is not None:
                users.setdefault(resolution.folder, []).append(name)
        entries = await self._hub.catalogue()
        known = {entry.folder for entry in entries}
        outside = [
            CatalogueEntry(Path(folder).name, folder, size=0)
            for folder in sorted(users)
            if folder not in known
        ]
        return [
            replace(entry, used_by=tuple(users.get(entry.folder, ())))
            for entry in (*entries, *outside)
        ]

    def health(self) -> tuple[str, list[Part]]:
        """``healthy`` or ``degraded``, and the health of each deployment."""
        parts = [
            Part(
                status.name,
                status.desired is Desired.STOPPED
                or status.phase not in {Phase.FAILED, Phase.QUARANTINED, Phase.WEDGED},
                f"{status.phase.value}, {status.ready} of {status.replicas} ready"
                + (f": {status.reason}" if status.reason else ""),
            )
            for status in self.deployments()
        ]
        return "healthy" if all(part.healthy for part in parts) else "degraded", parts

    def _member(self, name: str) -> Member:
        member = self._members.get(name)
        if member is None or member.leaving:
            raise _not_found(name)
        return member

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed

    def _adopt(self, deployment: Deployment) -> Member:
        """Take over what the store has just made durable."""
        member = self._members.get(deployment.name)
        if member is None:
            member = self._members[deployment.name] = Member(deployment, self._queue)
        elif member.leaving:
            # Removed a moment ago and wanted again: its old workers still retire.
            member.leaving = False
            member.queue = self._queue(member)
        if deployment.generation.number != member.deployment.generation.number:
            self._drop_fetch(member)
        member.deployment = deployment
        return member

    def _retry(self, member: Member) -> bool:
        """Try again what had given up; whether there was anything."""
        retried = False
        if member.fetch is not None and member.fetch.error is not None:
            self._drop_fetch(member)
            retried = True
        for worker in member.serving():
            if worker.phase in {Phase.FAILED, Phase.QUARANTINED, Phase.BACKOFF}:
                worker.reset()
                retried = True
        return retried

    # -- convergence --------------------------------------------------------------------

    def _soon(self) -> None:
        """Converge in the next turn, however many changes ask for it in this one."""
        if self._converging is None and self._closed is None:
            self._converging = self._reactor.callLater(0, self._converge)

    def _converge(self) -> None:
        self._converging = None
        wanted = [want for member in self._members.values() if (want := member.wanted())]
        seen = [worker for member in self._members.values() for worker in member.seen()]
        for action in decide(wanted, seen):
            try:
                self._act(action)
            except Exception:  # noqa: BLE001 - one deployment's defect must not hold up the others
                log.failure("could not {action}", action=action)

    def _act(self, action: Action) -> None:
        match action:
            case Resolve(deployment, generation):
                self._resolve(self._members[deployment], generation)
            case Create(key):
                self._create(self._members[key.deployment], key)
            case Admit(key):
                self._members[key.deployment].workers[key].admit()
            case Retire(key):
                self._retire(self._members[key.deployment], key)

    def _create(self, member: Member, key: Key) -> None:
        generation = member.deployment.generation
        resolution = generation.resolution
        if resolution is None:
            raise InternalError(f"{key} is to be created before its files are known")
        request = generation.request
        settings = self._configuration.workers
        order = LoadOrder(
            deployment=key.deployment,
            folder=resolution.folder,
            task=request.task,
            device=request.device,
            dtype=request.dtype,
            threads=settings.threads,
            max_batch_tokens=settings.max_batch_tokens,
            max_sequences=settings.max_sequences,
        )
        self._serial += 1
        name = f"{key.deployment}.{key.generation}.{key.replica}#{self._serial}"
        worker = self._make_worker(name=name, key=key, order=order, observer=self)
        member.workers[key] = worker
        worker.start()

    def _retire(self, member: Member, key: Key) -> None:
        member.retiring.add(key)
        worker = member.workers[key]

        def gone(outcome: object) -> None:
            if isinstance(outcome, Failure):
                log.failure("stopping {worker} failed", outcome, worker=worker.name)
            member.workers.pop(key, None)
            member.retiring.discard(key)
            self._phases.pop(worker.name, None)
            self._forget(member)
            self._soon()

        worker.stop().addBoth(gone)

    def _forget(self, member: Member) -> None:
        """Drop a removed deployment once its last worker has gone."""
        if member.leaving and not member.workers:
            self._members.pop(member.deployment.name, None)

    # -- files -----------------------------------------------------------------------------

    def _resolve(self, member: Member, generation: int) -> None:
        fetch = member.fetch
        if fetch is None:
            fetch = member.fetch = Fetch(generation)
        elif fetch.running is not None or fetch.error is not None:
            return
        reference = Reference.parse(member.deployment.generation.request.model)

        def advanced(progress: Progress) -> None:
            fetch.progress = progress

        fetch.running = self._hub.resolve(reference, advanced).addCallbacks(
            lambda resolution: self._resolved(member, fetch, resolution),
            lambda failure: self._unresolved(member, fetch, failure),
        )

    def _resolved(self, member: Member, fetch: Fetch, resolution: Resolution) -> None:
        fetch.running = None
        if member.fetch is fetch:
            member.fetch = None
            self._learn(member, resolution)
            self._soon()

    def _learn(self, member: Member, resolution: Resolution) -> None:
        """Remember, also in the store, what the current generation means."""
        deployment = member.deployment
        number = deployment.generation.number
        member.deployment = replace(
            deployment, generation=replace(deployment.generation, resolution=resolution)
        )
        self._hold(self._store.resolve(deployment.name, number, resolution, at=self._now()))

    def _unresolved(self, member: Member, fetch: Fetch, failure: Failure) -> None:
        fetch.running = None
        if failure.check(CancelledError) or member.fetch is not fetch:
            return
        error = failure.value
        if not isinstance(error, TursiError):
            log.failure("finding the files of {name} failed", failure, name=member.deployment.name)
            error = InternalError(f"Finding the model's files failed: {error}")
        name = member.deployment.name
        fetch.error = error
        message = f"{name} can't be fetched: {error.message}"
        if isinstance(error, HubUnreachable):
            first, most = _FETCH_RETRY_SECONDS
            delay = min(most, first * 2**fetch.attempts)
            fetch.attempts += 1
            fetch.retry_at = self._now() + delay
            message += f" The next try is in {delay:.0f} s."
            self._reactor.callLater(delay, self._fetch_again, member, fetch)
        self._note("fetch.failed", message, deployment=name, cause=error.message)
        member.queue.pump()

    def _fetch_again(self, member: Member, fetch: Fetch) -> None:
        if member.fetch is fetch and self._closed is None:
            fetch.error = fetch.retry_at = None
            self._soon()

    def _drop_fetch(self, member: Member) -> None:
        fetch, member.fetch = member.fetch, None
        if fetch is not None:
            fetch.cancel()

    # -- what the workers tell --------------------------------------------------------------

    def changed(self, worker: Worker, cause: str) -> None:
        """Note a worker's new phase, and act on it (``supervision.worker.Observer``)."""
        member = self._members.get(worker.deployment)
        if member is None:
            return
        phase = worker.phase
        if self._phases.get(worker.name) is not phase:
            self._phases[worker.name] = phase
            self._note(
                f"worker.{phase.value}",
                f"replica {worker.replica} of {worker.deployment} is {phase.value}: {cause}",
                deployment=worker.deployment,
                worker=worker.status().uuid,
                cause=cause,
            )
            if phase is Phase.READY:
                self._ready(member, worker)
            self._soon()
        member.queue.pump()

    def _ready(self, member: Member, worker: Worker) -> None:
        generation, loaded = member.deployment.generation, worker.loaded
        if loaded is None or generation.resolution is None:
            return
        known = replace(
            generation.resolution, task=loaded.task, dtype=loaded.dtype, device=loaded.device
        )
        if worker.generation == generation.number and known != generation.resolution:
            self._learn(member, known)

    def life(self, life: WorkerLife) -> None:
        """Keep a worker life's record (``supervision.worker.Observer``)."""
        self._hold(self._store.put_life(life))

    # -- the store ----------------------------------------------------------------------------

    def _note(
        self,
        kind: str,
        message: str,
        *,
        deployment: str | None = None,
        worker: str | None = None,
        cause: str | None = None,
    ) -> None:
        self._hold(
            Deferred.fromCoroutine(
                self._record(kind, message, deployment=deployment, worker=worker, cause=cause)
            )
        )

    async def _record(
        self,
        kind: str,
        message: str,
        *,
        deployment: str | None = None,
        worker: str | None = None,
        cause: str | None = None,
    ) -> None:
        event = await self._store.record(
            self._now(), kind, message, deployment=deployment, worker=worker, cause=cause
        )
        for wanted, callback in list(self._watchers):
            if wanted is None or wanted == event.deployment:
                callback(event)

    async def _flush(self) -> None:
        minutes = self._statistics.take()
        if not minutes:
            return
        try:
            await self._store.add_minutes(minutes)
        except TursiError as error:
            log.warn("statistics wait for the database: {message}", message=error.message)
            self._statistics.put_back(minutes)

    async def _prune(self) -> None:
        try:
            await self._store.prune(self._configuration.storage, at=self._now())
        except TursiError as error:
            log.warn("pruning waits for the database: {message}", message=error.message)

    def _hold(self, deferred: Deferred[Any]) -> None:
        """Let a write go on by itself, but not past ``stop`` and not unheard."""
        self._pending.add(deferred)

        def done(outcome: object) -> None:
            self._pending.discard(deferred)
            if isinstance(outcome, Failure):
                log.error("the database refused a note: {error}", error=outcome.value)

        deferred.addBoth(done)


def _checked(request: Request, replicas: int) -> Request:
    """``request`` with its words normalised; ``InvalidRequest`` names what is wrong."""
    _check_replicas(replicas)
    if not _DEVICE.fullmatch(request.device):
        raise InvalidRequest(
            f"The device {request.device[:50]!r} is unknown; use auto, cpu, mps, cuda or cuda:N.",
            param="device",
        )
    if request.dtype not in _DTYPES:
        raise InvalidRequest(
            f"The dtype {request.dtype[:50]!r} is unknown; use one of {', '.join(_DTYPES)}.",
            param="dtype",
        )
    task = Task.parse(request.task).value if request.task is not None else None
    return replace(request, task=task)


def _check_replicas(replicas: int) -> None:
    if not 1 <= replicas <= MAX_REPLICAS:
        raise InvalidRequest(f"A deployment has 1 to {MAX_REPLICAS} replicas.", param="replicas")


def _not_found(name: str) -> DeploymentNotFound:
    return DeploymentNotFound(f"There is no deployment {name[:100]!r}; `tursi ps` lists them.")
