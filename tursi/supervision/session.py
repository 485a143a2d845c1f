"""One life of a worker: its link, its probe, its record."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory

from tursi import wire
from tursi.config import Requests, Workers
from tursi.heartbeat import Beat
from tursi.lifecycle.inputs import Lifecycle
from tursi.lifecycle.liveness import Finding, Health, Liveness
from tursi.lifecycle.verdict import Intent, Verdict, classify, too_much
from tursi.model import (
    Dossier,
    Limits,
    Loaded,
    LoadOrder,
    Phase,
    Progress,
    WorkerLife,
    last_line,
    mebibytes,
)
from tursi.supervision import logs, procfs
from tursi.supervision.containment import Enclosure
from tursi.supervision.life import Exit, Life
from tursi.supervision.link import WorkerLink
from tursi.supervision.logs import LifeLog
from tursi.supervision.probe import Probe
from tursi.supervision.stacks import Stacks
from tursi.supervision.usage import Curve
from tursi.supervision.watch import MemoryWatch
from tursi.wire import Hello, LastWords

_SEND_BUFFER = 1024 * 1024
"""Bytes: large bodies cross the socket in fewer turns."""
KEPT_LINES = 200
KEPT_CHARACTERS = 128 * 1024
"""Of the log of a life that ended unasked."""


class Session:
    """Turns what one process says into inputs of the lifecycle.

    ``feed`` gives an input to the machine and has its effects done; ``record``
    takes the row of this life whenever it changes, ``progressed`` each step of
    loading, ``relieved`` is called when a full socket has room again, ``warned``
    takes the kind of an event and a sentence. The ``enclosure`` is somebody else's
    to end.
    """

    def __init__(
        self,
        life: WorkerLife,
        *,
        order: LoadOrder,
        settings: Workers,
        requests: Requests,
        log: LifeLog,
        reactor: Any,
        now: Callable[[], float],
        machine: Lifecycle,
        feed: Callable[..., None],
        record: Callable[[WorkerLife], Deferred[None] | None],
        progressed: Callable[[Progress], None],
        relieved: Callable[[], None],
        warned: Callable[[str, str], None],
        limits: Limits,
        enclosure: Enclosure,
        proc: Path,
    ) -> None:
        self.life = life
        self.log = log
        self.loaded: Loaded | None = None
        self._intent: Intent | None = None
        self._words: LastWords | None = None
        self._order = order
        self._settings = settings
        self._reactor = reactor
        self._machine = machine
        self._feed = feed
        self._record = record
        self._progressed = progressed
        self._relieved = relieved
        self._proc = proc
        self._limits = limits
        self._enclosure = enclosure
        self._warned = warned
        self._watch: MemoryWatch | None = None
        self._ended = False
        self._oom_kills = procfs.oom_kills(proc)
        self.link = WorkerLink(
            self,
            name=life.deployment,
            reference=life.uuid,
            max_requests=requests.max_in_flight,
            max_bytes=requests.max_worker_bytes,
            clock=reactor,
        )
        self.phase = Phase.SPAWNING
        """The last one before its end began."""
        self._probe: Probe | None = None
        self._stacks: Stacks | None = None
        self._curve = Curve(
            clock=reactor,
            now=now,
            read=self._read_usage,
            serves=lambda: self.life.ready_at is not None,
        )

    def configure(self, settings: Workers, requests: Requests) -> None:
        """Go by these from now on."""
        self._settings = settings
        self.link.bound(requests.max_in_flight, requests.max_worker_bytes)
        if self._probe is not None:
            self._probe.liveness.configure(settings)

    # -- its process --------------------------------------------------------------------

    def spawned(self, life: Life) -> None:
        """Write down which process it is, and listen to it."""
        self._change(
            boot_id=life.boot_id,
            keeper_pid=life.keeper_pid,
            keeper_start_time=life.keeper_start_time,
        )
        try:
            self._connect(life.socket)
        except OSError as error:
            # The process is there, so it has to go the way that processes go.
            self._tell(self._machine.broke, f"its data socket can't be used: {error.strerror}")

    def _connect(self, data: socket.socket) -> None:
        with data:
            data.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            # It duplicates the descriptor.
            self._reactor.adoptStreamConnection(
                data.fileno(), socket.AF_UNIX, Factory.forProtocol(lambda: self.link)
            )

    def started(self, pid: int) -> None:
        """The worker itself runs."""
        self._change(worker_pid=pid)
        self._watch_memory()
        if not self._ended:
            self._curve.start()

    def _watch_memory(self) -> None:
        """See to its limit, where the kernel doesn't."""
        limit, keeper = self._limits.memory, self.life.keeper_pid
        if self._ended or limit is None or keeper is None or self._enclosure.limits_memory:
            return
        watch = MemoryWatch(
            clock=self._reactor,
            limit=limit,
            read=lambda: procfs.memory_below(keeper, watch.soft, self._proc),
            near=lambda used: self._warned(
                "worker.memory",
                f"replica {self.life.replica} uses {mebibytes(used)} of the {mebibytes(limit)} "
                "that it may have",
            ),
            over=lambda used: self._tell(self._machine.exceeded, too_much(limit, used)),
        )
        self._watch = watch
        watch.start()

    def serves(self, at: float) -> None:
        """It became ready."""
        self._change(ready_at=at)

    def observe(self) -> None:
        """Look after its signs of life from now on."""
        if self._probe is None:
            device = self.loaded.device if self.loaded else ""
            self._probe = Probe(
                clock=self._reactor,
                liveness=Liveness(self._settings, on_processor=device == "cpu"),
                read=self._read_page,
                send=self.link.ping,
                found=self._found,
            )
        self._probe.start()

    def overlook(self) -> None:
        """Look no more."""
        if self._probe is not None:
            self._probe.stop()

    def examine(self) -> None:
        """Wait for it to tell where its threads stand."""
        if self._stacks is None:
            self.log.line("the worker hangs; it is asked where its threads stand")
            self._stacks = Stacks(
                self.log,
                self._reactor,
                lambda: self._tell(self._machine.examined, "it has told where its threads stand"),
            )

    @property
    def stacks(self) -> str:
        """Where the threads of a hung worker stood, one line a frame; else empty."""
        return self._stacks.text if self._stacks else ""

    @property
    def operation(self) -> str:
        """What the compute thread was last seen at in service, for people; empty if not known."""
        return self._probe.liveness.operation if self._probe else ""

    @property
    def asked(self) -> bool:
        """Whether it is ending because somebody wanted that."""
        return self._intent is not None and self._intent.failure is None

    def intend(self, intent: Intent) -> Deferred[None] | None:
        """Write down why the daemon ends it; fires when that is on the disk, or can't be."""
        self._intent = intent
        return self._change(intent=intent.name)

    def exited(self, ending: Exit, at: float) -> Verdict:
        """It has ended; why it has."""
        counted = self._enclosure.peak() or (self._watch.peak if self._watch else 0)
        ending = replace(ending, peak_rss=max(ending.peak_rss or 0, counted) or None)
        killed = self._enclosure.killed_for_memory()
        verdict = classify(
            ending,
            self._intent,
            self._words,
            loading=self.life.ready_at is None,
            # What a cgroup counts is the truth about its own processes.
            out_of_memory=procfs.oom_kills(self._proc) > self._oom_kills
            if killed is None
            else killed,
            limit=self._limits.memory if killed else None,
        )
        self._change(
            worker_pid=self.life.worker_pid or ending.worker_pid,
            exit_status=ending.exit_status,
            signal=ending.signal,
            peak_rss=ending.peak_rss,
            cpu_seconds=ending.cpu_seconds,
        )
        self.end(verdict, at)
        return verdict

    def end(self, verdict: Verdict, at: float) -> None:
        """Nothing of it is left."""
        self._ended = True
        self.overlook()
        self._curve.stop()
        if self._watch is not None:
            self._watch.stop()
        if self._stacks is not None:
            self._stacks.close()
        self._change(ended_at=at, failure=verdict.failure, reason=verdict.reason)
        self.log.line(f"the worker has ended: {verdict.reason}")

    def dossier(self) -> Dossier | None:
        """The evidence of its end, or ``None`` if it ended as it was asked to."""
        life = self.life
        if life.failure is None or life.ended_at is None:
            return None
        traceback = self._words.traceback if self._words else ""
        return Dossier(
            id=0,
            deployment=life.deployment,
            generation=life.generation,
            replica=life.replica,
            worker=life.uuid,
            at=life.ended_at,
            failure=life.failure,
            reason=life.reason or "",
            phase=self.phase,
            spawned_at=life.spawned_at,
            ready_at=life.ready_at,
            exit_status=life.exit_status,
            signal=life.signal,
            intent=life.intent,
            peak_rss=life.peak_rss,
            cpu_seconds=life.cpu_seconds,
            requests=self.link.lost,
            error=last_line(traceback),
            order=self._order,
            versions=self.loaded.versions if self.loaded else {},
            traceback=traceback or None,
            stacks=self.stacks or None,
            log=_bounded(logs.tail(self.log.path, KEPT_LINES)),
            usage=self._curve.samples,
        )

    def _read_usage(self) -> procfs.Usage | None:
        pid = self.life.worker_pid
        return procfs.usage(pid, self._proc) if pid else None

    def _change(self, **facts: Any) -> Deferred[None] | None:
        self.life = replace(self.life, **facts)
        return self._record(self.life)

    # -- what it says (``link.Owner``) -----------------------------------------------------

    def hello(self, hello: Hello) -> None:
        """Let it load, if it speaks our language."""
        if hello.protocol != wire.PROTOCOL_VERSION:
            self._tell(
                self._machine.incompatible,
                f"the worker speaks version {hello.protocol} of the protocol and the daemon "
                f"version {wire.PROTOCOL_VERSION}: install one version of Tursi only",
            )
            return
        self._tell(self._machine.hello, "the worker has said hello")
        self.link.load(self._order)

    def progress(self, progress: Progress) -> None:
        """Loading goes on."""
        if not self._ended:
            self._progressed(progress)
            warm = progress.stage == "warm"
            self._tell(self._machine.warming if warm else self._machine.advanced, progress.stage)

    def ready(self, loaded: Loaded) -> None:
        """It can serve."""
        self.loaded = loaded
        self._tell(self._machine.loaded, "the model is loaded")

    def last_words(self, words: LastWords) -> None:
        """It is about to exit."""
        self._words = words
        self._tell(self._machine.failing, words.message)

    def pong(self) -> None:
        """It lives."""
        # A count that can't be read at the moment is 0, and none goes down.
        self._oom_kills = max(self._oom_kills, procfs.oom_kills(self._proc))
        if self._probe is not None:
            self._probe.pong()

    def idle(self) -> None:
        """A request has ended."""
        # Asked first: this happens after every request, and the machine takes a while.
        if self.phase is Phase.DRAINING and not self.link.in_flight:
            self._tell(self._machine.drained, "nothing is in flight")

    def relieved(self) -> None:
        """It takes requests again."""
        self._relieved()

    def broke(self, reason: str) -> None:
        """It can't be understood any more."""
        self._tell(self._machine.broke, reason)

    def lost(self) -> None:
        """Its end of the socket has closed."""
        self._tell(self._machine.lost, "its data socket has closed")

    def _read_page(self) -> Beat | None:
        return self.link.page.read() if self.link.page else None

    def _found(self, finding: Finding) -> None:
        if finding.health is Health.WELL and self.phase is Phase.READY:
            return  # which is no news to the machine
        given = {
            Health.WELL: self._machine.answered,
            Health.SUSPECT: self._machine.missed,
            Health.HUNG: self._machine.hung,
        }
        self._tell(given[finding.health], finding.reason)

    def _tell(self, given: Callable[[str], None], cause: str) -> None:
        # An old life's socket may close after the next life has begun.
        if not self._ended:
            self._feed(given, cause)


def _bounded(lines: list[str]) -> tuple[str, ...]:
    """The last of them that fit into what is kept."""
    room, first = KEPT_CHARACTERS, len(lines)
    while first and len(lines[first - 1]) <= room:
        first -= 1
        room -= len(lines[first])
    return tuple(lines[first:])
