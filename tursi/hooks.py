"""Telling the user's programs and URLs what happens, without ever waiting for them."""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from io import BytesIO
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

from twisted.internet import defer
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.protocol import Protocol as StreamProtocol
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import Agent, FileBodyProducer
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from tursi.config import Hook
from tursi.model import Event

QUEUE = 100
"""Events that wait for one hook; of more, the oldest are dropped."""
LOOK_SECONDS = 5.0
"""Between two looks at the health, where a hook wants to know."""
_TEXT = 4096
"""Characters of a message that are passed on."""

log = Logger()


class Running(Protocol):
    """A program that was started."""

    @property
    def finished(self) -> Deferred[Any]:
        """Fires with how it exited, once nothing of it is left."""
        ...

    def cancel(self) -> None:
        """Kill it and whatever it has started."""
        ...


Spawn = Callable[[str, tuple[str, ...]], Running]
"""Starts a program by name (of its log) and argv."""
Look = Callable[[], Deferred[str]]
"""Asks for the word for the daemon's health."""


class Hooks:
    """Calls what is configured; each hook has one call at a time and a bounded queue."""

    def __init__(
        self,
        settings: Sequence[Hook],
        *,
        spawn: Spawn,
        look: Look,
        reactor: Any,
        now: Callable[[], float],
    ) -> None:
        self._now = now
        self._look = look
        self._health = "healthy"
        self._spawn = spawn
        self._reactor = reactor
        self._numbers = itertools.count()
        self._lines = [self._line(each) for each in settings]
        self._left: list[Deferred[None]] = []
        """Ends of calls of hooks that are no longer configured."""
        self._looking = LoopingCall(self._look_soon)
        self._looking.clock = reactor

    @property
    def dropped(self) -> int:
        """Events that no hook was told for want of room."""
        return sum(line.dropped for line in self._lines)

    def start(self, watch: Callable[[Callable[[Event], None]], object]) -> None:
        """Hear of every event by ``watch``."""
        watch(self.happened)
        self._look_if_asked()

    def configure(self, settings: Sequence[Hook]) -> None:
        """Call these from now on; those that stay don't notice."""
        kept: list[Line] = []
        old = self._lines
        for each in settings:
            line = next((line for line in old if line.settings == each), None)
            if line is not None:
                old = [other for other in old if other is not line]
            kept.append(line or self._line(each))
        self._lines = kept
        self._left = [end for end in self._left if not end.called]
        self._left += [line.stop() for line in old]
        self._look_if_asked()

    def _line(self, settings: Hook) -> Line:
        # Without redirects, without a pool: a call leaves nothing behind.
        agent = Agent(self._reactor) if settings.url else None
        return Line(str(next(self._numbers)), settings, self._spawn, agent, self._reactor)

    def _look_if_asked(self) -> None:
        asked = any(line.wants(f"health.{word}") for line in self._lines for word in _HEALTH)
        if asked and not self._looking.running:
            self._looking.start(LOOK_SECONDS)
        elif not asked and self._looking.running:
            self._looking.stop()

    def stop(self) -> Deferred[Any]:
        """End every call; fires when nothing of them is left."""
        if self._looking.running:
            self._looking.stop()
        ends = [*self._left, *(line.stop() for line in self._lines)]
        return defer.DeferredList(ends, consumeErrors=True)

    def happened(self, event: Event) -> None:
        """Tell the hooks that want to know."""
        for line in self._lines:
            if line.wants(event.kind):
                line.put(event)

    def _look_soon(self) -> Deferred[None]:
        def known(word: str) -> None:
            before, self._health = self._health, word
            if word != before:
                message = f"Tursi is {word}, and was {before}."
                self.happened(Event(0, self._now(), f"health.{word}", None, message))

        # A look that fails says nothing, and must not end the looking.
        return self._look().addCallback(known).addErrback(lambda _: None)


_HEALTH = ("healthy", "degraded", "unhealthy")


class Line:
    """One hook, and what waits for it."""

    def __init__(self, name: str, settings: Hook, spawn: Spawn, agent: Any, reactor: Any) -> None:
        self._name = name
        self.settings = settings
        self._spawn = spawn
        self._agent = agent
        self._reactor = reactor
        self._waiting: deque[Event] = deque()
        self._busy = False
        self._abort: Callable[[], Any] = lambda: None
        self._idle: Deferred[None] | None = None
        self._stopped = False
        self.dropped = 0

    def wants(self, kind: str) -> bool:
        """Whether it is to be called for such an event."""
        return any(fnmatchcase(kind, each) for each in self.settings.on)

    def put(self, event: Event) -> None:
        """Call it for this event as soon as it is free."""
        if self._stopped:
            return
        if len(self._waiting) >= QUEUE:
            self._waiting.popleft()
            if not self.dropped:
                log.warn("the hook {hook} is too slow; events are dropped", hook=self._shown)
            self.dropped += 1
        self._waiting.append(event)
        # Not now: who tells of an event must not hear of what comes of it.
        self._reactor.callLater(0, self._next)

    def stop(self) -> Deferred[None]:
        """Drop what waits, and end what runs."""
        self._stopped = True
        self._waiting.clear()
        if not self._busy:
            return succeed(None)
        self._idle = Deferred()
        self._abort()
        return self._idle

    @property
    def _shown(self) -> str:
        # Not its arguments and not the whole URL: there may be secrets in them.
        return self.settings.command[0] if self.settings.command else _host(self.settings.url)

    def _next(self) -> None:
        if self._busy or not self._waiting:
            return
        event = self._waiting.popleft()
        text = body(event)
        call = self._run if self.settings.command else self._post
        self._busy = True
        running = maybeDeferred(call, text)
        running.addErrback(self._failed, event)
        running.addBoth(self._done)

    def _failed(self, failure: Failure, event: Event) -> None:
        if not self._stopped:
            log.warn(
                "the hook {hook} failed for {kind}: {why}",
                hook=self._shown,
                kind=event.kind,
                why=failure.getErrorMessage() or "it failed",
            )

    def _done(self, _: object) -> None:
        self._busy = False
        if self._idle is not None:
            self._idle.callback(None)
        elif self._waiting:
            self._reactor.callLater(0, self._next)

    # -- a program -------------------------------------------------------------------

    def _run(self, text: bytes) -> Deferred[None]:
        process = self._spawn(
            self._name,
            (sys.executable, "-I", "-m", "tursi.hook", text.decode(), *self.settings.command),
        )
        self._abort = process.cancel
        late: list[bool] = []

        def overdue() -> None:
            late.append(True)
            process.cancel()

        deadline = self._reactor.callLater(self.settings.seconds, overdue)

        def ended(outcome: Any) -> None:
            if deadline.active():
                deadline.cancel()
            if late:
                raise HookFailed(f"it took longer than {self.settings.seconds:g} s")
            if isinstance(outcome, Failure):
                outcome.raiseException()
            if outcome.signal is not None:
                raise HookFailed(f"it was ended by signal {outcome.signal}")
            if outcome.exit_status != 0:
                raise HookFailed(f"it exited with status {outcome.exit_status}")

        return process.finished.addBoth(ended)

    # -- a URL -----------------------------------------------------------------------

    def _post(self, text: bytes) -> Deferred[None]:
        headers = Headers({"Content-Type": ["application/json"], "User-Agent": ["tursi"]})
        url = self.settings.url.encode("ascii")
        asked = self._agent.request(b"POST", url, headers, FileBodyProducer(BytesIO(text)))
        self._abort = asked.cancel
        asked.addTimeout(self.settings.seconds, self._reactor)

        def answered(response: IResponse) -> None:
            # The status is all that matters; a body without end isn't waited for.
            response.deliverBody(_Unread())
            if not 200 <= response.code < 300:
                raise HookFailed(f"it answered with status {response.code}")

        def failed(failure: Failure) -> None:
            if failure.check(defer.TimeoutError):
                raise HookFailed(f"it took longer than {self.settings.seconds:g} s")
            failure.raiseException()

        return asked.addCallbacks(answered, failed)  # type: ignore[no-any-return]  # not annotated


class HookFailed(Exception):
    """What a hook has come to; only for the log."""


class _Unread(StreamProtocol):
    """Hangs up on the rest of an answer."""

    def connectionMade(self) -> None:  # noqa: N802 - Twisted's name
        if self.transport is not None:
            self.transport.loseConnection()


def body(event: Event) -> bytes:
    """What a hook is told: one JSON object."""
    value: Mapping[str, Any] = {
        "event": event.kind,
        "at": datetime.fromtimestamp(event.at, UTC).isoformat(timespec="milliseconds"),
        "deployment": event.deployment,
        "worker": event.worker,
        "message": event.message[:_TEXT],
        "cause": event.cause[:_TEXT] if event.cause else None,
    }
    return msgspec.json.encode(value)


def _host(url: str) -> str:
    return urlsplit(url).hostname or "a URL"
