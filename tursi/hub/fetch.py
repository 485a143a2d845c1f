"""One download by one fetcher process, shared by all who wait for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi.errors import FetchError, FetchInterrupted, HubUnreachable, TursiError, by_code
from tursi.model import Progress, Resolution
from tursi.wire import Frame, Kind, LastWords

log = Logger()


class Running(Protocol):
    """A fetcher process."""

    @property
    def finished(self) -> Deferred[Any]:
        """Fires when the process and its tree are gone: with how it exited, or fails."""
        ...

    def cancel(self) -> None:
        """Kill it; ``finished`` fires soon."""
        ...


class Spawn(Protocol):
    """Starts a fetcher process."""

    def __call__(
        self,
        name: str,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        receive: Callable[[Frame], None],
        /,
    ) -> Running:
        """``receive`` gets each frame that it writes."""
        ...


@dataclass(eq=False)
class _Waiter:
    result: Deferred[Resolution]
    progress: Callable[[Progress], None]


class Fetch:
    """A download from before its process is spawned until that process is gone.

    The waiters' Deferreds fire at the very end, when nothing of it runs any
    more. A download that makes no progress for ``stall_seconds`` is given up.
    """

    def __init__(
        self,
        model: str,
        spawn: Callable[[Callable[[Frame], None]], Running],
        *,
        slots: DeferredSemaphore,
        stall_seconds: float,
        reactor: Any,
    ) -> None:
        self._model = model
        self._spawn = spawn
        self._slots = slots
        self._stall_seconds = stall_seconds
        self._reactor = reactor
        self._waiters: list[_Waiter] = []
        self._latest: Progress | None = None
        self._outcome: Resolution | TursiError | None = None
        self._slot: Deferred[Any] | None = None
        self._running: Running | None = None
        self._stall: IDelayedCall | None = None
        self._at_end: list[Callable[[], None]] = []
        self.closed = False
        """Whether nobody may join any more."""

    def at_end(self, call: Callable[[], None]) -> None:
        """Call that when nothing of the download is left."""
        self._at_end.append(call)

    def start(self) -> None:
        """Spawn the fetcher as soon as there is a slot."""
        self._slot = self._slots.acquire()
        self._slot.addCallbacks(self._start, self._not_started)

    def wait(self, progress: Callable[[Progress], None]) -> Deferred[Resolution]:
        """The result; cancelling the last such Deferred cancels the download."""

        def leave(_: Deferred[Resolution]) -> None:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            if not self._waiters:
                self.cancel(FetchError(f"Nobody waits for {self._model} any more."))

        waiter = _Waiter(Deferred(leave), progress)
        self._waiters.append(waiter)
        if self._latest is not None:
            self._advance(waiter, self._latest)
        return waiter.result

    def cancel(self, error: TursiError) -> None:
        """Kill the fetcher; who still waits gets ``error`` unless the model had come already."""
        self.closed = True
        self._outcome = self._outcome or error
        if self._running is not None:
            self._running.cancel()
        elif self._slot is not None:
            self._slot.cancel()

    # -- the process -----------------------------------------------------------------

    def _start(self, _: object) -> None:
        self._stall = self._reactor.callLater(self._stall_seconds, self._stalled)
        try:
            self._running = running = self._spawn(self._receive)
        except Exception:  # noqa: BLE001 - whatever it is, there is no fetcher
            self._ended(Failure())
        else:
            running.finished.addBoth(self._ended)

    def _not_started(self, failure: Failure) -> None:
        failure.trap(CancelledError)
        self._finish()

    def _receive(self, frame: Frame) -> None:
        try:
            self._heard(frame)
        except msgspec.MsgspecError as error:
            log.warn(
                "the fetcher of {model} is not understood: {error}", model=self._model, error=error
            )
            self.cancel(FetchError(f"The download of {self._model} broke: {error}."))

    def _heard(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.PROGRESS:
                progress = msgspec.msgpack.decode(frame.body, type=Progress)
                # Only what advances puts the deadline off, not that it is still there.
                if self._stall is not None and progress != self._latest:
                    self._stall.reset(self._stall_seconds)
                self._latest = progress
                for waiter in tuple(self._waiters):
                    self._advance(waiter, progress)
            case Kind.READY:
                self._outcome = msgspec.msgpack.decode(frame.body, type=Resolution)
            case Kind.FAILED:
                words = msgspec.msgpack.decode(frame.body, type=LastWords)
                if words.traceback:
                    log.error(
                        "the fetcher of {model} failed: {traceback}",
                        model=self._model,
                        traceback=words.traceback,
                    )
                kind = by_code().get(words.code, FetchError)
                self._outcome = kind(words.message, retry_after=words.retry_after)
            case _:
                raise msgspec.DecodeError(f"a frame of kind {frame.kind}")

    def _stalled(self) -> None:
        self._stall = None
        self.cancel(
            HubUnreachable(
                f"The download of {self._model} made no progress for {self._stall_seconds:.0f} "
                "seconds and was given up; check the network and try again."
            )
        )

    def _ended(self, result: object) -> None:
        self._slots.release()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        if self._outcome is None:
            how = _how(result)
            log.error("the fetcher of {model} {how}", model=self._model, how=how)
            # One that exits by itself would do so again.
            interrupted = (
                isinstance(result, Failure) or getattr(result, "exit_status", None) is None
            )
            self._outcome = (FetchInterrupted if interrupted else FetchError)(
                f"The download of {self._model} ended early: the fetcher {how}; its log says more."
            )
        self._finish()

    def _finish(self) -> None:
        self.closed = True
        for call in self._at_end:
            call()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if waiter.result.called:
                continue  # cancelled by what another one's result has set off
            if isinstance(self._outcome, Resolution):
                waiter.result.callback(self._outcome)
            else:
                waiter.result.errback(Failure(self._outcome))

    def _advance(self, waiter: _Waiter, progress: Progress) -> None:
        try:
            waiter.progress(progress)
        except Exception:  # noqa: BLE001 - one listener must not cost the others the download
            log.failure("telling the progress of {model} failed", model=self._model)


def _how(result: object) -> str:
    if isinstance(result, Failure):
        return f"could not be started ({result.getErrorMessage()})"
    if (signal := getattr(result, "signal", None)) is not None:
        return f"was ended by signal {signal}"
    if (refusal := getattr(result, "refusal", None)) is not None:
        return f"could not be started ({refusal.message})"
    if (status := getattr(result, "exit_status", None)) is not None:
        return f"exited with status {status} and no word"
    return "was ended together with its keeper"
