"""Stand-ins that several tests share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

from zope.interface import implementer

from twisted.enterprise.adbapi import ConnectionPool
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready
from twisted.internet.interfaces import IReactorProcess
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure

from tursi.errors import TursiError
from tursi.model import Dossier, Phase, WorkerLife
from tursi.wire import End, Head

T = TypeVar("T")


def result(deferred: Deferred[T]) -> T:
    """What ``deferred`` has fired with; raises what it has failed with."""
    found: list[Any] = []
    deferred.addCallbacks(found.append, lambda failure: found.append(failure.value))
    assert found, "the Deferred has not fired"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]  # type: ignore[no-any-return]


class InlineReactor(MemoryReactorClock):
    """A reactor in memory whose other threads are this one."""

    def callFromThread(  # noqa: N802 - Twisted's name
        self,
        callable: Callable[..., object],  # noqa: A002
        *args: object,
        **kwargs: object,
    ) -> None:
        """Call at once."""
        callable(*args, **kwargs)


class InlineThreadPool:
    """A thread pool that does everything at once, in the caller's thread."""

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    def callInThreadWithCallback(  # noqa: N802 - Twisted's name
        self,
        finished: Callable[[bool, object], None],
        function: Callable[..., object],
        *args: object,
        **kwargs: object,
    ) -> None:
        """Call ``function``, then ``finished`` with its success and result."""
        try:
            result: object = function(*args, **kwargs)
        except Exception:  # noqa: BLE001 - the pool hands over whatever it was
            finished(False, Failure())
        else:
            finished(True, result)


class InlineConnectionPool(ConnectionPool):
    """Database connections without threads: every Deferred has fired when it is returned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.threadpool: Any = InlineThreadPool()


class RecordedKeeper:
    """The transport of a keeper that isn't there: records what is done to it, dies when told."""

    def __init__(self, protocol: Any, arguments: list[str], environment: dict[str, str]) -> None:
        self.pid: int | None = os.getpid()  # any that /proc knows
        self.protocol = protocol
        self.arguments = arguments
        self.environment = environment
        self.signals: list[str | int] = []
        self.closed: list[int] = []

    def signalProcess(self, signalID: str | int) -> None:  # noqa: N802, N803 - Twisted's names
        """Record the signal."""
        if self.pid is None:
            raise ProcessExitedAlready
        self.signals.append(signalID)

    def closeChildFD(self, descriptor: int) -> None:  # noqa: N802 - Twisted's name
        """Record the descriptor."""
        self.closed.append(descriptor)

    def write(self, fd: int, data: bytes) -> None:
        """Have the child write."""
        self.protocol.childDataReceived(fd, data)

    def report(self, **event: object) -> None:
        """Have the keeper write a status line."""
        self.write(5, json.dumps(event).encode() + b"\n")

    def exit(self, *, signal: int | None = None, killed: int = 0) -> None:
        """The worker and then the keeper end as they should."""
        status = 0 if signal is None else None
        self.report(
            event="exited", exit_status=status, signal=signal, peak_rss=9_000_000, cpu_seconds=0.5
        )
        self.report(event="cleared", killed=killed)
        self.die(ProcessDone(0))

    def die(self, reason: Exception) -> None:
        """The keeper ends."""
        self.pid = None
        self.protocol.processExited(Failure(reason))


@implementer(IReactorProcess)
class SpawningReactor(Clock):
    """A clock that also records spawns; ``refusal`` is raised instead if it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.keepers: list[RecordedKeeper] = []
        self.refusal: Exception | None = None

    def spawnProcess(  # type: ignore[override]  # the interface is generic  # noqa: N802
        self,
        processProtocol: Any,  # noqa: N803 - the same
        executable: str,
        args: Any = (),
        env: Any = None,
        path: str | None = None,
        uid: int | None = None,
        gid: int | None = None,
        usePTY: bool = False,  # noqa: N803 - the same
        childFDs: Any = None,  # noqa: N803 - the same
    ) -> Any:
        """Record a keeper, and let its protocol know."""
        if self.refusal is not None:
            raise self.refusal
        keeper = RecordedKeeper(processProtocol, list(args), dict(env))
        self.keepers.append(keeper)
        processProtocol.makeConnection(keeper)
        return keeper


class RecordedSink:
    """Where an answer goes; keeps it."""

    def __init__(self) -> None:
        self.heads: list[Head] = []
        self.pieces: list[bytes] = []
        self.ends: list[End] = []
        self.errors: list[TursiError] = []

    @property
    def data(self) -> bytes:
        """The body so far."""
        return b"".join(self.pieces)

    @property
    def done(self) -> bool:
        """Whether it has ended well."""
        return bool(self.ends)

    def head(self, head: Head) -> None:
        """Keep it."""
        self.heads.append(head)

    def body(self, data: bytes) -> None:
        """Keep it."""
        self.pieces.append(data)

    def end(self, end: End) -> None:
        """Keep it."""
        assert not self.ends
        assert not self.errors
        self.ends.append(end)

    def failed(self, error: TursiError) -> None:
        """Keep it."""
        assert not self.ends
        assert not self.errors
        self.errors.append(error)


class Recorder:
    """An observer of workers; keeps what they tell."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.phases: list[Phase] = []
        """Of all workers, without repetition."""
        self.causes: list[str] = []
        self.lives: dict[str | None, WorkerLife] = {}
        self.dossiers: list[Dossier] = []
        self.warnings: list[tuple[str, str]] = []

    def changed(self, worker: Any, cause: str) -> None:
        """Keep phase and cause."""
        self.causes.append(cause)
        if not self.phases or self.phases[-1] is not worker.phase:
            self.phases.append(worker.phase)

    def warned(self, worker: Any, kind: str, message: str) -> None:
        """Keep kind and sentence."""
        self.warnings.append((kind, message))

    def life(self, life: WorkerLife) -> Deferred[None] | None:
        """Keep the row."""
        self.lives[life.uuid] = life
        return None

    def refused(self, worker: object, why: str) -> None:
        """Keep what the system said."""
        self.refusals.append(why)

    def crashed(self, dossier: Dossier) -> None:
        """Keep the evidence."""
        self.dossiers.append(dossier)
