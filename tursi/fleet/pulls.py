"""Downloads that somebody asked for: started, watched, paused, tried again, never forgotten."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi.errors import FetchError, InternalError, InvalidRequest, TursiError
from tursi.fleet import retries
from tursi.fleet.journal import Journal
from tursi.hub import Hub
from tursi.model import Progress, Pull, PullState, PullStatus, Reference, Resolution, Trust
from tursi.store import Store

log = Logger()

LISTED = 100
"""Ended pulls that are listed."""
_WINDOW_SECONDS = 10.0
"""What the rate is taken over."""
_STILL_SECONDS = 1.0
"""Without progress before that counts, and is told of."""

_DOWNLOAD = "download"
"""The stage of which the rate is told."""

Watcher = Callable[[PullStatus], None]


class Rate:
    """Bytes per second over the last seconds; ``now`` is monotonic time."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque()

    def add(self, now: float, done: float) -> None:
        """So many bytes are there."""
        points = self._points
        points.append((now, done))
        while len(points) > 2 and now - points[1][0] >= _WINDOW_SECONDS:
            points.popleft()

    def value(self, now: float) -> float | None:
        """``None`` until that can be said; it falls to 0 while nothing comes."""
        if len(self._points) < 2:
            return None
        (first, before), (last, after) = self._points[0], self._points[-1]
        if now - last >= _WINDOW_SECONDS:
            return 0.0
        # What comes is told several times a second, so a pause is part of the rate.
        end = now if now - last > _STILL_SECONDS else last
        return max(0.0, (after - before) / (end - first)) if end > first else None


class _Going:
    """A pull that has not ended."""

    def __init__(self, pull: Pull) -> None:
        self.pull = pull
        self.running: Deferred[Resolution] | None = None
        self.timer: IDelayedCall | None = None
        self.attempts = 0
        """Since more has come than ever before."""
        self.most = 0.0
        """Bytes that have come so far."""
        self.next_try_at: float | None = None
        self.progress: Progress | None = None
        self.rate = Rate()
        self.still: IDelayedCall | None = None
        """Until it comes something may still come."""
        self.watchers: list[Watcher] = []

    def halt(self) -> None:
        """Leave the download, which ends it unless somebody else waits for it too."""
        running, self.running = self.running, None
        if running is not None:
            running.cancel()
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.still is not None:
            self.still.cancel()
            self.still = None
        self.progress = self.next_try_at = None
        self.rate = Rate()


class Pulls:
    """Owns the pulls; ``now`` gives UTC epoch seconds, ``reactor`` monotonic timers."""

    def __init__(
        self,
        *,
        store: Store,
        hub: Hub,
        journal: Journal,
        reactor: Any,
        now: Callable[[], float],
    ) -> None:
        self._store = store
        self._hub = hub
        self._journal = journal
        self._reactor = reactor
        self._now = now
        self._going: dict[int, _Going] = {}
        self._closed = False

    async def open(self) -> None:
        """Go on with what an earlier daemon had not finished."""
        for pull in await self._store.pulls(0):
            self._adopt(pull)

    def close(self) -> None:
        """Stop every download; the next daemon goes on with them."""
        self._closed = True
        for going in self._going.values():
            going.halt()
        self._going.clear()

    def progress(self, model: str) -> list[Progress]:
        """How far the downloads of that model are."""
        return [
            going.progress
            for going in self._going.values()
            if going.pull.model == model and going.progress is not None
        ]

    def using(self, repository: str) -> bool:
        """Whether a pull of this repository has not ended."""
        return any(
            Reference.parse(going.pull.model).repository == repository
            for going in self._going.values()
        )

    async def start(self, model: str, trust: Trust, by: str) -> PullStatus:
        """Download a model of the hub; ``InvalidRequest`` for what is no hub name.

        ``trust`` says what may come besides data.
        """
        reference = Reference.parse(model)
        if reference.folder is not None:
            raise InvalidRequest(
                "A folder is used where it is; only a model of the hub can be pulled.",
                param="model",
            )
        pull = await self._store.add_pull(str(reference), trust, by=by, at=self._now())
        return self._status(self._adopt(pull))

    async def pause(self, number: int, by: str) -> PullStatus:
        """Stop the download; what has arrived waits for ``resume``."""
        return await self._turn(number, PullState.PAUSED, by)

    async def resume(self, number: int, by: str) -> PullStatus:
        """Go on with a download that was paused."""
        return await self._turn(number, PullState.RUNNING, by)

    async def cancel(self, number: int, by: str) -> PullStatus:
        """Give it up."""
        return await self._turn(number, PullState.CANCELLED, by)

    async def newest(self) -> list[PullStatus]:
        """Those that have not ended and the latest others, newest first."""
        return [self._seen(pull) for pull in await self._store.pulls(LISTED)]

    async def one(self, number: int) -> PullStatus:
        """How it is; ``PullNotFound``."""
        return self._seen(await self._store.pull(number))

    def watch(self, number: int, callback: Watcher) -> Callable[[], None]:
        """Call back with each news of it until the answer is called."""
        going = self._going.get(number)
        if going is None:
            return lambda: None
        going.watchers.append(callback)
        return lambda: going.watchers.remove(callback) if callback in going.watchers else None

    # -- inside --------------------------------------------------------------------

    async def _turn(self, number: int, state: PullState, by: str) -> PullStatus:
        pull = await self._store.pull(number)
        ended = self._now() if state is PullState.CANCELLED else None
        wanted = replace(pull, state=state, ended_at=ended, error=None)
        pull = await self._store.set_pull(wanted, by=by, at=self._now())
        going = self._going.get(number)
        if going is None or pull.state is not state:
            return self._seen(pull)
        going.pull = pull
        if state is PullState.RUNNING:
            self._begin(going)
        else:
            going.halt()
        if state is PullState.CANCELLED:
            del self._going[number]
        self._tell(going)
        return self._status(going)

    def _adopt(self, pull: Pull) -> _Going:
        going = self._going.get(pull.id)
        if going is None:
            going = self._going[pull.id] = _Going(pull)
        going.pull = pull
        if pull.state is PullState.RUNNING:
            self._begin(going)
        return going

    def _begin(self, going: _Going) -> None:
        # What is wanted at the very end is kept for the next daemon.
        if going.running is not None or self._closed:
            return
        if going.timer is not None and going.timer.active():
            going.timer.cancel()
        going.timer = going.next_try_at = None

        def advanced(progress: Progress) -> None:
            going.progress = progress
            if progress.stage == _DOWNLOAD and progress.done is not None:
                going.rate.add(self._reactor.seconds(), progress.done)
                self._expect(going)
                if progress.done > going.most:
                    going.most, going.attempts = progress.done, 0
            self._tell(going)

        # Held before its callbacks are added: they may run at once.
        trust = Trust(going.pull.allow_pickle, going.pull.trust_remote_code)
        going.running = running = self._hub.resolve(
            Reference.parse(going.pull.model), advanced, trust
        )
        running.addCallbacks(
            lambda found: self._end(going, running, found),
            lambda failure: self._failed(going, running, failure),
        )

    def _expect(self, going: _Going) -> None:
        """Tell of it, again and again, when nothing comes."""

        def nothing() -> None:
            going.still = None
            if going.rate.value(self._reactor.seconds()):
                self._expect(going)
            self._tell(going)

        if going.still is not None:
            going.still.cancel()
        going.still = self._reactor.callLater(_STILL_SECONDS, nothing)

    def _failed(self, going: _Going, running: Deferred[Resolution], failure: Failure) -> None:
        if failure.check(CancelledError) or going.running is not running:
            return
        error = failure.value
        if not isinstance(error, TursiError):
            log.failure("the pull of {model} failed", failure, model=going.pull.model)
            error = InternalError(f"The download failed: {error}")
        if not (isinstance(error, FetchError) and error.passing):
            self._end(going, running, error)
            return
        going.halt()
        delay = retries.delay(going.attempts, error.retry_after)
        going.attempts += 1
        going.next_try_at = self._now() + delay
        going.timer = self._reactor.callLater(delay, self._again, going)
        going.pull = replace(going.pull, error=error.message)
        self._tell(going)

    def _again(self, going: _Going) -> None:
        going.timer = None
        self._begin(going)

    def _end(
        self, going: _Going, running: Deferred[Resolution], outcome: Resolution | TursiError
    ) -> None:
        if going.running is not running:
            return
        # It has fired: nothing is left to be cancelled.
        going.running = None
        going.halt()
        at = self._now()
        if isinstance(outcome, Resolution):
            pull = replace(
                going.pull,
                state=PullState.DONE,
                ended_at=at,
                error=None,
                folder=outcome.folder,
                commit=outcome.commit,
                size=outcome.size,
            )
        else:
            pull = replace(going.pull, state=PullState.FAILED, ended_at=at, error=outcome.message)
        going.pull = pull
        self._going.pop(pull.id, None)
        self._journal.hold(lambda: self._store.set_pull(pull, by="the daemon", at=at))
        self._tell(going)

    def _seen(self, pull: Pull) -> PullStatus:
        going = self._going.get(pull.id)
        return PullStatus(**_fields(pull)) if going is None else self._status(going)

    def _status(self, going: _Going) -> PullStatus:
        progress, remaining = going.progress, None
        rate = going.rate.value(self._reactor.seconds())
        if rate and progress is not None and progress.stage == _DOWNLOAD and progress.total:
            remaining = max(0.0, progress.total - (progress.done or 0.0)) / rate
        return PullStatus(
            **_fields(going.pull),
            progress=progress,
            rate=rate,
            remaining_seconds=remaining,
            next_try_at=going.next_try_at,
        )

    def _tell(self, going: _Going) -> None:
        if not going.watchers:
            return
        status = self._status(going)
        for watcher in tuple(going.watchers):
            try:
                watcher(status)
            except Exception:  # noqa: BLE001 - one that fails must not cost the others the news
                log.failure("telling of the pull of {model} failed", model=status.model)


def _fields(pull: Pull) -> dict[str, Any]:
    return {name: getattr(pull, name) for name in Pull.__dataclass_fields__}
