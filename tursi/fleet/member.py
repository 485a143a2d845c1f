"""One deployment in memory: what is wanted of it, its workers, its queue, and how it looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall

from tursi.canary import worse
from tursi.errors import DeploymentUnavailable, TursiError
from tursi.fleet.discretion import discreet
from tursi.fleet.pulls import Rate
from tursi.fleet.queue import RequestQueue
from tursi.fleet.routing import Routing
from tursi.fleet.words import clause
from tursi.lifecycle.verdict import failure_class
from tursi.model import (
    CanaryStatus,
    Crash,
    Deployment,
    DeploymentStatus,
    Desired,
    FailureClass,
    Footprint,
    Generation,
    Load,
    Phase,
    Progress,
    Resolution,
    WorkerLife,
    WorkerStatus,
)
from tursi.plan import Key, Seen, Wanted
from tursi.residency import Uses
from tursi.supervision.worker import Worker

_COMING = (
    # The best news first: a deployment looks like its most advanced worker.
    Phase.READY,
    Phase.SUSPECT,
    Phase.WARMING,
    Phase.LOADING,
    Phase.SPAWNING,
    Phase.QUEUED,
    Phase.SETTLING,
    Phase.KILLING,
    Phase.BACKOFF,
    Phase.STOPPING,
    Phase.DRAINING,
)
_ORDER = (*_COMING, Phase.QUARANTINED, Phase.WEDGED, Phase.FAILED, Phase.STOPPED)


class Fetch:
    """A generation's files being looked for or downloaded."""

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.progress: Progress | None = None
        self.rate = Rate()
        self.error: TursiError | None = None
        self.attempts = 0
        self.retry_at: float | None = None
        """UTC epoch seconds of the next attempt, where waiting may help."""
        self.running: Deferred[Resolution] | None = None
        self.timer: IDelayedCall | None = None

    def advance(self, progress: Progress, now: float) -> None:
        """It has come so far; ``now`` is monotonic time."""
        self.progress = progress
        if progress.done is not None:
            self.rate.add(now, progress.done)

    def remaining(self, now: float) -> float | None:
        """Seconds that it still takes, where that can be told."""
        progress, rate = self.progress, self.rate.value(now)
        if not rate or progress is None or progress.done is None or not progress.total:
            return None
        return max(0.0, progress.total - progress.done) / rate

    def cancel(self) -> None:
        """Stop it; nobody wants its outcome any more."""
        running, self.running = self.running, None
        timer, self.timer = self.timer, None
        if running is not None:
            running.cancel()
        if timer is not None:
            timer.cancel()


class _Look(NamedTuple):
    """How a generation is."""

    phase: Phase
    reason: str | None = None
    failure: FailureClass | None = None
    next_try_at: float | None = None
    progress: Progress | None = None


class Member:
    """A deployment that the fleet looks after."""

    def __init__(
        self,
        deployment: Deployment,
        routing: Routing,
        make_queue: Callable[[Member], RequestQueue],
    ) -> None:
        self.deployment = deployment
        self.workers: dict[Key, Worker] = {}
        self.retiring: set[Key] = set()
        self.finishing: set[Key] = set()
        """Those of them that have not been told to end, because requests are with them."""
        self.routing = routing
        self.scale = deployment.replicas
        """How many replicas there should be just now."""
        self.proven: set[tuple[Key, str | None]] = set()
        """Lives of workers of a new generation that have answered a request of ours."""
        self.in_place: int | None = None
        """The generation that can't be loaded before the one before it has gone."""
        self.revision = 0
        """How often the daemon's configuration has changed what its workers are told to load."""
        self.leaving = False
        """Whether it has been removed and only waits for its workers to end."""
        self.fetch: Fetch | None = None
        self.lost = False
        """Whether the files that it had are gone from the disk, and are fetched again."""
        self.crash: Crash | None = None
        """The last one, until a worker serves again."""
        load = deployment.schedule.load
        self.awake = load is Load.ALWAYS or (load is Load.MANUAL and deployment.loaded)
        """Whether it is to be in memory."""
        self.demanded = False
        """Whether nobody but requests wants it there."""
        self.keep_alive: float | None = None
        """What a request has asked for, until it is unloaded."""
        self.woken_at: float | None = None
        self.spawned_at: float | None = None
        self.loaded_at: float | None = None
        self.used_at = 0.0
        """When the last request came or ended; as the three above in monotonic seconds."""
        self.uses = Uses()
        self.needs: Footprint | None = None
        """What each worker is reckoned to need of memory, once its files are known."""
        self.placed: dict[Key, str] = {}
        """The devices that workers were told to compute on."""
        self.load_seconds: float | None = None
        """What the last load took."""
        self.paused = False
        """Whether it takes no new requests, so that it can go for others."""
        self.waits: str | None = None
        """Why what is queued isn't loaded, if it isn't its turn."""
        self.never = False
        """Whether that can't change by itself: it is larger than all that there is."""
        self.unloads_at: float | None = None
        """UTC epoch seconds, if nobody uses it until then."""
        self.queue = make_queue(self)

    @property
    def busy(self) -> bool:
        """Whether any request waits for it or is with it."""
        return bool(self.queue.waiting) or any(worker.in_flight for worker in self.workers.values())

    @property
    def pinned(self) -> bool:
        """Whether somebody has said that it stays for ever, once it is loaded on demand."""
        return self.stays(0.0) < 0

    def stays(self, default: float) -> float:
        """For how many seconds it stays unused, if it is loaded on demand; negative: for ever."""
        if self.keep_alive is not None:
            return self.keep_alive
        wanted = self.deployment.schedule.keep_alive
        return default if wanted is None else wanted

    @property
    def waited_for(self) -> bool:
        """Whether anybody wants what isn't loaded yet: a request, or who has deployed it."""
        return bool(self.queue.waiting) or not self.demanded

    @property
    def forsaken(self) -> bool:
        """Whether it was to be loaded for requests that have all given up before that began."""
        return (
            self.awake
            and not self.waited_for
            and all(
                # Whatever comes back would have forgotten its failures.
                worker.phase is Phase.QUEUED and not worker.status().failures
                for worker in self.workers.values()
            )
        )

    @property
    def changing(self) -> bool:
        """Whether a new generation has still to be loaded, to see whether it can be."""
        deployment = self.deployment
        if deployment.stable is None or deployment.failed:
            return False
        return deployment.canary is None or not any(
            worker.phase is Phase.READY and self.is_proven(key, worker)
            for key, worker in self.workers.items()
            if key.generation == deployment.generation.number
        )

    @property
    def occupied(self) -> bool:
        """Whether it can't go just now, for requests that it has or is to have."""
        if any(worker.in_flight for worker in self.workers.values()):
            return True
        return bool(self.queue.waiting) and not self.paused

    def wake(self, now: float, *, demanded: bool = False) -> None:
        """Have it in memory, because of a request or (not ``demanded``) anything else."""
        if not self.awake:
            self.awake, self.woken_at, self.loaded_at = True, now, None
            self.keep_alive, self.demanded = None, demanded
        elif not demanded:
            self.demanded = False

    def learn(self, life: WorkerLife) -> None:
        """Remember how long a worker of the present generation has taken to load."""
        if life.generation != self.deployment.generation.number or life.ready_at is None:
            return
        self.load_seconds = life.ready_at - life.spawned_at

    @property
    def finished(self) -> bool:
        """Whether a worker that finishes what it is at has done so."""
        return any(not self.workers[key].in_flight for key in self.finishing)

    def drop_fetch(self) -> None:
        """Stop looking for its files."""
        fetch, self.fetch = self.fetch, None
        if fetch is not None:
            fetch.cancel()

    def adopt(self, deployment: Deployment) -> None:
        """Go by that from now on."""
        before = self.deployment
        self.deployment = deployment
        self.routing.adopt(deployment)
        if deployment.generation.number != before.generation.number or deployment.canary:
            self.in_place = None
        least, most = deployment.replicas, deployment.max_replicas or deployment.replicas
        self.scale = min(max(self.scale, least), most)

    def generation(self, number: int) -> Generation | None:
        """That generation, if it is the one that is wanted or the one that serves until then."""
        for each in (self.deployment.generation, self.deployment.stable):
            if each is not None and each.number == number:
                return each
        return None

    @property
    def due(self) -> Generation:
        """The generation that a worker is loaded of next, if one is."""
        deployment = self.deployment
        if deployment.failed and deployment.stable is not None:
            return deployment.stable
        return deployment.generation

    def of(self, number: int) -> list[Worker]:
        """Its workers of that generation that stay."""
        return [worker for worker in self.serving() if worker.generation == number]

    def is_proven(self, key: Key, worker: Worker) -> bool:
        """Whether it may be given requests when it is ready, and be relied on."""
        deployment = self.deployment
        return (
            deployment.stable is None
            or key.generation != deployment.generation.number
            or (key, worker.uuid) in self.proven
        )

    @property
    def fresh(self) -> int:
        """How many workers serve that are of the newest generation and revision."""
        newest = (self.deployment.generation.number, self.revision)
        return sum(
            worker.phase is Phase.READY
            and (key.generation, key.revision) == newest
            and key not in self.retiring
            and self.is_proven(key, worker)
            for key, worker in self.workers.items()
        )

    # -- for the plan ------------------------------------------------------------

    def wanted(self) -> Wanted | None:
        """What the plan should bring about, or ``None`` when it has been removed."""
        if self.leaving:
            return None
        deployment = self.deployment
        running = deployment.desired is Desired.RUNNING and self.awake
        return Wanted(
            deployment.name,
            deployment.generation.number,
            self.scale if running else 0,
            deployment.generation.resolution is not None and not self.lost,
            self.revision,
            stable=deployment.stable.number if deployment.stable else None,
            split=deployment.canary is not None,
            failed=deployment.failed,
            in_place=self.in_place is not None,
        )

    def seen(self, memory: int) -> Iterable[Seen]:
        """Its workers as the plan sees them, each of which needs ``memory`` bytes."""
        return [
            Seen(
                key,
                self._phase(key, worker),
                key in self.retiring,
                memory,
                finishing=key in self.finishing,
            )
            for key, worker in self.workers.items()
        ]

    def _phase(self, key: Key, worker: Worker) -> Phase:
        """Its own, unless it doesn't serve although it could."""
        if key in self.finishing:
            return Phase.DRAINING
        # Until it has answered a request of ours, one that says it is ready isn't.
        if worker.phase is Phase.READY and not self.is_proven(key, worker):
            return Phase.WARMING
        return worker.phase

    # -- for the queue ------------------------------------------------------------

    def serving(self) -> list[Worker]:
        """Workers that stay."""
        return [worker for key, worker in self.workers.items() if key not in self.retiring]

    def takers(self) -> list[Worker]:
        """Workers that may be given requests, if they are ready."""
        if self.paused:
            return []
        return [
            worker
            for key, worker in self.workers.items()
            if key not in self.retiring and self.is_proven(key, worker)
        ]

    def unavailable(self) -> TursiError | None:
        """Why waiting for this deployment is useless, or ``None`` if it may come."""
        resting = self._resting()
        stable = self.deployment.stable
        if resting is not None or (stable is not None and not self.of(stable.number)):
            # What has served comes back if the other one fails.
            return resting
        name = self.deployment.name
        phases = {worker.phase for worker in self.serving()}
        if self.never and self.waits is not None and phases <= {Phase.QUEUED}:
            return DeploymentUnavailable(f"{name} can't be served: {self._discreet(self.waits)}")
        if not phases.isdisjoint(_COMING):
            return None
        if self.fetch is not None and self.fetch.error is not None:
            if self.fetch.retry_at is not None:
                return None
            return DeploymentUnavailable(
                f"{name} can't be served: {self._discreet(self.fetch.error.message)}"
            )
        status = self._worst()
        if status is None:
            return None
        reason = self._discreet(status.reason or "no reason is known")
        message = f"{name} is {status.phase.value}: {reason}"
        if self.crash is None:
            return DeploymentUnavailable(message)
        number = self.crash.id
        return DeploymentUnavailable(
            f"{message} (crash {number}, `tursi why {name}` tells more).", reference=str(number)
        )

    def _resting(self) -> TursiError | None:
        """Why nothing of it is to be in memory, if that is so."""
        name = self.deployment.name
        if self.deployment.desired is Desired.STOPPED:
            return DeploymentUnavailable(
                f"The deployment {name} is stopped; `tursi up` starts it again."
            )
        if not self.awake and self.deployment.schedule.load is Load.ON_DEMAND:
            return DeploymentUnavailable(
                f"The model {name} has been unloaded; the next request for it loads it again.",
                retry_after=1,
            )
        if not self.awake:
            return DeploymentUnavailable(
                f"The model {name} is not loaded; `tursi load {name}` loads it."
            )
        return None

    def stage(self) -> str:
        """One clause on how far it has come."""
        if self.paused:
            return "it makes room for others that have waited longer"
        status = self.status()
        progress = status.progress
        if progress is None:
            waiting = status.reason if status.phase in {Phase.BACKOFF, Phase.QUEUED} else None
            if waiting is None:
                return status.phase.value
            return f"{status.phase.value}: {self._discreet(waiting)}"
        if progress.done is None or not progress.total:
            return progress.stage
        text = f"{progress.stage}, {100 * progress.done / progress.total:.0f} %"
        if progress.part and progress.parts and progress.parts > 1:
            text += f", file {progress.part} of {progress.parts}"
        return text

    # -- for people -----------------------------------------------------------------

    @property
    def shown(self) -> Generation:
        """The generation that it looks like: a canary is told of apart."""
        deployment = self.deployment
        # Nothing else tells any more what a sleeping one is, when it comes back.
        apart = deployment.canary is not None or (deployment.failed and not self.awake)
        if apart and deployment.stable is not None:
            return deployment.stable
        return deployment.generation

    def status(self) -> DeploymentStatus:
        """Desired and observed, as the control API shows them."""
        deployment, generation = self.deployment, self.shown
        workers = self._workers()
        current = self._current(generation, workers)
        look = self._look(generation, current)
        serving = [status for _, status in workers if status.phase is Phase.READY]
        stable = deployment.stable.number if deployment.stable else None
        # While another one comes up beside it, only what is used counts.
        serving = [each for each in serving if each.generation == stable] or serving
        reason = look.reason
        if look.phase is not Phase.READY and reason and serving:
            reason = f"{clause(reason)}. Generation {serving[0].generation} keeps serving."
        elif deployment.failed and reason and stable is not None and self.awake:
            reason = f"{clause(reason)}. Generation {stable} is loaded again."
        elif deployment.failed and stable is not None and not self.awake:
            number = deployment.generation.number
            reason = f"Generation {number} could not take over; `tursi history` tells why."
        known = generation.resolution or Resolution(folder="")
        loaded = next((status for status in current if status.task), None)
        task, device, dtype = (
            (loaded.task, loaded.device, loaded.dtype)
            if loaded
            else (known.task or generation.request.task, known.device, known.dtype)
        )
        least = deployment.replicas if deployment.max_replicas is not None else None
        return DeploymentStatus(
            name=deployment.name,
            model=generation.request.model,
            task=task,
            desired=Desired.STOPPED if self.leaving else deployment.desired,
            phase=look.phase,
            replicas=self.scale,
            ready=len(serving),
            generation=generation.number,
            device=device,
            dtype=dtype,
            commit=known.commit,
            created_at=deployment.created_at,
            updated_at=deployment.updated_at,
            reason=reason,
            failure=look.failure,
            next_try_at=look.next_try_at,
            progress=look.progress,
            queued=self.queue.waiting,
            in_flight=sum(status.in_flight for _, status in workers),
            workers=tuple(status for _, status in workers),
            limits=generation.request.limits,
            allow_pickle=generation.request.allow_pickle,
            trust_remote_code=generation.request.trust_remote_code,
            quantization=generation.request.quantization,
            load=deployment.schedule.load,
            keep_alive=deployment.schedule.keep_alive,
            unloads_at=None if self.busy else self.unloads_at,
            pinned=self.pinned and self.awake and deployment.schedule.load is Load.ON_DEMAND,
            memory=self.needs.host if self.needs is not None else None,
            min_replicas=least,
            max_replicas=deployment.max_replicas,
            stable=stable,
            canary=self._canary(workers),
            in_place=self.in_place is not None,
        )

    def _workers(self) -> list[tuple[Key, WorkerStatus]]:
        return [
            (key, replace(worker.status(), phase=self._phase(key, worker)))
            for key, worker in sorted(self.workers.items(), key=lambda item: item[0])
        ]

    def _current(
        self, generation: Generation, workers: Iterable[tuple[Key, WorkerStatus]]
    ) -> list[WorkerStatus]:
        """Those of a generation that stay."""
        return [
            status
            for key, status in workers
            if (key.generation, key.revision) == (generation.number, self.revision)
            and key not in self.retiring
        ]

    def _look(self, generation: Generation, current: Sequence[WorkerStatus]) -> _Look:
        """How a generation is, by its workers ``current``."""
        deployment = self.deployment
        best = min(current, key=lambda status: _ORDER.index(status.phase), default=None)
        if best is not None:
            if best.phase is Phase.QUEUED and self.waits is not None:
                if self.never:
                    return _Look(Phase.FAILED, self.waits, FailureClass.RESOURCE)
                return _Look(best.phase, self.waits, best.failure)
            return _Look(best.phase, best.reason, best.failure, best.next_try_at, best.progress)
        if deployment.desired is Desired.STOPPED or self.leaving or not self.awake:
            phases = [worker.phase for worker in self.workers.values()]
            return _Look(min(phases, key=_ORDER.index, default=Phase.STOPPED))
        fetch = self.fetch
        if fetch is not None and generation is deployment.generation:
            if fetch.error is None:
                return _Look(Phase.QUEUED, progress=fetch.progress)
            phase = Phase.FAILED if fetch.retry_at is None else Phase.BACKOFF
            error = fetch.error
            return _Look(phase, error.message, failure_class(error), fetch.retry_at)
        if generation is deployment.generation and deployment.failed:
            return _Look(Phase.FAILED, generation.turns[-1].reason)
        return _Look(Phase.QUEUED)

    def _canary(self, workers: Sequence[tuple[Key, WorkerStatus]]) -> CanaryStatus | None:
        deployment = self.deployment
        if deployment.canary is None or deployment.stable is None:
            return None
        generation = deployment.generation
        current = self._current(generation, workers)
        look = self._look(generation, current)
        tally = self.routing.canary
        return CanaryStatus(
            generation=generation.number,
            weight=deployment.canary,
            phase=look.phase,
            ready=sum(status.phase is Phase.READY for status in current),
            model=generation.request.model,
            reason=look.reason or worse(tally, self.routing.stable),
            requests=tally.requests,
            errors=tally.errors,
        )

    def health(self) -> str:
        """How it is, in a clause that anybody may read."""
        status = self.status()
        text = f"{status.phase.value}, {status.ready} of {status.replicas} ready"
        return f"{text}: {self._discreet(status.reason)}" if status.reason else text

    def _discreet(self, text: str) -> str:
        generation = self.deployment.generation
        known = generation.resolution.folder if generation.resolution else None
        return discreet(text, generation.request.model, known)

    def describe(self) -> list[str]:
        """How it and its workers are, in lines."""
        status = self.status()
        lines = [
            f"deployment {status.name}: {status.phase.value}, wanted {status.desired.value}, "
            f"generation {status.generation}, {status.ready} of {status.replicas} ready, "
            f"{status.queued} queued, {status.in_flight} in flight"
            + (f", {status.reason}" if status.reason else "")
        ]
        if self.fetch is not None:
            lines.append(f"  its files are being looked for (attempt {self.fetch.attempts + 1})")
        lines += [
            f"  worker {worker.name}: {worker.phase.value}, pid {worker.pid}, "
            f"{worker.in_flight} in flight, {worker.failures} failures, "
            f"{worker.restarts} restarts, rss {worker.rss}"
            + (f", {worker.reason}" if worker.reason else "")
            for worker in status.workers
        ]
        return lines

    def _worst(self) -> WorkerStatus | None:
        """The status that explains why nothing is coming."""
        statuses = [worker.status() for worker in self.serving()]
        return min(statuses, key=lambda status: _ORDER.index(status.phase), default=None)
