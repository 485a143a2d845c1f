"""Answers on their way out: everything of one batch or decode step in one write."""

from __future__ import annotations

from collections.abc import Callable

from tursi.errors import TursiError
from tursi.faces.route import Answer
from tursi.inference.job import Job
from tursi.model import Usage
from tursi.wire import NO_USAGE, End, Head, Kind, encode, encode_end, encode_head, encode_tokens

_BODY_PIECE = 1024 * 1024
"""Bytes of an answer per BODY frame, far below the frame limit."""


class Outbox:
    """Collects frames until ``flush``; belongs to one thread."""

    def __init__(self, send: Callable[[bytes], None], ended: Callable[[Job], None]) -> None:
        self._send = send
        self._ended = ended
        self._heads: list[bytes] = []
        self._pieces: list[tuple[int, bytes]] = []
        self._tails: list[bytes] = []

    def answer(self, job: Job, answer: Answer, usage: Usage = NO_USAGE, error: str = "") -> None:
        """A whole answer."""
        job.opened = True
        head = Head(answer.status, answer.content_type, dict(answer.headers or {}))
        self._tails.append(encode(Kind.HEAD, job.id, encode_head(head)))
        body = memoryview(answer.body)
        for start in range(0, len(body), _BODY_PIECE):
            self._tails.append(encode(Kind.BODY, job.id, body[start : start + _BODY_PIECE]))
        self._end(job, usage, error)

    def stream(self, job: Job, data: bytes) -> None:
        """A piece of a streamed answer; the first piece is preceded by the head."""
        if not job.opened:
            job.opened = True
            head = encode_head(Head(200, "text/event-stream", {}))
            self._heads.append(encode(Kind.HEAD, job.id, head))
            data = job.call.opening() + data
        if data:
            self._pieces.append((job.id, data))

    def close(self, job: Job, usage: Usage) -> None:
        """The end of a stream that went well."""
        self.stream(job, job.call.closing(usage))
        self._end(job, usage, "")

    def fail(self, job: Job, error: TursiError, usage: Usage = NO_USAGE) -> None:
        """The end of a request that failed, in the protocol's shape; silent if cancelled."""
        if job.cancelled:
            self._end(job, usage, error.code)
        elif job.opened:
            self._pieces.append((job.id, job.call.failure(error)))
            self._end(job, usage, error.code)
        else:
            self.answer(job, job.route.error(error), usage, error.code)

    def flush(self) -> None:
        """Write what was collected."""
        if not (self._heads or self._pieces or self._tails):
            return
        frames = self._heads
        if self._pieces:
            frames.append(encode(Kind.TOKENS, 0, encode_tokens(self._pieces)))
        frames += self._tails
        self._heads, self._pieces, self._tails = [], [], []
        self._send(b"".join(frames))

    def _end(self, job: Job, usage: Usage, error: str) -> None:
        self._tails.append(encode(Kind.END, job.id, encode_end(End(usage, error))))
        self._ended(job)
