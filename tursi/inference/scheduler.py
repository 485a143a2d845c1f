"""The compute thread's loop: takes what has arrived, lets the engine do one step, repeats."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Protocol

from tursi.errors import TaskNotSupported, TursiError
from tursi.faces.route import Context
from tursi.heartbeat import Operation, Writer
from tursi.inference.job import Job, incident
from tursi.inference.outbox import Outbox
from tursi.model import Task
from tursi.tasks import TaskRequest


class Engine(Protocol):
    """Computes the requests of one task; owned by the compute thread."""

    task: Task
    requests: tuple[type[TaskRequest], ...]
    """The types of requests it takes."""

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""
        ...

    def add(self, job: Job, request: TaskRequest) -> None:
        """Queue a request; ``TursiError`` if it can't be done at all."""
        ...

    def step(self) -> None:
        """Compute one batch or one decode step, and put what comes of it into the outbox.

        Answers every job that it loses to an error; only an error that makes
        the process useless leaves it.
        """
        ...


class Scheduler:
    """Feeds one engine; ``page`` tells the daemon whether it does."""

    def __init__(
        self,
        *,
        arrivals: queue.SimpleQueue[Job | None],
        engine: Engine,
        outbox: Outbox,
        page: Writer,
        deployment: str,
        clock: Callable[[], float],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._arrivals = arrivals
        self._engine = engine
        self._outbox = outbox
        self._page = page
        self._deployment = deployment
        self._clock = clock
        self._wall_clock = wall_clock
        self._stopping = False

    def run(self) -> int:
        """Work until a ``None`` arrives and all before it is done; the exit status.

        Raises ``StickyError`` when every request has been answered that it concerns.
        """
        while True:
            self._take()
            if self._engine.busy:
                try:
                    self._engine.step()
                except StickyError:
                    self._outbox.flush()
                    raise
            elif self._stopping:
                return 0
            self._outbox.flush()

    def _take(self) -> None:
        """Everything that is queued; waits only when there is nothing to compute."""
        try:
            while True:
                block = not self._engine.busy and not self._stopping
                if block:
                    # Nothing may be left lying in the outbox while we wait.
                    self._outbox.flush()
                    self._page.begin(Operation.IDLE)
                job = self._arrivals.get(block=block)
                if job is None:
                    self._stopping = True
                else:
                    self._begin(job)
        except queue.Empty:
            pass

    def _begin(self, job: Job) -> None:
        self._page.begin(Operation.PREPARE)
        over = job.over(self._clock())
        if over is not None:
            self._outbox.fail(job, over)
            return
        try:
            self._engine.add(job, self._decoded(job))
        except TursiError as error:
            self._outbox.fail(job, error)
        except Exception as defect:  # noqa: BLE001 - a defect must cost one request, not the worker
            self._outbox.fail(job, incident(defect))

    def _decoded(self, job: Job) -> TaskRequest:
        task = self._engine.task
        if task not in job.route.tasks:
            raise TaskNotSupported(
                f"The model {self._deployment!r} does {task.value}, which this route doesn't serve."
            )
        context = Context(
            deployment=self._deployment,
            task=task,
            request_id=job.ask.request_id,
            created=int(self._wall_clock()),
        )
        job.call = job.route.decode(job.ask.body, job.ask.content_type, context)
        request = job.call.request
        if not isinstance(request, self._engine.requests):
            raise TaskNotSupported(
                f"The model {self._deployment!r} does {task.value}, not what was asked."
            )
        return request


class StickyError(Exception):
    """The accelerator is lost to this process; only a new one can go on."""


def sticky(error: BaseException) -> bool:
    """Whether ``error`` poisons every later computation (a device assert, an illegal address)."""
    # By name: this module doesn't import torch.
    return type(error).__name__ == "AcceleratorError"
