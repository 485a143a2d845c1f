"""One deployment's requests: their routing, and a bounded queue while no worker can take them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

from tursi.config import Requests
from tursi.errors import (
    DeadlineExceeded,
    ModelLoading,
    ModelNotFound,
    PoisonRequest,
    QueueFull,
    ShuttingDown,
    TursiError,
    WorkerLost,
)
from tursi.fleet.discretion import discreet
from tursi.fleet.line import Line
from tursi.fleet.passage import Clock, Passage, Replica, Work
from tursi.fleet.poison import Suspects, digest
from tursi.fleet.routing import Routing
from tursi.fleet.words import clause
from tursi.loading import Loading
from tursi.model import Caller, Crash, Phase
from tursi.supervision.link import Sink

RETRY_SECONDS = 1
"""What Retry-After tells the client of a full queue,"""
LOADING_SECONDS = 5
"""and whoever waits for a model of which nobody knows when it is there."""
CAUSE_SECONDS = 0.8
"""How long the answer to a lost request waits for the cause."""


class RequestQueue:
    """Hands requests to a ready worker that has few; holds those that must wait.

    A request whose worker died before a byte of the answer had left is sent once
    more. As it may be what the worker died of, it is then alone with a worker,
    and what kills a second one is refused (``poison``).

    ``workers`` gives the replicas, ``routing`` orders them; ``unavailable`` says why
    waiting is useless, or ``None``; ``stage`` a clause on how far loading has come,
    ``outlook`` the same for programs, given the request's position; ``crash``
    the crash that it still recovers from. ``finished`` is told of every request's
    end. ``poisoned`` is told the id of a request
    that is refused from now on.
    """

    def __init__(
        self,
        *,
        name: str,
        clock: Clock,
        settings: Requests,
        workers: Callable[[], Sequence[Replica]],
        routing: Routing,
        unavailable: Callable[[], TursiError | None],
        stage: Callable[[], str],
        outlook: Callable[[int], Loading],
        crash: Callable[[], Crash | None],
        finished: Callable[[], None],
        poisoned: Callable[[str], None],
    ) -> None:
        self._name = name
        self._clock = clock
        self._settings = settings
        self._workers = workers
        self._routing = routing
        self._unavailable = unavailable
        self._stage = stage
        self._outlook = outlook
        self._crash = crash
        self._finished = finished
        self._poisoned = poisoned
        self._waiting = Line()
        self._suspects = Suspects(clock.seconds)
        self._suspected: OrderedDict[int, Passage] = OrderedDict()
        """Those that wait to be alone with a worker."""
        self._apart: Replica | None = None
        """The worker that is kept free for them."""
        self._alone: Passage | None = None
        """The one that it has."""
        self._bereft: dict[str, list[Passage]] = {}
        """By life: those that wait to be told why their worker ended."""
        self._closed: TursiError | None = None
        self._next = 0

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting) + len(self._suspected)

    @property
    def oldest(self) -> float | None:
        """When the request began that has waited longest, in monotonic seconds."""
        oldest = self._waiting.oldest
        return oldest.began if oldest is not None else None

    @property
    def caller(self) -> Caller | None:
        """Whose request has waited longest."""
        oldest = self._waiting.oldest
        return oldest.work.caller if oldest is not None else None

    def configure(self, settings: Requests) -> None:
        """Go by these from now on; what already waits keeps its time."""
        self._settings = settings

    def submit(self, work: Work, sink: Sink) -> Passage:
        """Dispatch or enqueue; raises the error to answer with where neither is possible."""
        if self._closed is not None:
            raise self._closed.with_traceback(None)
        passage = Passage(self, work, sink, self._clock.seconds())
        if self._suspects:
            passage.digest = self._suspects.recognize(work.route, work.body)
            poison = self._poison(passage)
            if poison is not None:
                raise poison
        if not self._waiting and passage.digest is None and self._dispatch(passage):
            return passage
        refusal = self._unavailable()
        if refusal is not None:
            raise refusal
        if self._is_far():
            raise self._still_loading(self.waiting + 1)
        if self.waiting >= self._settings.max_queued:
            self._make_place(work.caller.key)
        self._enqueue(passage)
        passage.position = self._ahead(passage) + 1
        if passage.digest is not None:
            self._pump_suspected()
        return passage

    def pump(self) -> None:
        """Dispatch what waits as far as the workers take it; call when anything changed."""
        if not self.waiting:
            return
        refusal = self._unavailable()
        self._pump_suspected()
        while (passage := self._waiting.next) is not None and self._dispatch(passage):
            self._dequeue(passage)
        if refusal is not None and not self._ready():
            self._fail_waiting(refusal)

    def close(self, error: TursiError | None = None) -> None:
        """Refuse from now on, and fail what waits."""
        self._closed = error or ModelNotFound("The deployment has been removed.")
        self._fail_waiting(self._closed)
        for bereft in list(self._bereft.values()):
            for passage in list(bereft):
                self._explain(passage, None)

    def crashed(self, crash: Crash) -> None:
        """A worker's end has been found out: tell those who have lost it."""
        self._suspects.identified(crash.worker, crash.id)
        for passage in list(self._bereft.get(crash.worker, ())):
            self._explain(passage, crash)
        for passage in list(self._suspected.values()):
            if passage.place:
                self._refuse_poison(passage)

    def forgive(self) -> None:
        """Hold nothing against any request: the workers to come are others."""
        self._suspects.forgive()

    def _fail_waiting(self, error: TursiError) -> None:
        for passage in (*self._suspected.values(), *self._waiting):
            # Another one's failure may have led this one out already.
            if passage.place:
                self._dequeue(passage)
                passage.refuse(error)

    # -- dispatch ---------------------------------------------------------------------

    def _ready(self) -> list[Replica]:
        return [worker for worker in self._workers() if worker.phase is Phase.READY]

    def _dispatch(self, passage: Passage) -> bool:
        ready = self._routing.order(self._ready(), again=passage.retried)
        return any(worker is not self._apart and self._send(worker, passage) for worker in ready)

    def _send(self, worker: Replica, passage: Passage) -> bool:
        try:
            passage.sent(worker, worker.submit(passage.ask(self._clock.seconds()), passage))
        except QueueFull:
            return False
        passage.mark = self._routing.mark
        self._routing.sent(worker)
        return True

    def _pump_suspected(self) -> None:
        """Let the next suspect have a worker alone, once one is idle."""
        while self._suspected and self._alone is None:
            passage = next(iter(self._suspected.values()))
            if self._refuse_poison(passage):
                continue
            # The least busy one gets nothing new and is idle soonest.
            self._apart = next(iter(self._routing.order(self._ready(), again=True)), None)
            if self._apart is None or self._apart.in_flight:
                return
            if not self._send(self._apart, passage):
                return
            self._alone = passage
            self._dequeue(passage)

    def _reopen(self) -> None:
        """Let the others have the worker again that was kept apart, if nobody needs it so."""
        if self._alone is None and not self._suspected:
            self._apart = None

    # -- waiting ------------------------------------------------------------------------

    def _enqueue(self, passage: Passage, *, first: bool = False) -> None:
        self._next += 1
        passage.place = self._next
        if passage.digest is None:
            self._waiting.add(passage, first=first)
        else:
            self._suspected[passage.place] = passage
        limit = passage.work.seconds - (self._clock.seconds() - passage.began)
        if not self._ready():
            limit = min(limit, self._settings.load_wait_seconds)
        passage.timer = self._clock.callLater(max(limit, 0.0), lambda: self._expire(passage))

    def _dequeue(self, passage: Passage) -> None:
        if passage in self._waiting:
            self._waiting.remove(passage)
        else:
            del self._suspected[passage.place]
        passage.place = 0
        passage.stop_timer()
        self._reopen()

    def _expire(self, passage: Passage) -> None:
        passage.timer = None
        if self._ready():
            waited = self._clock.seconds() - passage.began
            if waited < passage.work.seconds:
                # The load that it waited for is over; now it waits for its turn.
                passage.timer = self._clock.callLater(
                    passage.work.seconds - waited, lambda: self._expire(passage)
                )
                return
            error: TursiError = DeadlineExceeded(
                f"The request waited {passage.work.seconds:.0f} s for its turn without getting it."
            )
        else:
            error = self._still_loading(self._ahead(passage) + 1)
        self._dequeue(passage)
        passage.refuse(error)

    def _is_far(self) -> bool:
        """Whether nothing is tried again in the time that a request may wait for a load."""
        workers = self._workers()
        if not workers or any(worker.phase is not Phase.BACKOFF for worker in workers):
            return False
        return (self._outlook(1).eta_seconds or 0.0) > self._settings.load_wait_seconds

    def _ahead(self, passage: Passage) -> int:
        """How many that wait have their turns before it."""
        if passage.place in self._suspected:
            return list(self._suspected).index(passage.place)
        return len(self._suspected) + self._waiting.ahead(passage)

    def _make_place(self, key: int | None) -> None:
        """Let whoever has most in the queue leave a place to a caller that has less."""
        full, excess = self._full(), self._waiting.excess(key)
        if excess is None:
            raise full
        self._dequeue(excess)
        excess.refuse(full)

    def _full(self) -> QueueFull:
        loading = None if self._ready() else self._outlook(self.waiting + 1)
        return QueueFull(
            f"{self.waiting} requests already wait for this model; try again shortly.",
            retry_after=RETRY_SECONDS if loading is None else _until(loading),
            loading=loading,
        )

    def _still_loading(self, position: int) -> ModelLoading:
        crash = self._crash()
        after = (
            f"; its worker ended before: {clause(discreet(crash.reason))}, crash {crash.id}"
            if crash
            else ""
        )
        loading = self._outlook(position)
        return ModelLoading(
            f"The model is not ready yet ({self._stage()}{after}); try again shortly.",
            retry_after=_until(loading),
            reference=str(crash.id) if crash else None,
            loading=loading,
        )

    def abandon(self, passage: Passage) -> None:
        """Take out a request whose client has gone, if it still waits."""
        if passage.place:
            self._dequeue(passage)
            self.pump()
        elif passage.life in self._bereft:
            self._consoled(passage)
        else:
            return
        self.ended(passage)

    def ended(self, passage: Passage) -> None:
        """Use the place that a request leaves at its end."""
        self._leave(passage)
        self._finished()
        if self.waiting:
            self.pump()

    def _leave(self, passage: Passage) -> None:
        if self._alone is passage:
            self._alone = None
            self._reopen()

    # -- lost workers -----------------------------------------------------------------------

    def survived(self, passage: Passage) -> None:
        """A worker has dealt with it and lives."""
        if passage.digest is not None:
            self._suspects.clear(passage.digest)

    def lost(self, passage: Passage, worker: Replica, error: WorkerLost) -> None:
        """The worker died that held it: send it once more, or tell the client why."""
        self._leave(passage)
        passage.life = error.reference or ""
        if not worker.asked:
            self._blame(passage)
        if self._closed is None and not (passage.begun or passage.retried):
            passage.retried = True
            self._enqueue(passage, first=passage.digest is None)
            self.pump()
        elif self._closed is not None or worker.asked:
            passage.refuse(self._lost(passage, None))
        else:
            # Why it ended is known in a moment, and worth that.
            self._bereft.setdefault(passage.life, []).append(passage)
            passage.timer = self._clock.callLater(CAUSE_SECONDS, lambda: self._despair(passage))

    def _blame(self, passage: Passage) -> None:
        work = passage.work
        if passage.digest is None:
            passage.digest = digest(work.route, work.body)
        if self._suspects.died(passage.digest, len(work.body), passage.life):
            self._poisoned(work.request_id)

    def _despair(self, passage: Passage) -> None:
        passage.timer = None
        self._explain(passage, None)

    def _explain(self, passage: Passage, crash: Crash | None) -> None:
        self._consoled(passage)
        passage.refuse(self._lost(passage, crash))

    def _consoled(self, passage: Passage) -> None:
        passage.stop_timer()
        bereft = self._bereft[passage.life]
        bereft.remove(passage)
        if not bereft:
            del self._bereft[passage.life]

    def _lost(self, passage: Passage, crash: Crash | None) -> WorkerLost:
        message = f"The worker of {self._name} ended while it held this request"
        if crash is not None:
            message += (
                f": {clause(discreet(crash.reason))} (crash {crash.id}, "
                f"`tursi crashes {self._name} {crash.id}` has the evidence)"
            )
        suspicion = self._suspects.of(passage.digest) if passage.digest else None
        if suspicion is not None and suspicion.poison:
            message += (
                ". It is the second worker that ended like that, "
                "so the same request is refused for an hour"
            )
        return WorkerLost(f"{message}.", reference=str(crash.id) if crash else None)

    def _refuse_poison(self, passage: Passage) -> bool:
        poison = self._poison(passage)
        if poison is not None:
            self._dequeue(passage)
            passage.refuse(poison)
        return poison is not None

    def _poison(self, passage: Passage) -> PoisonRequest | None:
        suspicion = self._suspects.of(passage.digest) if passage.digest else None
        if suspicion is None or not suspicion.poison:
            return None
        crashes = [each for each in suspicion.deaths.values() if each is not None]
        which = f" (crashes {' and '.join(map(str, crashes))})" if crashes else ""
        minutes = math.ceil((suspicion.until - self._clock.seconds()) / 60)
        return PoisonRequest(
            f"{len(suspicion.deaths)} workers of {self._name} ended while they held this very"
            f" request{which}. It is refused for another {minutes} min, or until the deployment"
            " is changed or restarted.",
            reference=str(crashes[-1]) if crashes else None,
        )


def _until(loading: Loading) -> int:
    """What Retry-After says, before it is kept within what clients take."""
    eta = loading.eta_seconds
    return LOADING_SECONDS if eta is None else max(math.ceil(eta), 1)


def shutting_down() -> TursiError:
    """What requests are told while the daemon stops."""
    return ShuttingDown("The daemon is stopping; try again shortly.", retry_after=5)
