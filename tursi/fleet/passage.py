"""One request on its way through the daemon, and what it meets there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tursi import wire
from tursi.errors import TursiError, WorkerLost
from tursi.loading import POSITION_HEADER
from tursi.model import Caller, Phase
from tursi.supervision.link import Sink


@dataclass(frozen=True, slots=True)
class Work:
    """One inference request as the HTTP front hands it over."""

    route: str
    request_id: str
    content_type: str
    body: bytes
    seconds: float
    """How long the client is to be kept waiting at most."""
    keep_alive: float | None = None
    """Seconds that what is loaded on demand stays unused after it; negative: for ever."""
    caller: Caller = Caller()  # noqa: RUF009 - a frozen value


class Replica(Protocol):
    """What the queue needs of a worker."""

    @property
    def phase(self) -> Phase:
        """Its state; only a READY one is given requests."""
        ...

    @property
    def generation(self) -> int:
        """Of the deployment, the one that it serves."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests that it holds."""
        ...

    @property
    def asked(self) -> bool:
        """Whether it is ending because somebody wanted that."""
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


class Way(Protocol):
    """Who leads a request (``queue.RequestQueue``)."""

    def abandon(self, passage: Passage) -> None:
        """The client of one that no worker holds has gone."""
        ...

    def ended(self, passage: Passage) -> None:
        """Nothing follows any more."""
        ...

    def survived(self, passage: Passage) -> None:
        """A worker has dealt with it and lives."""
        ...

    def lost(self, passage: Passage, worker: Replica, error: WorkerLost) -> None:
        """The worker died that held it."""
        ...


class Passage:
    """One request on its way: the sink that the worker answers to, and the client's ticket."""

    __slots__ = (
        "_head", "_id", "_queue", "_sink", "_worker", "began", "begun", "digest", "generation",
        "life", "mark", "place", "position", "retried", "timer", "waited", "work",
    )  # fmt: skip

    def __init__(self, queue: Way, work: Work, sink: Sink, began: float) -> None:
        self._queue = queue
        self._sink = sink
        self._worker: Replica | None = None
        self._id = 0
        self._head: wire.Head | None = None
        self.work = work
        self.began = began
        self.waited = 0.0
        """Seconds until a worker got it, the last one if there were two."""
        self.generation = 0
        """Of that worker; 0 if none got it."""
        self.mark: str | None = None
        """The header that says so, where it matters."""
        self.begun = False
        """Whether bytes of an answer have been passed on."""
        self.retried = False
        self.digest: bytes | None = None
        """Only of a request that a worker has died with."""
        self.life = ""
        """Of the worker that died with it."""
        self.place = 0
        """In the queue; 0 if it isn't there."""
        self.position = 0
        """That it had when it came there."""
        self.timer: Timer | None = None

    def ask(self, now: float) -> wire.Ask:
        """The request for a worker, with what is left of its time."""
        work = self.work
        self.waited = now - self.began
        left = max(work.seconds - self.waited, 0.001)
        return wire.Ask(work.route, work.request_id, work.content_type, left, work.body)

    def sent(self, worker: Replica, id: int) -> None:  # noqa: A002 - the frame's own word
        """Remember which worker holds it under which id."""
        self._worker, self._id = worker, id
        self.generation = worker.generation

    def stop_timer(self) -> None:
        """Nothing is waited for any more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def cancel(self) -> None:
        """The client has gone, or its time is over: do no more work for it."""
        worker, self._worker = self._worker, None
        if worker is None:
            self._queue.abandon(self)
        else:
            worker.cancel(self._id)
            self._queue.ended(self)

    def head(self, head: wire.Head) -> None:
        """Keep the head: until bytes follow, another worker may still begin afresh."""
        self._head = head

    def body(self, data: bytes) -> None:
        """Pass bytes on."""
        if not self.begun:
            self._begin()
        self._sink.body(data)

    def end(self, end: wire.End) -> None:
        """Pass the end on."""
        self._worker = None
        if not self.begun:
            self._begin()
        self._queue.survived(self)
        self._sink.end(end)
        self._queue.ended(self)

    def failed(self, error: TursiError) -> None:
        """Try again, or pass the failure on."""
        worker, self._worker = self._worker, None
        self._head = self._head if self.begun else None
        if worker is not None and isinstance(error, WorkerLost):
            self._queue.lost(self, worker, error)
        else:
            self._queue.survived(self)
            self.refuse(error)

    def refuse(self, error: TursiError) -> None:
        """Pass the failure on."""
        self._sink.failed(error)
        self._queue.ended(self)

    def _begin(self) -> None:
        self.begun = True
        head = self._head
        if head is None:
            return
        if self.mark is not None:
            head = _with(head, self.mark, self.generation)
        if self.position:
            head = _with(head, POSITION_HEADER, self.position)
        self._sink.head(head)


def _with(head: wire.Head, name: str, number: int) -> wire.Head:
    """The same with one header more."""
    return head._replace(headers={**head.headers, name: str(number)})
