"""An engine on a bench: real model, real frames, no process and no threads."""

from __future__ import annotations

import itertools
import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tursi.errors import TursiError, by_code
from tursi.faces.route import Answer, Context, Route, status_of
from tursi.heartbeat import SIZE, Writer
from tursi.inference.job import Job
from tursi.inference.loader import load
from tursi.inference.outbox import Outbox
from tursi.model import LoadOrder, Task, Usage
from tursi.tasks import Delta, TaskRequest, TaskResult
from tursi.wire import Ask, Decoder, End, Frame, Kind, decode_end, decode_tokens

T = TypeVar("T")


class RecordedCall:
    """A call that keeps what it is asked to encode."""

    def __init__(self, request: TaskRequest, *, stream: bool = False) -> None:
        self.request = request
        self.stream = stream
        self.result: TaskResult | None = None
        self.deltas: list[Delta] = []

    def whole(self, result: TaskResult) -> Answer:
        self.result = result
        return Answer(200, "text/plain", b"whole")

    def opening(self) -> bytes:
        return b"<"

    def delta(self, delta: Delta) -> bytes:
        self.deltas.append(delta)
        return delta.text.encode()

    def closing(self, usage: Usage) -> bytes:
        return b">"

    def failure(self, error: TursiError) -> bytes:
        return f"!{error.code}".encode()


def answer_error(error: TursiError) -> Answer:
    """An error as the tests' own protocol shows it."""
    return Answer(status_of(error), "text/plain", f"{error.code} {error.message}".encode())


def no_codec(body: bytes, content_type: str, context: Context) -> RecordedCall:
    """The bench hands over decoded requests."""
    raise AssertionError("nothing is decoded on the bench")


def bench_route(decode: Any = no_codec, tasks: frozenset[Task] = frozenset(Task)) -> Route:
    """A route of no real protocol."""
    return Route(
        name="test",
        path="/test",
        model="body",
        tasks=tasks,
        decode=decode,
        error=answer_error,
        failure=lambda error: error.code.encode(),
        summary="",
        body=(),
        reply=(),
    )


class Bench:
    """Loads a model and feeds its engine by hand."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic, **order: Any):
        self.written: list[bytes] = []
        self.outbox = Outbox(self.written.append, lambda job: None)
        self.engine, self.loaded = load(
            LoadOrder("bench", str(folder), **order),
            self.outbox,
            Writer(mmap.mmap(-1, SIZE)),
            lambda progress: None,
            clock,
        )
        self._clock = clock
        self._ids = itertools.count(1)

    def ask(self, request: TaskRequest, *, stream: bool = False, seconds: float = 600.0) -> Job:
        """Queue a request as the scheduler would."""
        job = Job(
            id=next(self._ids),
            ask=Ask("test", "id", "application/json", seconds, b""),
            route=bench_route(),
            arrived=self._clock(),
        )
        job.call = RecordedCall(request, stream=stream)
        self.engine.add(job, request)
        return job

    def step(self) -> None:
        """One step and its write."""
        self.engine.step()
        self.outbox.flush()

    def run(self, steps: int = 5000) -> None:
        """Until nothing is left to do."""
        for _ in range(steps):
            if not self.engine.busy:
                return
            self.step()
        raise AssertionError(f"still busy after {steps} steps")

    def results(self, *requests: TaskRequest, type_: type[T]) -> list[T]:
        """What the requests give when they are computed together."""
        jobs = [self.ask(request) for request in requests]
        self.run()
        found: list[T] = []
        for job in jobs:
            end = self.end(job)
            if end.error:
                raise by_code()[end.error](self.body(job).decode())
            result = recorded(job).result
            assert isinstance(result, type_)
            found.append(result)
        return found

    def frames(self) -> list[Frame]:
        """Everything that was written."""
        return list(Decoder().feed(b"".join(self.written)))

    def body(self, job: Job) -> bytes:
        """The answer's bytes."""
        parts = []
        for frame in self.frames():
            if frame.kind == Kind.TOKENS:
                parts += [data for id_, data in decode_tokens(frame.body) if id_ == job.id]
            elif frame.kind == Kind.BODY and frame.id == job.id:
                parts.append(frame.body)
        return b"".join(parts)

    def end(self, job: Job) -> End:
        """The one END of the answer."""
        (end,) = [
            decode_end(frame.body)
            for frame in self.frames()
            if frame.kind == Kind.END and frame.id == job.id
        ]
        return end


def recorded(job: Job) -> RecordedCall:
    """The job's call, which is a recorded one on the bench."""
    call = job.call
    assert isinstance(call, RecordedCall)
    return call
