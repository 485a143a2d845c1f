"""One deployment's requests: their routing, and a bounded queue while no worker can take them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tursi import wire
from tursi.config import Requests
from tursi.errors import (
    DeadlineExceeded,
    ModelLoading,
    ModelNotFound,
    QueueFull,
    ShuttingDown,
    TursiError,
    WorkerLost,
)
from tursi.model import Phase
from tursi.supervision.link import Sink

RETRY_SECONDS = 1
"""What Retry-After tells the client of a full queue."""


@dataclass(frozen=True, slots=True)
class Work:
    """One inference request as the HTTP front hands it over."""

    route: str
    request_id: str
    content_type: str
    body: bytes
    seconds: float
    """How long the client is to be kept waiting at most."""


class Replica(Protocol):
    """What the queue needs of a worker."""

    @property
    def phase(self) -> Phase:
        """Its state; only a READY one is given requests."""
        ...

    @property
    def generation(self) -> int:
        """The newest generation that is ready gets the requests."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests that it holds."""
        ...

    def submit(self, ask: wire.Ask, sink: Sink) -> int:
        """Hand over a request and get its id; ``QueueFull`` at its limits."""
        ...

    def cancel(self, id: int) -> None:  # noqa: A002 - the frame's own word
        """Do no more work for it, and tell its sink no more."""
        ...


class Timer(Protocol):
    """A pending call that can be cancelled (``IDelayedCall``)."""

    def cancel(self) -> None:
        """Don't call any more."""
        ...


class Clock(Protocol):
    """Monotonic time."""

    def seconds(self) -> float:
        """Now, in seconds."""
        ...

    def callLater(self, delay: float, callable: Callable[[], object]) -> Timer:  # noqa: A002, N802 - Twisted's name
        """Call after ``delay`` seconds."""
        ...


class Finished(Protocol):
    """Told of every request's end, for the statistics."""

    def __call__(self, status: int, seconds: float, end: wire.End | None) -> None:
        """``status`` is the HTTP status, 0 where no answer began."""
        ...


class RequestQueue:
    """Hands requests to the least busy ready worker; holds those that must wait.

    ``workers`` gives the replicas in order of preference by generation;
    ``unavailable`` the reason why waiting is useless, or ``None``; ``stage`` a
    clause on how far loading has come.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        settings: Requests,
        workers: Callable[[], Sequence[Replica]],
        unavailable: Callable[[], TursiError | None],
        stage: Callable[[], str],
        finished: Finished,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._workers = workers
        self._unavailable = unavailable
        self._stage = stage
        self._finished = finished
        self._waiting: OrderedDict[int, Passage] = OrderedDict()
        self._closed: TursiError | None = None
        self._next = 0

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def submit(self, work: Work, sink: Sink) -> Passage:
        """Dispatch or enqueue; raises the error to answer with where neither is possible."""
        if self._closed is not None:
            raise self._closed.with_traceback(None)
        passage = Passage(self, work, sink, self._clock.seconds())
        if not self._waiting and self._dispatch(passage):
            return passage
        refusal = self._unavailable()
        if refusal is not None:
            raise refusal
        if len(self._waiting) >= self._settings.max_queued:
            raise QueueFull(
                f"{len(self._waiting)} requests already wait for this model; try again shortly.",
                retry_after=RETRY_SECONDS,
            )
        self._enqueue(passage)
        return passage

    def pump(self) -> None:
        """Dispatch what waits as far as the workers take it; call when anything changed."""
        refusal = self._unavailable() if self._waiting else None
        while self._waiting:
            passage = next(iter(self._waiting.values()))
            if not self._dispatch(passage):
                break
            self._dequeue(passage)
        if refusal is not None and not self._ready():
            for passage in list(self._waiting.values()):
                self._dequeue(passage)
                passage.failed(refusal)

    def close(self, error: TursiError | None = None) -> None:
        """Refuse from now on, and fail what waits."""
        self._closed = error or ModelNotFound("The deployment has been removed.")
        for passage in list(self._waiting.values()):
            self._dequeue(passage)
            passage.failed(self._closed)

    def _ready(self) -> list[Replica]:
        return [worker for worker in self._workers() if worker.phase is Phase.READY]

    def _dispatch(self, passage: Passage) -> bool:
        ready = self._ready()
        if len(ready) > 1:
            newest = max(worker.generation for worker in ready)
            ready = [worker for worker in ready if worker.generation == newest]
            ready.sort(key=_in_flight)
        for worker in ready:
            try:
                passage.sent(worker, worker.submit(passage.ask(self._clock.seconds()), passage))
            except QueueFull:
                continue
            return True
        return False

    def _enqueue(self, passage: Passage) -> None:
        self._next += 1
        passage.place = self._next
        self._waiting[passage.place] = passage
        limit = passage.work.seconds
        if not self._ready():
            limit = min(limit, self._settings.load_wait_seconds)
        passage.timer = self._clock.callLater(limit, lambda: self._expire(passage))

    def _dequeue(self, passage: Passage) -> None:
        del self._waiting[passage.place]
        if passage.timer is not None:
            passage.timer.cancel()
            passage.timer = None

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
            stage = self._stage()
            error = ModelLoading(
                f"The model is not ready yet ({stage}); try again shortly.", retry_after=5
            )
        self._dequeue(passage)
        passage.failed(error)

    def abandon(self, passage: Passage) -> None:
        """Take out a request whose client has gone, if it still waits."""
        if passage.place in self._waiting:
            self._dequeue(passage)

    def ended(self, passage: Passage, status: int, end: wire.End | None) -> None:
        """Count a request's end and use the place that it leaves."""
        self._finished(status, self._clock.seconds() - passage.began, end)
        if self._waiting:
            self.pump()


class Passage:
    """One request on its way: the sink that the worker answers to, and the client's ticket."""

    __slots__ = ("_id", "_queue", "_sink", "_status", "_worker", "began", "place", "timer", "work")

    def __init__(self, queue: RequestQueue, work: Work, sink: Sink, began: float) -> None:
        self._queue = queue
        self._sink = sink
        self._worker: Replica | None = None
        self._id = 0
        self._status = 0
        self.work = work
        self.began = began
        self.place = 0
        self.timer: Timer | None = None

    def ask(self, now: float) -> wire.Ask:
        """The request for a worker, with what is left of its time."""
        work = self.work
        left = max(work.seconds - (now - self.began), 0.001)
        return wire.Ask(work.route, work.request_id, work.content_type, left, work.body)

    def sent(self, worker: Replica, id: int) -> None:  # noqa: A002 - the frame's own word
        """Remember which worker holds it under which id."""
        self._worker, self._id = worker, id

    def cancel(self) -> None:
        """The client has gone, or its time is over: do no more work for it."""
        worker, self._worker = self._worker, None
        if worker is None:
            self._queue.abandon(self)
        else:
            worker.cancel(self._id)
            self._queue.ended(self, 499, None)

    def head(self, head: wire.Head) -> None:
        """Pass the head on."""
        self._status = head.status
        self._sink.head(head)

    def body(self, data: bytes) -> None:
        """Pass bytes on."""
        self._sink.body(data)

    def end(self, end: wire.End) -> None:
        """Pass the end on."""
        self._worker = None
        self._sink.end(end)
        self._queue.ended(self, self._status, end)

    def failed(self, error: TursiError) -> None:
        """Pass the failure on."""
        self._worker = None
        self._sink.failed(error)
        status = 502 if isinstance(error, WorkerLost) else 503
        self._queue.ended(self, status, None)


def _in_flight(worker: Replica) -> int:
    return worker.in_flight


def shutting_down() -> TursiError:
    """What requests are told while the daemon stops."""
    return ShuttingDown("The daemon is stopping; try again shortly.", retry_after=5)
