"""Batches for the models that read a text once: by length, under a token budget, without waiting.

Requests are split into their inputs. Padding is what batching costs, so a
batch takes the inputs whose lengths are nearest to that of the oldest one:
nobody starves and little is padded.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

from tursi.errors import TursiError
from tursi.heartbeat import Operation, Writer
from tursi.inference.job import Job, incident
from tursi.inference.outbox import Outbox
from tursi.inference.scheduler import StickyError, sticky
from tursi.inference.tokens import Tokens
from tursi.model import Task, Usage
from tursi.tasks import TaskRequest, TaskResult

_FORWARD_COST = 64
"""Tokens whose computation takes about as long as one more forward's fixed cost."""


class Encoder(Protocol):
    """One task family: pure computation, no queues."""

    task: Task
    requests: tuple[type[TaskRequest], ...]
    max_batch_tokens: int

    def items(self, request: Any) -> list[Tokens]:
        """The inputs of a request, tokenised; ``TursiError`` for one that can't be used."""
        ...

    def compute(self, batch: Sequence[Tokens]) -> Sequence[Any]:
        """One forward; what it gives for each input."""
        ...

    def assemble(
        self, request: Any, items: Sequence[Tokens], outputs: Sequence[Any], usage: Usage
    ) -> TaskResult:
        """The result of a request from the outputs of its items."""
        ...


@dataclass(eq=False, slots=True)
class _Pending:
    """A request whose items wait or are partly done."""

    job: Job
    request: TaskRequest
    items: list[Tokens]
    outputs: list[Any]
    missing: int
    ended: bool = False
    began: float | None = None
    compute_seconds: float = 0.0
    batch_size: int = 0


@dataclass(eq=False, slots=True)
class _Item:
    pending: _Pending
    index: int
    tokens: Tokens
    length: int = field(init=False)
    done: bool = False

    def __post_init__(self) -> None:
        self.length = len(self.tokens.ids)


_LENGTH = attrgetter("length")


class Batcher:
    """The engine around an ``Encoder``."""

    def __init__(
        self, encoder: Encoder, outbox: Outbox, page: Writer, clock: Callable[[], float]
    ) -> None:
        self.task = encoder.task
        self.requests = encoder.requests
        self._encoder = encoder
        self._outbox = outbox
        self._page = page
        self._clock = clock
        self._pending: dict[Job, _Pending] = {}
        self._by_length: list[_Item] = []
        self._by_age: deque[_Item] = deque()

    @property
    def busy(self) -> bool:
        """Whether anything waits."""
        return bool(self._pending)

    def add(self, job: Job, request: TaskRequest) -> None:
        """Split a request into items and queue them."""
        items = self._encoder.items(request)
        pending = _Pending(job, request, items, [None] * len(items), len(items))
        self._pending[job] = pending
        for index, tokens in enumerate(items):
            item = _Item(pending, index, tokens)
            insort(self._by_length, item, key=_LENGTH)
            self._by_age.append(item)

    def step(self) -> None:
        """Drop what nobody waits for any more, then compute one batch."""
        now = self._clock()
        for pending in list(self._pending.values()):
            error = pending.job.over(now)
            if error is not None:
                self._fail(pending, error)
        batch = self._next_batch()
        if batch:
            self._compute(batch)

    def _next_batch(self) -> list[_Item]:
        while self._by_age and self._by_age[0].done:
            self._by_age.popleft()
        if not self._by_age:
            return []
        oldest = self._by_age[0]
        start = self._by_length.index(oldest)
        low, high = window(
            [item.length for item in self._by_length], start, self._encoder.max_batch_tokens
        )
        batch = self._by_length[low:high]
        del self._by_length[low:high]
        for item in batch:
            item.done = True
        return batch

    def _compute(self, batch: list[_Item]) -> None:
        began = self._clock()
        self._page.begin(Operation.BATCH)
        try:
            outputs = self._encoder.compute([item.tokens for item in batch])
        except Exception as error:  # noqa: BLE001 - whose fault it is, is found out there
            self._recover(batch, error)
            return
        seconds = self._clock() - began
        self._page.advance(len(batch))
        for item, output in zip(batch, outputs, strict=True):
            pending = item.pending
            pending.outputs[item.index] = output
            pending.missing -= 1
            pending.batch_size = max(pending.batch_size, len(batch))
        # A request with many inputs in one batch has waited for it once.
        for pending in {id(item.pending): item.pending for item in batch}.values():
            pending.began = began if pending.began is None else pending.began
            pending.compute_seconds += seconds
            if pending.missing == 0 and not pending.ended:
                self._finish(pending)

    def _recover(self, batch: list[_Item], error: Exception) -> None:
        """Find out whose fault it was: alone, an innocent input goes through."""
        if sticky(error):
            failure = incident(error)
            for pending in list(self._pending.values()):
                self._fail(pending, failure)
            raise StickyError from error
        if len(batch) > 1:
            for item in batch:
                if not item.pending.ended:
                    self._compute([item])
            return
        pending = batch[0].pending
        self._fail(pending, error if isinstance(error, TursiError) else incident(error))

    def _finish(self, pending: _Pending) -> None:
        job = pending.job
        usage = Usage(
            prompt_tokens=sum(len(tokens.ids) for tokens in pending.items),
            batch_size=pending.batch_size,
            queue_seconds=max(0.0, (pending.began or job.arrived) - job.arrived),
            compute_seconds=pending.compute_seconds,
        )
        try:
            result = self._encoder.assemble(pending.request, pending.items, pending.outputs, usage)
            answer = job.call.whole(result)
        except TursiError as error:
            self._fail(pending, error)
        except Exception as error:  # noqa: BLE001 - a defect must cost one request, not the worker
            self._fail(pending, incident(error))
        else:
            self._forget(pending)
            self._outbox.answer(job, answer, usage)

    def _fail(self, pending: _Pending, error: TursiError) -> None:
        if pending.missing:
            self._by_length = [item for item in self._by_length if item.pending is not pending]
            for item in self._by_age:
                item.done = item.done or item.pending is pending
        self._forget(pending)
        self._outbox.fail(pending.job, error)

    def _forget(self, pending: _Pending) -> None:
        pending.ended = True
        del self._pending[pending.job]


def window(lengths: Sequence[int], start: int, budget: int) -> tuple[int, int]:
    """The slice of the sorted ``lengths`` around ``start`` that makes a good batch.

    It stays under ``budget`` tokens, padding included, and stops growing where
    padding would cost more than another forward.
    """
    low, high = start, start + 1
    total = lengths[start]
    while True:
        grown = None
        # The neighbour that adds less padding comes first.
        down = lengths[high - 1] - lengths[low - 1] if low > 0 else None
        up = (lengths[high] - lengths[high - 1]) * (high - low) if high < len(lengths) else None
        if down is not None and (up is None or down <= up):
            grown = (low - 1, high, total + lengths[low - 1])
        elif up is not None:
            grown = (low, high + 1, total + lengths[high])
        if grown is None:
            return low, high
        padded = (grown[1] - grown[0]) * lengths[grown[1] - 1]
        if padded > budget or padded - grown[2] > grown[2] // 8 + _FORWARD_COST:
            return low, high
        low, high, total = grown
