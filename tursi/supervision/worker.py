"""One replica of a deployment, over all its lives."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from tursi.config import Requests, Workers
from tursi.errors import QueueFull
from tursi.lifecycle.machine import lifecycle
from tursi.lifecycle.tally import Tally
from tursi.lifecycle.verdict import Intent, Verdict, not_spawned
from tursi.model import (
    Dossier,
    FailureClass,
    Limits,
    Loaded,
    LoadOrder,
    Phase,
    Progress,
    WorkerLife,
    WorkerStatus,
)
from tursi.supervision import procfs
from tursi.supervision.containment import Encloser, Enclosure
from tursi.supervision.deadlines import Deadlines
from tursi.supervision.life import Exit, Launch, Life
from tursi.supervision.lines import plain, structured
from tursi.supervision.link import Sink
from tursi.supervision.logs import LifeLog
from tursi.supervision.session import Session
from tursi.wire import Ask

log = Logger()

_LOADS = frozenset({Phase.LOADING, Phase.WARMING})
_PROBED = frozenset({Phase.READY, Phase.SUSPECT})
_NO_PROCESS = frozenset(
    {Phase.STOPPED, Phase.QUEUED, Phase.BACKOFF, Phase.QUARANTINED, Phase.FAILED}
)
_WAITS = frozenset({Phase.BACKOFF, Phase.QUARANTINED})
_ENDS = frozenset({Phase.STOPPING, Phase.KILLING, Phase.SETTLING, Phase.WEDGED})
INTENT_SECONDS = 1.0
"""How long a signal waits at most until its reason is on the disk."""
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})
_COMES_UP = frozenset({Phase.QUEUED, Phase.SPAWNING, Phase.LOADING, Phase.WARMING})


class Observer(Protocol):
    """Who is told about workers."""

    def changed(self, worker: Worker, cause: str) -> None:
        """Its phase or progress changed, or it takes requests again; ``cause`` is one clause."""

    def life(self, life: WorkerLife) -> Deferred[None] | None:
        """A row to insert or update; fires when it is on the disk, or can't be."""

    def refused(self, worker: Worker, why: str) -> None:
        """The system has no process, descriptor or memory left for another keeper."""

    def warned(self, worker: Worker, kind: str, message: str) -> None:
        """Something is not as it should be; ``kind`` is an event's, the message a sentence."""

    def crashed(self, dossier: Dossier) -> None:
        """A life has ended unasked; called after its last row, before its new phase."""


class Monitor(Protocol):
    """Who spawns (``supervision.monitor.WorkerMonitor``)."""

    def addChild(self, child: Any) -> None:  # noqa: N802 - Twisted's manner
        """Look after ``child``."""

    def startProcess(self, name: str) -> None:  # noqa: N802 - the same
        """Ask it whether to spawn now."""

    def removeProcess(self, name: str) -> Deferred[None]:  # noqa: N802 - the same
        """Forget it."""

    def terminate(self, name: str) -> None:
        """SIGTERM."""

    def examine(self, name: str) -> None:
        """Have it write where its threads stand."""

    def kill(self, name: str) -> None:
        """SIGKILL to the tree."""


class Worker:
    """A lifecycle with its process: what the fleet, the monitor and the machine each see of it.

    ``reactor`` gives monotonic timers and adopts sockets, ``now`` UTC epoch
    seconds, ``random`` numbers in [0, 1); ``logs`` is the folder for a log file
    per life; ``proc`` is where the kernel tells about processes. ``place`` says on
    which device to load what was asked for on one.
    """

    def __init__(
        self,
        *,
        name: str,
        deployment: str,
        replica: int,
        generation: int,
        order: LoadOrder,
        command: tuple[str, ...],
        environment: Mapping[str, str],
        logs: Path,
        settings: Workers,
        requests: Requests,
        monitor: Monitor,
        reactor: Any,
        random: Callable[[], float],
        now: Callable[[], float],
        observer: Observer,
        limits: Limits = Limits(),  # noqa: B008 - a frozen value
        encloser: Encloser | None = None,
        place: Callable[[str], str] = lambda device: device,
        proc: Path = procfs.PROC,
    ) -> None:
        self.name = name
        self.deployment = deployment
        self.replica = replica
        self.generation = generation
        self.phase = Phase.STOPPED
        self.uuid: str | None = None
        """Of the present life, or of the last one."""
        self._order = order
        self._command = command
        self._environment = environment
        self._logs = logs
        self._settings = settings
        self._requests = requests
        self._monitor = monitor
        self._reactor = reactor
        self._now = now
        self._observer = observer
        self._limits = limits
        self._encloser = encloser or Encloser()
        self._enclosure: Enclosure | None = None
        self._place = place
        self._proc = proc
        self._tally = Tally(settings, random)
        self._machine = lifecycle(self, Deadlines(reactor, self._feed), self._tally)
        self._actions: deque[Callable[[], None]] = deque()
        self._intended: Deferred[None] | None = None
        """Of the reason that is being written down, and that signals wait for."""
        self._session: Session | None = None
        self._monitored = False
        self._may_spawn = False
        self._lives = 0
        self._wait: float | None = None
        self._next_try_at: float | None = None
        self._since = now()
        self._reason: str | None = None
        self._failure: FailureClass | None = None
        self._progress: Progress | None = None
        self._stopping: list[Deferred[None]] = []

    # -- for the fleet --------------------------------------------------------------------

    @property
    def loaded(self) -> Loaded | None:
        """What the present life has loaded."""
        return self._session.loaded if self._session else None

    @property
    def log(self) -> LifeLog | None:
        """The log of the present life."""
        return self._session.log if self._session else None

    @property
    def asked(self) -> bool:
        """Whether it is ending because somebody wanted that."""
        return self._session is not None and self._session.asked

    @property
    def threads(self) -> int:
        """Those that it computes with."""
        return self._order.threads

    @property
    def order(self) -> LoadOrder:
        """What it is told to load, as it was asked for."""
        return self._order

    @property
    def folder(self) -> str:
        """Of the model's files."""
        return self._order.folder

    @property
    def in_flight(self) -> int:
        """Requests that it holds."""
        return self._session.link.in_flight if self._session else 0

    @property
    def queued_bytes(self) -> int:
        """Bytes of the bodies of those."""
        return self._session.link.queued_bytes if self._session else 0

    def remember(self, lives: Iterable[WorkerLife]) -> None:
        """How it failed under an earlier daemon, oldest first; before ``start``."""
        self._tally.restore(lives, self._reactor.seconds(), self._now())

    def configure(self, settings: Workers, requests: Requests) -> None:
        """Go by these from now on, without a restart."""
        self._settings = self._tally.settings = settings
        self._requests = requests
        if self._session is not None:
            self._session.configure(settings, requests)

    def start(self) -> None:
        """Queue; ``admit`` follows when there is room."""
        self._reason = self._failure = None
        self._feed(self._machine.start, "it shall run")

    def admit(self) -> None:
        """Spawn now."""
        self._feed(self._machine.admit, "there is room for it")

    def stop(self) -> Deferred[None]:
        """Drain, SIGTERM, SIGKILL; fires when it has ended or can't be killed."""
        stopped: Deferred[None] = Deferred()
        self._stopping.append(stopped)
        self._feed(self._machine.stop, "it was asked to stop")
        self._end_stopping()
        return stopped

    def hurry(self) -> None:
        """If it drains, don't wait for that any more."""
        self._feed(self._machine.drained, "nobody waits for it any more")

    def hasten(self) -> None:
        """If it waits for its next try, try now."""
        self._feed(self._machine.retry, "there is memory again")

    def restart(self) -> None:
        """Drain, end, and come back."""
        self._feed(self._machine.restart, "it was asked to restart")

    def reset(self) -> None:
        """Forget its failures, and try again now if it had given up."""
        self._reason = self._failure = None
        self._feed(self._machine.reset, "its failures were forgotten")

    def submit(self, ask: Ask, sink: Sink) -> int:
        """Send a request; its id. ``QueueFull`` at the limits, and unless the phase is READY."""
        if self.phase is not Phase.READY or self._session is None:
            raise QueueFull("The worker isn't ready; try again shortly.", retry_after=1)
        return self._session.link.submit(ask, sink)

    def cancel(self, id: int) -> None:  # noqa: A002 - the frame's own word
        """Stop working on a request; its sink hears nothing any more."""
        if self._session is not None:
            self._session.link.cancel(id)

    def status(self) -> WorkerStatus:
        """How it is now."""
        pid = self._session.life.worker_pid if self._session else None
        usage = procfs.usage(pid, self._proc) if pid else None
        loaded = self.loaded
        return WorkerStatus(
            name=self.name,
            replica=self.replica,
            phase=self.phase,
            since=self._since,
            uuid=self.uuid,
            generation=self.generation,
            pid=pid,
            reason=self._reason,
            failure=self._failure,
            failures=self._tally.failures,
            restarts=max(self._lives - 1, 0),
            next_try_at=self._next_try_at,
            progress=self._progress,
            in_flight=self.in_flight,
            rss=usage.rss if usage else None,
            cpu_seconds=usage.cpu_seconds if usage else None,
            task=loaded.task if loaded else None,
            device=loaded.device if loaded else None,
            dtype=loaded.dtype if loaded else None,
        )

    # -- for the monitor (``monitor.Child``) ---------------------------------------------------

    def may_spawn(self) -> bool:
        """Whether to spawn now; when the restart timer has fired, this queues it."""
        if not self._may_spawn:
            self._feed(self._machine.retry, "its next try is due")
        return self._may_spawn

    def launch(self) -> Launch:
        """A new life."""
        self._may_spawn = False
        self._lives += 1
        self.uuid = uuid4().hex
        self._enclosure = self._encloser.enclose(
            self.uuid,
            self._limits,
            model=self._order.folder,
            command=self._command,
            environment=self._environment,
        )
        life_log = LifeLog(
            self._logs / f"{self.uuid}.log",
            clock=self._now,
            size=self._settings.log_bytes,
            rate=self._settings.log_bytes_per_second,
            form=(
                structured(self.deployment, self.generation, self.replica, self.uuid)
                if self._settings.log_format == "json"
                else plain
            ),
        )
        self._session = Session(
            WorkerLife(
                uuid=self.uuid,
                deployment=self.deployment,
                generation=self.generation,
                replica=self.replica,
                boot_id="",
                spawned_at=self._now(),
            ),
            order=self._placed(),
            settings=self._settings,
            requests=self._requests,
            log=life_log,
            reactor=self._reactor,
            now=self._now,
            machine=self._machine,
            feed=self._feed,
            record=self._observer.life,
            progressed=self._progressed,
            relieved=lambda: self._notify("it takes requests again"),
            warned=lambda kind, message: self._observer.warned(self, kind, message),
            limits=self._limits,
            enclosure=self._enclosure,
            proc=self._proc,
        )
        return Launch(
            self.uuid, self._command, self._environment, life_log, self._enclosure.confinement
        )

    def _placed(self) -> LoadOrder:
        """What it is told, with the device that was chosen for it."""
        device = self._place(self._order.device)
        if device == self._order.device:
            return self._order
        why = (
            "it fits on none of the GPUs alone"
            if "," in device
            else "of the GPUs it fits there best"
        )
        return replace(self._order, device=device, device_because=why)

    def spawned(self, life: Life) -> None:
        """The keeper is there."""
        if self._session is not None:
            self._session.spawned(life)

    def worker_started(self, pid: int) -> None:
        """The worker is there."""
        if self._session is not None:
            self._session.started(pid)

    def spawn_failed(self, error: Exception) -> float | None:
        """Nothing is there; seconds until the next try."""
        verdict = not_spawned(error)
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            self._observer.refused(self, os.strerror(error.errno))
        return self._ended(verdict)

    def exited(self, exit: Exit) -> float | None:  # noqa: A002 - the field's word
        """Everything is gone; seconds until the next try, ``None`` to stay down."""
        if self._session is None:
            return None
        if exit.refusal is not None and exit.refusal.number in _SHORTAGES:
            self._observer.refused(self, os.strerror(exit.refusal.number))
        verdict = self._session.exited(exit, self._now())
        dossier = self._session.dossier()
        if dossier is not None:
            with log.failuresHandled("the crash of {worker} is not recorded", worker=self.name):
                self._observer.crashed(dossier)
        return self._ended(verdict)

    def _ended(self, verdict: Verdict) -> float | None:
        self._may_spawn = False
        if self._enclosure is not None:
            self._enclosure.end()
        self._session = self._progress = self._enclosure = self._intended = None
        self._failure = verdict.failure
        self._feed(self._machine.exited, verdict)
        return self._wait if self.phase in _WAITS else None

    # -- for the lifecycle (``lifecycle.inputs.Effects``) ------------------------------------------

    def announce(self, phase: Phase, cause: str) -> None:
        """Take on the phase, and tell."""
        if phase is Phase.FAILED and self.phase is Phase.QUEUED:
            self._failure = FailureClass.RESOURCE
        self.phase = phase
        self._since = self._now()
        if self._session is not None and phase not in _ENDS:
            self._session.phase = phase
        if phase in {Phase.READY, Phase.STOPPED}:
            self._reason = self._failure = None
        elif phase not in _COMES_UP:
            # While it comes up again, why it had to is still of interest.
            self._reason = cause
        if phase not in _LOADS:
            self._progress = None
        if phase not in _WAITS:
            self._wait = self._next_try_at = None
        self._act(lambda: self._entered(phase, cause))

    def spawn(self) -> None:
        """Have the monitor spawn."""
        self._act(self._spawn)

    def drain(self) -> None:
        """Say so if there is nothing in flight; else the link will."""
        self._act(self._drain)

    def terminate(self) -> None:
        """SIGTERM."""
        self._act(lambda: self._when_intended(lambda: self._monitor.terminate(self.name)))

    def kill(self) -> None:
        """SIGKILL to the tree; what is in flight fails now."""
        self._act(self._kill)

    def intend(self, intent: Intent) -> None:
        """Record why."""
        self._act(lambda: self._intend(intent))

    def examine(self) -> None:
        """Have it tell where its threads stand, and listen."""
        self._act(self._examine)

    def settle(self) -> None:
        """Nothing to wait for: host memory is free as soon as the process is gone."""
        self._act(lambda: self._feed(self._machine.settled, "its memory is free"))

    def retry(self, seconds: float) -> None:
        """The monitor hears it as the answer to ``exited``."""
        self._wait = seconds
        self._next_try_at = self._now() + seconds

    # -- acting ---------------------------------------------------------------------------------

    def _feed(self, given: Callable[..., None], *arguments: Any) -> None:
        """Give the machine an input, then do what it wants done.

        Never while it is in a transition: what is done may give it inputs, and
        the monitor wants to know at once what comes of ``exited``.
        """
        given(*arguments)
        while self._actions:
            action = self._actions.popleft()
            try:
                action()
            except Exception:  # noqa: BLE001 - the deadlines see to what a defect leaves undone
                log.failure("{worker}: an action failed", worker=self.name)

    def _act(self, action: Callable[[], None]) -> None:
        self._actions.append(action)

    def _entered(self, phase: Phase, cause: str) -> None:
        session = self._session
        if session is not None:
            if phase is Phase.READY and session.life.ready_at is None:
                session.serves(self._now())
            if phase in _PROBED:
                session.observe()
            else:
                session.overlook()
        log.info("{worker} is {phase}: {cause}", worker=self.name, phase=phase.value, cause=cause)
        self._notify(cause)
        self._end_stopping()

    def _spawn(self) -> None:
        self._may_spawn = True
        if self._monitored:
            self._monitor.startProcess(self.name)
        else:
            self._monitored = True
            self._monitor.addChild(self)
        if self._may_spawn:
            self._ended(not_spawned(RuntimeError("the monitor isn't running")))

    def _drain(self) -> None:
        if not self.in_flight:
            self._feed(self._machine.drained, "nothing is in flight")

    def _kill(self) -> None:
        if self._session is not None:
            self._session.link.close()
        self._when_intended(lambda: self._monitor.kill(self.name))

    def _examine(self) -> None:
        if self._session is not None:
            self._session.examine()
            self._when_intended(lambda: self._monitor.examine(self.name))

    def _intend(self, intent: Intent) -> None:
        if self._session is not None:
            self._intended = self._session.intend(intent)

    def _when_intended(self, send: Callable[[], None]) -> None:
        """Send a signal once its reason is on the disk, or can't get there in time."""
        intended, session = self._intended, self._session
        if intended is None or intended.called:
            send()
            return
        sent = False

        def once(_: object = None) -> None:
            nonlocal sent
            if late.active():
                late.cancel()
            # The next life has nothing to do with it.
            if not sent and self._session is session:
                sent = True
                send()

        late = self._reactor.callLater(INTENT_SECONDS, once)
        intended.addBoth(once)

    def _progressed(self, progress: Progress) -> None:
        if self.phase in _LOADS:
            self._progress = progress
            self._act(lambda: self._notify(progress.stage))

    def _notify(self, cause: str) -> None:
        self._observer.changed(self, cause)

    def _end_stopping(self) -> None:
        """Tell who waits for the end, if it has come."""
        if self.phase is Phase.STOPPED and self._monitored:
            self._monitored = False
            self._monitor.removeProcess(self.name).addBoth(lambda _: self._end_stopping())
        elif self.phase is Phase.WEDGED or self.phase in _NO_PROCESS:
            stopping, self._stopping = self._stopping, []
            for stopped in stopping:
                stopped.callback(None)
