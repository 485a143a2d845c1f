"""The first request of a new generation: one of the daemon's own, the way of all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from tursi import wire
from tursi.errors import QueueFull, TursiError
from tursi.fleet.passage import Clock, Replica, Timer
from tursi.model import Task

REQUEST_ID = "smoke"
"""What the ids of these requests begin with."""
_ROUTE = "huggingface"
_BODIES: Mapping[str, bytes] = {
    # One of these is what the tokenizer calls its mask.
    Task.FILL_MASK.value: b'{"inputs": "One [MASK] or <mask>."}',
    Task.TEXT_GENERATION.value: b'{"inputs": "One", "parameters": {"max_new_tokens": 1}}',
}
_BODY = b'{"inputs": "One."}'
_SERVER_ERROR = 500
_MAX_KEPT = 4096


class Smoke:
    """Asks ``worker`` once; ``done`` is called with what is wrong, or ``None``."""

    def __init__(
        self,
        worker: Replica,
        *,
        task: str,
        name: str,
        seconds: float,
        clock: Clock,
        done: Callable[[str | None], None],
    ) -> None:
        self._worker = worker
        self._seconds = seconds
        self._done: Callable[[str | None], None] | None = done
        self._status = 0
        self._kept = b""
        self._id: int | None = None
        self._timer: Timer | None = clock.callLater(seconds, self._overdue)
        ask = wire.Ask(
            _ROUTE,
            f"{REQUEST_ID}-{name}",
            "application/json",
            seconds,
            _BODIES.get(task, _BODY),
        )
        try:
            self._id = worker.submit(ask, self)
        except QueueFull as error:
            self._finish(error.message)

    def head(self, head: wire.Head) -> None:
        """The answer begins."""
        self._status = head.status

    def body(self, data: bytes) -> None:
        """Keep as much as an error's message needs."""
        self._kept = (self._kept + data)[:_MAX_KEPT]

    def end(self, end: wire.End) -> None:
        """It is complete."""
        if self._status >= _SERVER_ERROR or end.error:
            said = _message(self._kept) or end.error or f"status {self._status}"
            self._finish(f"It could not answer a first request: {said}")
        else:
            # What it can't make of these few words isn't its fault.
            self._finish(None)

    def failed(self, error: TursiError) -> None:
        """The worker has gone."""
        self._finish(f"It could not answer a first request: {error.message}")

    def cancel(self) -> None:
        """Nobody wants to know any more."""
        self._done = None
        self._finish(None)
        if self._id is not None:
            self._worker.cancel(self._id)

    def _overdue(self) -> None:
        self._timer = None
        if self._id is not None:
            self._worker.cancel(self._id)
        self._finish(f"It has not answered a first request within {self._seconds:g} s.")

    def _finish(self, wrong: str | None) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        done, self._done = self._done, None
        if done is not None:
            done(wrong)


def _message(body: bytes) -> str | None:
    """What an error's body says, in either of the shapes that the faces have."""
    try:
        error = msgspec.json.decode(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.DecodeError, KeyError, TypeError):
        return None
