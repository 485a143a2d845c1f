"""Bringing what runs to what is wanted: the plan's actions, carried out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi.admission import Free
from tursi.config import Requests, Workers
from tursi.errors import InternalError
from tursi.fleet.crashes import Crashes
from tursi.fleet.devices import Devices
from tursi.fleet.files import Files
from tursi.fleet.governor import Governor
from tursi.fleet.journal import Journal
from tursi.fleet.logs import Logs
from tursi.fleet.measuring import Measuring
from tursi.fleet.member import Member
from tursi.fleet.memory import Memory
from tursi.fleet.prospect import Prospect
from tursi.fleet.residence import Residence
from tursi.fleet.rollout import Rollouts
from tursi.hub import Hub
from tursi.model import (
    Dossier,
    FailureClass,
    Host,
    Limits,
    LoadOrder,
    Phase,
    Request,
    Resolution,
    Verdict,
    WorkerLife,
)
from tursi.plan import LOAD_SLOTS, Action, Admit, Create, Keep, Key, Resolve, Retire, decide
from tursi.store import Store
from tursi.supervision.worker import Observer, Worker

log = Logger()

_RUNNING = frozenset({Phase.LOADING, Phase.WARMING, Phase.READY, Phase.SUSPECT, Phase.DRAINING})

_ABLE = frozenset({Phase.READY, Phase.SUSPECT})
"""The phases in which a worker can finish what it is at."""

_NO_STORM = frozenset(
    {
        None,
        FailureClass.CONFIGURATION,
        FailureClass.WEIGHTS,
        FailureClass.NOT_FOUND,
        FailureClass.REFUSED,
    }
)
"""Failures that are certainly a model's own: others needn't wait for them."""

_SHORT = frozenset({FailureClass.RESOURCE, FailureClass.OUT_OF_MEMORY})
"""Failures of loads for want of memory."""

RESET = "worker.reset"
"""The kind of the event that a worker's failures were forgotten."""


class MakeWorker(Protocol):
    """Builds a replica; the service knows the monitor, the command and the folders."""

    def __call__(
        self,
        *,
        name: str,
        key: Key,
        order: LoadOrder,
        limits: Limits,
        observer: Observer,
        place: Callable[[str], str],
    ) -> Worker:
        """A worker that has not been started."""
        ...


class Convergence:
    """Owns the workers of all members.

    It is the observer of every worker; ``now`` gives UTC epoch seconds.
    """

    def __init__(
        self,
        *,
        members: dict[str, Member],
        journal: Journal,
        crashes: Crashes,
        logs: Logs,
        store: Store,
        hub: Hub,
        make_worker: MakeWorker,
        settings: Workers,
        host: Host,
        memory: Memory,
        prospect: Prospect,
        residence: Residence,
        measuring: Measuring,
        reactor: Any,
        now: Callable[[], float],
    ) -> None:
        self._members = members
        self._journal = journal
        self._crashes = crashes
        self._logs = logs
        self._hub = hub
        self._make_worker = make_worker
        self._settings = settings
        self._host = host
        self._memory = memory
        self._prospect = prospect
        self._residence = residence
        self._measuring = measuring
        self._overcommitted = False
        self._reactor = reactor
        self._now = now
        self._files = Files(
            store=store, hub=hub, journal=journal, reactor=reactor, now=now, soon=self.soon
        )
        self._rollouts = Rollouts(
            store=store,
            journal=journal,
            reactor=reactor,
            now=now,
            smoke_seconds=lambda: self._settings.warm_seconds,
            soon=self.soon,
        )
        self.governor = Governor(reactor.seconds)
        self.devices = Devices(reactor.seconds, host.gpus)
        self._resuming: Any = None
        self._looking: Any = None
        self._contested = False
        """Whether anything waited for memory when that was last looked at."""
        self._refused = False
        """Whether it has been told that the system refuses processes."""
        self._past: dict[Key, list[WorkerLife]] = {}
        self._phases: dict[str, Phase] = {}
        self._lives: set[str] = set()
        self._scheduled: Any = None
        self._serial = 0
        self._open = True

    def remember(self, lives: Sequence[WorkerLife]) -> None:
        """What became of workers under an earlier daemon, oldest first."""
        for life in lives:
            key = Key(life.deployment, life.generation, life.replica)
            self._past.setdefault(key, []).append(life)

    def soon(self) -> None:
        """Converge in the next turn, however many changes ask for it in this one."""
        if self._scheduled is None and self._open:
            self._scheduled = self._reactor.callLater(0, self._converge)

    def close(self) -> list[Deferred[None]]:
        """Start nothing any more, and stop every worker."""
        self._open = False
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        for timer in (self._resuming, self._looking):
            if timer is not None and timer.active():
                timer.cancel()
        self._rollouts.close()
        stopping: list[Deferred[None]] = []
        for member in self._members.values():
            member.drop_fetch()
            stopping += [worker.stop() for worker in member.workers.values()]
        return stopping

    def configure(self, settings: Workers, requests: Requests) -> list[str]:
        """Go by these from now on; the deployments whose workers are replaced for it."""
        before = {name: self._orders(member) for name, member in self._members.items()}
        self._settings = settings
        changed = [
            name for name, member in self._members.items() if self._orders(member) != before[name]
        ]
        for member in self._members.values():
            self._files.reconsider(member)
            for worker in member.workers.values():
                worker.configure(settings, requests)
        for name in changed:
            self._members[name].revision += 1
            self._journal.note(
                "configuration.changed",
                f"{name} gets new workers, because the daemon's configuration has changed",
                deployment=name,
            )
        self.soon()
        return changed

    def _orders(self, member: Member) -> LoadOrder | None:
        """What its workers are told, if there are any."""
        return self.orders(member) if member.workers and not member.leaving else None

    def orders(self, member: Member) -> LoadOrder | None:
        """What its next worker will be told, if its files are known."""
        generation = member.due
        if generation.resolution is None:
            return None
        return self.order(member.deployment.name, generation.request, generation.resolution)

    def hurry(self) -> None:
        """End the workers that drain."""
        for member in self._members.values():
            for worker in member.workers.values():
                worker.hurry()

    def retry(self, member: Member) -> bool:
        """Try again what had given up; whether there was anything."""
        member.queue.forgive()
        self._memory.shortages.forget(member.deployment.name)
        retried = member.fetch is not None and member.fetch.error is not None
        if retried:
            member.drop_fetch()
        given_up = member.deployment.generation.number if member.deployment.failed else None
        for worker in member.serving():
            if worker.generation == given_up:
                continue
            if worker.phase in {Phase.FAILED, Phase.QUARANTINED, Phase.BACKOFF}:
                worker.reset()
                # The next daemon shall know from where on to count.
                self._journal.note(
                    RESET,
                    f"the failures of replica {worker.replica} are forgotten",
                    deployment=worker.deployment,
                    worker=worker.uuid,
                )
                retried = True
        return retried

    def unload(self, member: Member, reason: str) -> None:
        """Have it in memory no longer; the next request for it, or somebody, loads it again."""
        if not member.awake:
            return
        member.awake = False
        member.woken_at = member.loaded_at = member.keep_alive = member.unloads_at = None
        name = member.deployment.name
        self._journal.note("unload", f"{name} is unloaded", deployment=name, cause=reason)
        # Nothing comes any more that what waits could wait for.
        member.queue.pump()
        self.soon()

    def _set_aside(self, member: Member, reason: str) -> None:
        """Free its memory, and have it back when it is its turn: requests go on waiting for it."""
        member.loaded_at = member.unloads_at = None
        name = member.deployment.name
        self._journal.note(
            "unload", f"{name} is unloaded for a while", deployment=name, cause=reason
        )
        for key in list(member.workers):
            if key not in member.retiring:
                self._retire(member, key)

    def used(self, member: Member) -> None:
        """A request for it has ended: have it unloaded when its time comes, or others need that."""
        if member.occupied:
            return
        if self._contested or member.loaded_at is None:
            # It may make room now; or nobody waits any more for what isn't loaded yet.
            self.soon()
            return
        deadline = self._residence.deadline(member)
        self._expect(member, deadline)
        if deadline is not None:
            self._look_by(deadline)

    def _expect(self, member: Member, deadline: float | None) -> None:
        ahead = None if deadline is None else deadline - self._reactor.seconds()
        member.unloads_at = None if ahead is None else self._now() + ahead

    def forget(self, member: Member) -> None:
        """Drop a removed deployment once its last worker has gone."""
        if member.leaving and not member.workers:
            self._members.pop(member.deployment.name, None)
            self._memory.shortages.forget(member.deployment.name)

    # -- actions ------------------------------------------------------------------

    def _converge(self) -> None:
        self._scheduled = None
        free = self._memory.free()
        for worker in self._memory.relieved(free):
            worker.hasten()
        self._unload(free)
        self._explain(free)
        for member in self._members.values():
            self._rollouts.advance(member)
            if self._makes_room(member):
                self._rollouts.displace(member)
        self._contested = any(
            member.waits is not None and any(w.phase is Phase.QUEUED for w in member.serving())
            for member in self._members.values()
        )
        for member in self._members.values():
            for key in list(member.finishing):
                self._end(member, key)
        wanted = [want for member in self._members.values() if (want := member.wanted())]
        seen = self._memory.seen(free)
        claims = {
            name
            for name, member in self._members.items()
            if member.in_place is not None
            and any(worker.phase is Phase.QUEUED for worker in member.of(member.in_place))
        }
        actions = decide(
            wanted,
            seen,
            self.governor.slots(LOAD_SLOTS),
            free,
            first=self._residence.first,
            patience=self._memory.rules.max_wait,
        )
        for action in actions:
            if claims and isinstance(action, Admit) and action.key.deployment not in claims:
                # The room that is made is for those that it is made for.
                continue
            try:
                self._act(action)
            except Exception:  # noqa: BLE001 - one deployment's defect must not hold up the others
                log.failure("could not {action}", action=action)
        self._look_again(free)

    def _explain(self, free: Free) -> None:
        """Tell each member what memory means for it."""
        for member in self._members.values():
            member.needs = self._memory.of(member)
            member.waits = self._memory.explain(member, free)
            member.never = member.waits is not None and self._memory.never(member)
            if member.never:
                member.queue.pump()
            self._expect(member, self._residence.deadline(member))

    def _makes_room(self, member: Member) -> bool:
        """Whether what is new of it waits for memory that only the old one's going gives."""
        deployment = member.deployment
        if deployment.canary is not None or deployment.failed:
            return False
        if member.in_place is not None or any(each.retiring for each in self._members.values()):
            # What goes already may be enough.
            return False
        workers = member.of(deployment.generation.number)
        order = self.orders(member)
        if order is None or self._memory.of(member) is None:
            return False
        if all(worker.phase is not Phase.QUEUED for worker in workers):
            return False
        number = member.scale
        if deployment.stable is None:
            # Workers that a reload has made obsolete go one by one.
            number = member.fresh + 1
        prospect = self._prospect.of(order, number, member, same=True)
        return prospect.verdict is Verdict.IN_PLACE

    def _unload(self, free: Free) -> None:
        """Unload what nobody needs, and what is in the way of others."""
        for member in self._members.values():
            if member.forsaken:
                self.unload(member, "nobody waits for it any more")
        for member, reason in self._residence.idle():
            self.unload(member, reason)
        for member, reason in self._residence.evictions(free):
            if member.queue.waiting:
                self._set_aside(member, reason)
            else:
                self.unload(member, reason)
        for name, member in self._members.items():
            was, member.paused = member.paused, name in self._residence.paused
            if was and not member.paused:
                member.queue.pump()

    def _look_again(self, free: Free) -> None:
        """Converge when time alone changes what is to be in memory."""
        if self._looking is not None and self._looking.active():
            self._looking.cancel()
        seconds = self._residence.next_look(free)
        if seconds is not None and self._open:
            self._look_by(self._reactor.seconds() + seconds)

    def _look_by(self, moment: float) -> None:
        """Converge at that moment, if not before."""
        # A little later, so that it has passed.
        ahead = max(moment - self._reactor.seconds(), 0.0) + 0.01
        if self._looking is None or not self._looking.active():
            self._looking = self._reactor.callLater(ahead, self.soon)
        elif self._looking.getTime() > self._reactor.seconds() + ahead:
            self._looking.reset(ahead)

    def _act(self, action: Action) -> None:
        match action:
            case Resolve(deployment, generation):
                member = self._members[deployment]
                if member.lost:
                    self._retire_failed(member)
                self._files.find(member, generation)
            case Create(key):
                self._create(self._members[key.deployment], key)
            case Admit(key, device):
                member = self._members[key.deployment]
                member.placed[key] = device
                member.workers[key].admit()
            case Retire(key):
                self._retire(self._members[key.deployment], key)
            case Keep(key):
                member = self._members[key.deployment]
                member.retiring.discard(key)
                member.finishing.discard(key)
                member.queue.pump()

    def _create(self, member: Member, key: Key) -> None:
        generation = member.generation(key.generation)
        resolution = generation.resolution if generation else None
        if generation is None or resolution is None:
            raise InternalError(f"{key} is to be created before its files are known")
        order = self.order(member.deployment.name, generation.request, resolution)
        # A name of its own for each, because the one before may still be dying.
        self._serial += 1
        name = f"{key.deployment}.{key.generation}.{key.replica}#{self._serial}"
        worker = self._make_worker(
            name=name,
            key=key,
            order=order,
            limits=generation.request.limits,
            observer=self,
            place=lambda asked: self._place(member, key, asked),
        )
        member.workers[key] = worker
        past = self._past.pop(key, None)
        if past:
            worker.remember(past)
        worker.start()

    def _place(self, member: Member, key: Key, asked: str) -> str:
        """Where a worker is told to compute."""
        device = member.placed.get(key, asked)
        # The only one there is, the worker finds by itself, if its torch can use it at all.
        return self.devices.place(asked if self._memory.is_only(device) else device)

    def order(self, name: str, request: Request, resolution: Resolution) -> LoadOrder:
        """What a worker would be told that serves this."""
        return LoadOrder(
            deployment=name,
            folder=resolution.folder,
            task=request.task,
            device=request.device,
            dtype=request.dtype,
            threads=request.limits.threads or self._settings.threads,
            max_batch_tokens=self._settings.max_batch_tokens,
            max_sequences=self._settings.max_sequences,
            # Several beats between two observations, whatever is configured.
            beat_seconds=self._settings.beat_seconds / 5,
            allow_pickle=request.allow_pickle,
            trust_remote_code=request.trust_remote_code,
            quantization=request.quantization,
        )

    def _retire(self, member: Member, key: Key) -> None:
        """Give it no more requests, and end it when that is due."""
        member.retiring.add(key)
        member.finishing.add(key)
        self._end(member, key)

    def _end(self, member: Member, key: Key) -> None:
        """End a worker that is retiring, unless it may finish what it is at.

        It may where something else serves instead and nobody waits for its memory:
        its requests have their own deadlines.
        """
        worker, wanted = member.workers[key], member.wanted()
        instead = wanted is not None and wanted.replicas and not wanted.in_place
        if worker.in_flight and worker.phase in _ABLE and instead and not self._contested:
            return
        member.finishing.discard(key)

        def gone(outcome: object) -> None:
            if isinstance(outcome, Failure):
                log.failure("stopping {worker} failed", outcome, worker=worker.name)
            member.workers.pop(key, None)
            member.placed.pop(key, None)
            member.retiring.discard(key)
            self._phases.pop(worker.name, None)
            self.forget(member)
            self.soon()

        worker.stop().addBoth(gone)

    def _retire_failed(self, member: Member) -> None:
        for key, worker in list(member.workers.items()):
            current = key.generation == member.deployment.generation.number
            if current and worker.phase is Phase.FAILED and key not in member.retiring:
                self._retire(member, key)

    # -- what the workers tell (supervision.worker.Observer) -----------------------------

    def changed(self, worker: Worker, cause: str) -> None:
        """Note a worker's new phase, and act on it."""
        member = self._members.get(worker.deployment)
        if member is None:
            return
        phase = worker.phase
        if self._phases.get(worker.name) is not phase:
            self._phases[worker.name] = phase
            self._journal.note(
                f"worker.{phase.value}",
                f"replica {worker.replica} is {phase.value}",
                deployment=worker.deployment,
                worker=worker.uuid,
                cause=cause,
            )
            self._count_threads()
            if phase is Phase.SPAWNING:
                member.spawned_at = self._reactor.seconds()
            if phase is Phase.READY:
                self.governor.served()
                self._refused = False
                member.crash = None
                member.loaded_at = self._reactor.seconds()
                self._memory.shortages.forget(member.deployment.name)
                self._ready(member, worker)
            if phase is Phase.FAILED:
                self._files.look_again(member, worker)
            self.soon()
        member.queue.pump()

    def warned(self, worker: Worker, kind: str, message: str) -> None:
        """Note what isn't as it should be."""
        self._journal.note(kind, message, deployment=worker.deployment, worker=worker.uuid)

    def _count_threads(self) -> None:
        """Tell, once, when the workers compute with more threads than there are cores."""
        cores = self._host.cores
        if cores is None:
            return
        workers = [
            worker for member in self._members.values() for worker in member.workers.values()
        ]
        running = [worker for worker in workers if worker.phase in _RUNNING]
        threads = sum(worker.threads for worker in running)
        if threads > cores and not self._overcommitted:
            self._journal.note(
                "threads.overcommitted",
                f"{len(running)} workers compute with {threads} threads on {cores} cores and slow "
                "each other down when they are all busy",
            )
        self._overcommitted = threads > cores

    def refused(self, worker: Worker, why: str) -> None:
        """The system has no room for another process: start nothing for a while."""
        if self.governor.refused(why):
            # While it lasts, one event is enough.
            self._pause(f"{worker.name} could not be started", told=self._refused)
            self._refused = True

    def life(self, life: WorkerLife) -> Deferred[None]:
        """Keep a worker life's record; fires when it is on the disk, or can't be."""
        written = self._journal.life(life)
        member = self._members.get(life.deployment)
        if member is not None:
            member.learn(life)
        if life.uuid not in self._lives:
            self._begun(life)
        if life.ended_at is not None and life.uuid in self._lives:
            self._lives.discard(life.uuid)
            if life.failure not in _NO_STORM and self.governor.died():
                self._pause(life.reason or "")
        return written

    def crashed(self, dossier: Dossier) -> None:
        """Keep the evidence, and tell the requests that were lost with the worker."""
        crash = self._crashes.add(dossier)
        member = self._members.get(crash.deployment)
        if member is not None and crash.ready_at is None and crash.failure in _SHORT:
            self._memory.ran_out(member, dossier)
        if crash.failure is FailureClass.GPU_CONTEXT:
            self._lost_context(crash, member)
        if member is not None:
            member.crash = crash
            member.queue.crashed(crash)

    def _lost_context(self, crash: Dossier, member: Member | None) -> None:
        workers = member.workers.values() if member else ()
        loaded = next((each.loaded for each in workers if each.uuid == crash.worker), None)
        if self.devices.lost(loaded.device if loaded else crash.order.device):
            for device, sentence in self.devices.suspects.items():
                self._journal.note(
                    "device.suspect", sentence, deployment=crash.deployment, cause=crash.reason
                )
                log.warn("{device}: {sentence}", device=device, sentence=sentence)

    def _pause(self, cause: str, *, told: bool = False) -> None:
        if not told:
            self._journal.note("starts.paused", self.governor.trouble or "", cause=cause)
        if self._resuming is not None and self._resuming.active():
            self._resuming.cancel()
        # A moment later than the pause ends, so that it has.
        self._resuming = self._reactor.callLater(self.governor.paused_seconds + 0.1, self.soon)

    def _begun(self, life: WorkerLife) -> None:
        self._lives.add(life.uuid)
        member = self._members.get(life.deployment)
        for worker in member.workers.values() if member else ():
            if worker.uuid == life.uuid:
                self._logs.attach(worker)

    def _ready(self, member: Member, worker: Worker) -> None:
        generation, loaded = member.deployment.generation, worker.loaded
        if loaded is None or generation.resolution is None:
            return
        self._memory.measures(worker.order, loaded.device)
        self._measuring.ready(member, worker)
        self._hub.touch(generation.resolution.folder).addErrback(
            lambda failure: log.warn("{error}", error=failure.getErrorMessage())
        )
        known = replace(
            generation.resolution,
            task=loaded.task,
            dtype=loaded.dtype,
            device=loaded.device,
            choices=loaded.choices,
        )
        if worker.generation == generation.number and known != generation.resolution:
            self._files.learn(member, known)
