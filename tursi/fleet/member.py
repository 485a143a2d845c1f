"""One deployment in memory: what is wanted of it, its workers, its queue, and how it looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall

from tursi.errors import DeploymentUnavailable, TursiError
from tursi.fleet.discretion import discreet
from tursi.fleet.queue import RequestQueue
from tursi.lifecycle.verdict import failure_class
from tursi.model import (
    Crash,
    Deployment,
    DeploymentStatus,
    Desired,
    Phase,
    Progress,
    Resolution,
    WorkerStatus,
)
from tursi.plan import Key, Seen, Wanted
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
        self.error: TursiError | None = None
        self.attempts = 0
        self.retry_at: float | None = None
        """UTC epoch seconds of the next attempt, where waiting may help."""
        self.running: Deferred[Resolution] | None = None
        self.timer: IDelayedCall | None = None

    def cancel(self) -> None:
        """Stop it; nobody wants its outcome any more."""
        running, self.running = self.running, None
        timer, self.timer = self.timer, None
        if running is not None:
            running.cancel()
        if timer is not None:
            timer.cancel()


class Member:
    """A deployment that the fleet looks after."""

    def __init__(
        self, deployment: Deployment, make_queue: Callable[[Member], RequestQueue]
    ) -> None:
        self.deployment = deployment
        self.workers: dict[Key, Worker] = {}
        self.retiring: set[Key] = set()
        self.leaving = False
        """Whether it has been removed and only waits for its workers to end."""
        self.fetch: Fetch | None = None
        self.crash: Crash | None = None
        """The last one, until a worker serves again."""
        self.queue = make_queue(self)

    def drop_fetch(self) -> None:
        """Stop looking for its files."""
        fetch, self.fetch = self.fetch, None
        if fetch is not None:
            fetch.cancel()

    # -- for the plan ------------------------------------------------------------

    def wanted(self) -> Wanted | None:
        """What the plan should bring about, or ``None`` when it has been removed."""
        if self.leaving:
            return None
        deployment = self.deployment
        running = deployment.desired is Desired.RUNNING
        return Wanted(
            deployment.name,
            deployment.generation.number,
            deployment.replicas if running else 0,
            deployment.generation.resolution is not None,
        )

    def seen(self) -> Iterable[Seen]:
        """Its workers as the plan sees them."""
        return [
            Seen(key, worker.phase, key in self.retiring) for key, worker in self.workers.items()
        ]

    # -- for the queue ------------------------------------------------------------

    def serving(self) -> list[Worker]:
        """Workers that may be given requests, if they are ready."""
        return [worker for key, worker in self.workers.items() if key not in self.retiring]

    def unavailable(self) -> TursiError | None:
        """Why waiting for this deployment is useless, or ``None`` if it may come."""
        name = self.deployment.name
        if self.deployment.desired is Desired.STOPPED:
            return DeploymentUnavailable(
                f"The deployment {name} is stopped; `tursi up` starts it again."
            )
        if any(worker.phase in _COMING for worker in self.serving()):
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

    def stage(self) -> str:
        """One clause on how far it has come."""
        status = self.status()
        progress = status.progress
        if progress is None:
            waiting = status.reason if status.phase is Phase.BACKOFF else None
            if waiting is None:
                return status.phase.value
            return f"{status.phase.value}: {self._discreet(waiting)}"
        if progress.done is None or not progress.total:
            return progress.stage
        return f"{progress.stage}, {100 * progress.done / progress.total:.0f} %"

    # -- for people -----------------------------------------------------------------

    def status(self) -> DeploymentStatus:
        """Desired and observed, as the control API shows them."""
        deployment = self.deployment
        generation = deployment.generation
        workers = tuple(
            worker.status() for _, worker in sorted(self.workers.items(), key=lambda item: item[0])
        )
        current = [
            status
            for key, status in zip(sorted(self.workers), workers, strict=True)
            if key.generation == generation.number and key not in self.retiring
        ]
        serving = [status for status in workers if status.phase is Phase.READY]
        best = min(current, key=lambda status: _ORDER.index(status.phase), default=None)
        known = generation.resolution or Resolution(folder="")
        phase, reason, failure = Phase.QUEUED, None, None
        next_try_at = progress = None
        if best is not None:
            phase, reason, failure = best.phase, best.reason, best.failure
            next_try_at, progress = best.next_try_at, best.progress
        elif deployment.desired is Desired.STOPPED or self.leaving:
            phase = min(
                (status.phase for status in workers), key=_ORDER.index, default=Phase.STOPPED
            )
        elif self.fetch is not None:
            progress, next_try_at = self.fetch.progress, self.fetch.retry_at
            if self.fetch.error is not None:
                reason = self.fetch.error.message
                failure = failure_class(self.fetch.error)
                phase = Phase.FAILED if next_try_at is None else Phase.BACKOFF
        if phase is not Phase.READY and reason and serving:
            reason = f"{reason} Generation {serving[0].generation} keeps serving."
        loaded = next((status for status in current if status.task), None)
        task, device, dtype = (
            (loaded.task, loaded.device, loaded.dtype)
            if loaded
            else (known.task or generation.request.task, known.device, known.dtype)
        )
        return DeploymentStatus(
            name=deployment.name,
            model=generation.request.model,
            task=task,
            desired=deployment.desired,
            phase=phase,
            replicas=deployment.replicas,
            ready=len(serving),
            generation=generation.number,
            device=device,
            dtype=dtype,
            commit=known.commit,
            created_at=deployment.created_at,
            updated_at=deployment.updated_at,
            reason=reason,
            failure=failure,
            next_try_at=next_try_at,
            progress=progress,
            queued=self.queue.waiting,
            in_flight=sum(status.in_flight for status in workers),
            workers=workers,
            limits=generation.request.limits,
            allow_pickle=generation.request.allow_pickle,
            trust_remote_code=generation.request.trust_remote_code,
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

    def _worst(self) -> WorkerStatus | None:
        """The status that explains why nothing is coming."""
        statuses = [worker.status() for worker in self.serving()]
        return min(statuses, key=lambda status: _ORDER.index(status.phase), default=None)
