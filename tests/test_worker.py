from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import LoggedFailures
from fakes import RecordedSink, Recorder
from test_cgroup import Kernel

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from tursi import wire
from tursi.config import Requests, Workers
from tursi.errors import QueueFull
from tursi.model import FailureClass, Limits, Loaded, LoadOrder, Phase, Progress, WorkerLife
from tursi.supervision.cgroup import Groups
from tursi.supervision.containment import Encloser
from tursi.supervision.life import Exit, Launch, Life, Refusal
from tursi.supervision.link import WorkerLink
from tursi.supervision.worker import Worker
from tursi.wire import Ask, End, Frame, Head, Hello, Kind, LastWords

ASK = Ask("openai.embeddings", "r1", "application/json", 10.0, b"{}")
ORDER = LoadOrder("echo", "/models/echo")


class Wire:
    """The transport of a link, which keeps what leaves."""

    def __init__(self) -> None:
        self.sent = b""
        self.aborted = False

    def getHandle(self) -> Wire:  # noqa: N802 - Twisted's name
        return self

    def send(self, data: bytes) -> int:
        self.sent += data
        return len(data)

    def registerProducer(self, producer: object, streaming: bool) -> None:  # noqa: N802 - the same
        pass

    def abortConnection(self) -> None:  # noqa: N802 - the same
        self.aborted = True


class AdoptingReactor(Clock):
    """A clock that connects links to a ``Wire``."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[WorkerLink] = []
        self.wires: list[Wire] = []
        self.refusal: OSError | None = None

    def adoptStreamConnection(self, fd: int, family: int, factory: Any) -> None:  # noqa: N802 - the same
        assert family == socket.AF_UNIX
        if self.refusal is not None:
            raise self.refusal
        link = factory.buildProtocol(None)
        self.wires.append(Wire())
        link.makeConnection(self.wires[-1])
        self.links.append(link)


class RecordedMonitor:
    """Does what the monitor does, without processes."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.running = True
        self.refusal: Exception | None = None
        self.children: dict[str, Worker] = {}
        self.launches: list[Launch] = []
        self.alive: set[str] = set()
        self.signals: list[str] = []
        self.restart: Any = None

    def addChild(self, child: Worker) -> None:  # noqa: N802 - the same
        assert child.name not in self.children
        self.children[child.name] = child
        self.startProcess(child.name)

    def startProcess(self, name: str) -> None:  # noqa: N802 - the same
        self.forget()
        child = self.children[name]
        if not self.running or name in self.alive or not child.may_spawn():
            return
        try:
            launch = child.launch()
        except OSError as error:
            self.schedule(name, child.spawn_failed(error))
            return
        if self.refusal is not None:
            self.schedule(name, child.spawn_failed(self.refusal))
            return
        self.launches.append(launch)
        self.alive.add(name)
        ours, theirs = socket.socketpair()
        theirs.close()
        child.spawned(Life(launch.uuid, 100, 5, "boot", ours))
        assert ours.fileno() == -1
        child.worker_started(101)

    def removeProcess(self, name: str) -> Deferred[None]:  # noqa: N802 - the same
        assert name not in self.alive
        del self.children[name]
        self.forget()
        gone: Deferred[None] = Deferred()
        gone.callback(None)
        return gone

    def terminate(self, name: str) -> None:
        self.signals.append("TERM")

    def examine(self, name: str) -> None:
        self.signals.append("USR2")

    def kill(self, name: str) -> None:
        self.signals.append("KILL")

    def end(self, name: str, **facts: Any) -> float | None:
        """The process has ended; what the child wants then."""
        self.alive.discard(name)
        delay = self.children[name].exited(Exit(worker_pid=101, reported=True, **facts))
        self.schedule(name, delay)
        return delay

    def schedule(self, name: str, delay: float | None) -> None:
        if delay is not None and name in self.children:
            self.restart = self.clock.callLater(delay, self.startProcess, name)

    def forget(self) -> None:
        if self.restart is not None and self.restart.active():
            self.restart.cancel()
        self.restart = None


class World:
    def __init__(self, folder: Path, observer: Recorder | None = None, **confined: Any) -> None:
        self.folder = folder
        self.jump = 0.0
        self.proc = folder / "proc"
        self.proc.mkdir()
        (self.proc / "vmstat").write_text("nr_free_pages 1\noom_kill 4\n")
        self.reactor = AdoptingReactor()
        self.monitor = RecordedMonitor(self.reactor)
        self.observer = observer or Recorder()
        self.worker = Worker(
            name="echo.1.0#1",
            deployment="echo",
            replica=0,
            generation=1,
            order=ORDER,
            command=("/python", "-m", "worker"),
            environment={"PATH": "/bin"},
            logs=folder / "logs",
            settings=Workers(),
            requests=Requests(max_in_flight=2),
            monitor=self.monitor,
            reactor=self.reactor,
            random=lambda: 0.5,
            now=lambda: 1_000_000 + self.reactor.seconds() + self.jump,
            observer=self.observer,
            proc=self.proc,
            **confined,
        )

    @property
    def name(self) -> str:
        return self.worker.name

    def say(self, kind: Kind, body: object = b"", id_: int = 0) -> None:
        encoded = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
        self.reactor.links[-1].dataReceived(wire.encode(kind, id_, encoded))

    def heard(self) -> list[Frame]:
        self.reactor.advance(0)
        line = self.reactor.wires[-1]
        sent, line.sent = line.sent, b""
        return list(wire.Decoder().feed(sent))

    def spawn(self) -> World:
        self.worker.start()
        self.worker.admit()
        return self

    def load(self) -> World:
        self.say(Kind.HELLO, Hello(wire.PROTOCOL_VERSION, 101, 6))
        return self

    def ready(self) -> World:
        self.spawn().load()
        self.say(Kind.READY, Loaded("fill-mask", "cpu", "float32"))
        assert self.worker.phase is Phase.READY
        return self

    def lose(self) -> None:
        self.reactor.links[-1].connectionLost(Failure(ConnectionDone()))

    def life(self) -> Any:
        return self.observer.lives[self.worker.uuid]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_life_from_start_to_ready(world: World) -> None:
    world.spawn()
    launch = world.monitor.launches[0]
    assert (launch.uuid, launch.arguments, launch.environment) == (
        world.worker.uuid, ("/python", "-m", "worker"), {"PATH": "/bin"},
    )  # fmt: skip
    world.load()
    (order,) = world.heard()
    assert msgspec.msgpack.decode(order.body, type=LoadOrder) == ORDER
    progress = Progress("load", 1, 4)
    world.say(Kind.PROGRESS, progress)
    assert world.worker.status().progress == progress
    assert world.observer.causes[-1] == "load"
    world.say(Kind.PROGRESS, Progress("warm"))
    assert world.worker.phase is Phase.WARMING
    world.reactor.advance(3)
    world.say(Kind.READY, Loaded("fill-mask", "cpu", "float32"))
    status = world.worker.status()
    assert (status.phase, status.progress, status.task) == (Phase.READY, None, "fill-mask")
    assert (status.pid, status.uuid, status.restarts) == (101, launch.uuid, 0)
    life = world.life()
    assert (life.keeper_pid, life.keeper_start_time, life.boot_id) == (100, 5, "boot")
    assert (life.worker_pid, life.spawned_at, life.ready_at) == (101, 1_000_000, 1_000_003)
    assert world.observer.phases == [
        Phase.QUEUED, Phase.SPAWNING, Phase.LOADING, Phase.WARMING, Phase.READY,
    ]  # fmt: skip


def test_requests_pass_only_while_it_is_ready(world: World) -> None:
    world.spawn()
    with pytest.raises(QueueFull, match="isn't ready"):
        world.worker.submit(ASK, RecordedSink())
    world.load()
    world.say(Kind.READY, Loaded("fill-mask", "cpu", "float32"))
    sink = RecordedSink()
    id_ = world.worker.submit(ASK, sink)
    assert (world.worker.in_flight, world.worker.queued_bytes) == (1, 2)
    world.say(Kind.HEAD, wire.encode_head(Head(200, "application/json", {})), id_)
    world.say(Kind.END, wire.encode_end(End(wire.NO_USAGE, "")), id_)
    assert sink.done
    world.worker.submit(ASK, RecordedSink())
    world.worker.cancel(world.worker.submit(ASK, RecordedSink()))
    world.worker.submit(ASK, RecordedSink())
    with pytest.raises(QueueFull, match="already holds 2"):
        world.worker.submit(ASK, RecordedSink())


def test_a_death_fails_what_is_in_flight_and_comes_back_by_the_monitors_timer(
    world: World,
) -> None:
    world.ready()
    first, sink = world.worker.uuid, RecordedSink()
    world.worker.submit(ASK, sink)
    world.lose()
    assert [error.reference for error in sink.errors] == [first]
    assert world.worker.phase is Phase.STOPPING
    assert world.monitor.end(world.name, signal=11, peak_rss=9, cpu_seconds=0.5) == 1.0
    status = world.worker.status()
    assert (status.phase, status.reason) == (Phase.BACKOFF, "crashed with signal 11 (SIGSEGV)")
    assert (status.failure, status.next_try_at) == (FailureClass.CRASH, 1_000_001)
    assert (status.pid, status.uuid) == (None, first)
    life = world.life()
    assert (life.ended_at, life.signal, life.peak_rss, life.cpu_seconds, life.intent) == (
        1_000_000, 11, 9, 0.5, None,
    )  # fmt: skip
    assert "the worker has ended: crashed" in (world.folder / f"logs/{first}.log").read_text()
    world.reactor.advance(1)
    assert (world.worker.phase, len(world.monitor.launches)) == (Phase.QUEUED, 1)
    assert world.worker.status().reason == "crashed with signal 11 (SIGSEGV)"
    world.worker.admit()
    assert len(world.monitor.launches) == 2
    world.load()
    world.say(Kind.READY, Loaded("fill-mask", "cpu", "float32"))
    status = world.worker.status()
    assert (status.reason, status.failure, status.restarts) == (None, None, 1)
    assert world.worker.uuid != first


def test_an_old_socket_that_closes_late_does_not_touch_the_next_life(world: World) -> None:
    world.ready()
    world.monitor.end(world.name, exit_status=0)
    world.reactor.advance(1)
    world.worker.admit()
    world.load()
    world.reactor.links[0].connectionLost(Failure(ConnectionDone()))
    assert world.worker.phase is Phase.LOADING


def test_stop_drains_terminates_and_forgets(world: World) -> None:
    world.ready()
    sink = RecordedSink()
    id_ = world.worker.submit(ASK, sink)
    stopped = world.worker.stop()
    assert (world.worker.phase, world.monitor.signals) == (Phase.DRAINING, [])
    assert world.life().intent == "stop"
    world.say(Kind.HEAD, wire.encode_head(Head(200, "application/json", {})), id_)
    world.say(Kind.END, wire.encode_end(End(wire.NO_USAGE, "")), id_)
    assert (sink.done, world.monitor.signals) == (True, ["TERM"])
    assert not stopped.called
    assert world.monitor.end(world.name, exit_status=0) is None
    assert stopped.called
    assert (world.worker.phase, world.monitor.children) == (Phase.STOPPED, {})
    assert (world.life().failure, world.life().reason) == (None, "it was asked to stop")
    world.reactor.advance(0)
    assert world.reactor.getDelayedCalls() == []
    again = world.worker.stop()
    assert again.called


def test_stop_escalates_and_ends_even_when_nothing_can_be_killed(world: World) -> None:
    world.ready()
    sink = RecordedSink()
    world.worker.submit(ASK, sink)
    stopped = world.worker.stop()
    world.reactor.advance(30)
    assert world.monitor.signals == ["TERM"]
    world.reactor.advance(10)
    assert world.monitor.signals == ["TERM", "KILL"]
    assert len(sink.errors) == 1
    world.reactor.advance(5)
    assert (world.worker.phase, stopped.called) == (Phase.WEDGED, True)
    assert world.worker.status().reason == "the worker outlives SIGKILL since 5 s"
    world.reactor.advance(30)
    assert world.monitor.signals == ["TERM", "KILL", "KILL"]
    world.monitor.end(world.name, signal=9)
    assert (world.worker.phase, world.monitor.children) == (Phase.STOPPED, {})


def test_stop_during_back_off_never_restarts(world: World) -> None:
    world.ready()
    world.monitor.end(world.name, signal=9)
    stopped = world.worker.stop()
    assert stopped.called
    world.reactor.advance(1000)
    assert (len(world.monitor.launches), world.worker.phase) == (1, Phase.STOPPED)
    world.worker.start()
    world.worker.admit()
    assert len(world.monitor.launches) == 2


def test_who_waits_for_a_stop_that_was_taken_back_is_told_too(world: World) -> None:
    world.ready()
    stopped = world.worker.stop()
    world.worker.start()
    assert world.monitor.end(world.name, exit_status=0) is None
    assert (world.worker.phase, stopped.called) == (Phase.QUEUED, True)
    world.worker.admit()
    assert len(world.monitor.launches) == 2


def test_restart_comes_back_at_once(world: World) -> None:
    world.ready()
    world.worker.restart()
    assert world.monitor.signals == ["TERM"]
    assert world.monitor.end(world.name, exit_status=0) is None
    assert world.worker.phase is Phase.QUEUED
    assert (world.life().intent, world.life().failure) == ("restart", None)


def test_reset_and_start_lead_out_of_failure(world: World) -> None:
    world.spawn().load()
    words = LastWords("weights_corrupt", "The weights are damaged.")
    world.say(Kind.FAILED, words)
    assert world.monitor.end(world.name, exit_status=65) is None
    status = world.worker.status()
    assert (status.phase, status.reason, status.failure) == (
        Phase.FAILED, "The weights are damaged.", FailureClass.WEIGHTS,
    )  # fmt: skip
    world.worker.reset()
    assert (world.worker.phase, world.worker.status().reason) == (Phase.QUEUED, None)


def test_a_spawn_that_fails_is_tried_again_in_five_seconds(world: World) -> None:
    world.monitor.refusal = OSError(24, "Too many open files")
    world.spawn()
    assert world.observer.refusals == ["Too many open files"]
    status = world.worker.status()
    assert (status.phase, status.failure) == (Phase.BACKOFF, FailureClass.HOST)
    assert status.reason == "the worker couldn't be started: Too many open files"
    world.monitor.refusal = None
    world.reactor.advance(5)
    world.worker.admit()
    assert world.worker.phase is Phase.SPAWNING


@pytest.mark.parametrize(
    ("number", "shortage"),
    [(12, "Cannot allocate memory"), (11, "Resource temporarily unavailable"), (2, None)],
)
def test_what_keeps_a_keeper_from_starting_its_worker(
    world: World, number: int, shortage: str | None
) -> None:
    world.spawn()
    world.monitor.end(world.name, refusal=Refusal(number, "what it says"))
    status = world.worker.status()
    assert (status.phase, status.failure) == (Phase.BACKOFF, FailureClass.HOST)
    assert status.reason == "the worker couldn't be started: what it says"
    assert world.observer.refusals == ([shortage] if shortage else [])


class SlowRecorder(Recorder):
    """Writes rows that are on the disk when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.writing: list[Deferred[None]] = []

    def life(self, life: Any) -> Deferred[None]:
        super().life(life)
        self.writing.append(Deferred())
        return self.writing[-1]


def test_no_signal_is_sent_before_its_reason_is_on_the_disk(tmp_path: Path) -> None:
    observer = SlowRecorder()
    world = World(tmp_path, observer)
    world.ready()
    world.worker.stop()
    assert (world.life().intent, world.monitor.signals) == ("stop", [])
    observer.writing[-1].callback(None)
    assert world.monitor.signals == ["TERM"]
    world.reactor.advance(10)
    assert world.monitor.signals == ["TERM", "KILL"]


def test_a_signal_waits_a_second_for_a_database_that_does_not_answer(tmp_path: Path) -> None:
    observer = SlowRecorder()
    world = World(tmp_path, observer)
    world.ready()
    world.say(Kind.HELLO, Hello(1, 7, 8))
    assert (world.life().intent, world.monitor.signals) == ("protocol", [])
    world.reactor.advance(0.9)
    assert world.monitor.signals == []
    world.reactor.advance(0.1)
    assert world.monitor.signals == ["KILL"]
    observer.writing[-1].callback(None)
    assert world.monitor.signals == ["KILL"]


def test_a_signal_that_comes_too_late_does_not_meet_the_next_life(tmp_path: Path) -> None:
    observer = SlowRecorder()
    world = World(tmp_path, observer)
    world.ready()
    world.worker.restart()
    late = observer.writing[-1]
    world.monitor.end(world.name, exit_status=0)
    world.reactor.advance(0)
    world.worker.admit()
    assert world.worker.phase is Phase.SPAWNING
    late.callback(None)
    world.reactor.advance(2)
    assert world.monitor.signals == []


def test_the_device_is_chosen_at_each_start(tmp_path: Path) -> None:
    chosen = iter(["cuda:0", "cuda:1"])
    world = World(tmp_path, place=lambda asked: next(chosen))
    for expected in ("cuda:0", "cuda:1"):
        world.spawn() if expected == "cuda:0" else world.worker.admit()
        world.load()
        [load] = [each for each in world.heard() if each.kind == Kind.LOAD]
        assert msgspec.msgpack.decode(load.body, type=LoadOrder).device == expected
        world.monitor.end(world.name, exit_status=86)
        world.reactor.advance(2)


def test_a_monitor_that_does_not_run_spawns_nothing_and_keeps_nobody_waiting(
    world: World,
) -> None:
    world.monitor.running = False
    world.spawn()
    assert world.worker.phase is Phase.BACKOFF
    assert world.worker.stop().called


def test_another_protocol_version_is_killed_and_final(world: World) -> None:
    world.spawn()
    world.say(Kind.HELLO, Hello(99, 101, 6))
    assert world.monitor.signals == ["KILL"]
    assert world.life().intent == "incompatible"
    assert world.reactor.wires[0].aborted
    assert world.monitor.end(world.name, signal=9) is None
    status = world.worker.status()
    assert (status.phase, status.failure) == (Phase.FAILED, FailureClass.PROTOCOL)
    assert "version 99" in (status.reason or "")


def test_garbage_is_killed_and_tried_again(world: World) -> None:
    world.ready()
    world.reactor.links[-1].dataReceived(b"GET / HTTP/1.1\r\n")
    assert (world.worker.phase, world.monitor.signals) == (Phase.KILLING, ["KILL"])
    assert world.monitor.end(world.name, signal=9) == 1.0
    assert world.worker.status().failure is FailureClass.PROTOCOL


def test_probes_run_while_it_serves_and_only_then(world: World) -> None:
    world.ready()
    assert [frame.kind for frame in world.heard()] == [Kind.LOAD]
    world.reactor.advance(10)
    (ping,) = world.heard()
    assert ping.kind == Kind.PING
    world.reactor.advance(5)
    assert world.worker.phase is Phase.SUSPECT
    world.say(Kind.PONG, b"", ping.id)
    world.reactor.advance(0)
    assert world.observer.phases[-2:] == [Phase.SUSPECT, Phase.READY]
    for _ in range(5):
        world.reactor.advance(5)
    assert world.observer.phases[-2:] == [Phase.SUSPECT, Phase.KILLING]
    assert world.life().intent == "hung"
    world.monitor.end(world.name, signal=9)
    assert world.worker.status().reason == "it has left a PING unanswered for 15 s"


def test_a_daemon_that_stood_still_kills_nobody(world: World) -> None:
    world.ready()
    world.reactor.advance(10)
    for _ in range(10):
        world.reactor.advance(60)
    assert world.worker.phase is Phase.READY


def test_out_of_memory_is_known_by_the_kernels_counter(world: World) -> None:
    world.ready()
    (world.proc / "vmstat").write_text("oom_kill 5\n")
    world.monitor.end(world.name, signal=9, peak_rss=2**30)
    assert world.worker.status().failure is FailureClass.OUT_OF_MEMORY
    # One that the last probe has seen already was somebody else's.
    world.reactor.advance(1)
    world.worker.admit()
    world.load()
    world.say(Kind.READY, Loaded("fill-mask", "cpu", "float32"))
    (world.proc / "vmstat").write_text("oom_kill 6\n")
    world.reactor.advance(10)
    world.say(Kind.PONG)
    # A look that fails makes none of them new.
    (world.proc / "vmstat").unlink()
    world.reactor.advance(10)
    world.say(Kind.PONG)
    (world.proc / "vmstat").write_text("oom_kill 6\n")
    world.monitor.end(world.name, signal=9)
    assert world.worker.status().failure is FailureClass.EXTERNAL_KILL


def test_status_reads_what_the_process_uses(world: World) -> None:
    world.ready()
    assert world.worker.status().rss is None
    process = world.proc / "101"
    process.mkdir()
    fields = " ".join(["S", *["0"] * 10, "150", "50", *["0"] * 8, "25", *["0"] * 20])
    (process / "stat").write_text(f"101 (a ) b) {fields}\n")
    status = world.worker.status()
    assert status.rss == 25 * 4096
    assert status.cpu_seconds == pytest.approx(2.0)


def test_an_observer_that_fails_or_acts_at_once_changes_nothing(
    tmp_path: Path, logged_failures: LoggedFailures
) -> None:
    class Acting(Recorder):
        def changed(self, worker: Worker, cause: str) -> None:
            super().changed(worker, cause)
            if worker.phase is Phase.QUEUED:
                worker.admit()
            if worker.phase is Phase.LOADING:
                raise RuntimeError("as told")

    world = World(tmp_path, Acting())
    world.worker.start()
    assert (world.worker.phase, len(world.monitor.launches)) == (Phase.SPAWNING, 1)
    world.load()
    assert world.worker.phase is Phase.LOADING
    assert len(logged_failures.flush(RuntimeError)) == 1
    world.monitor.end(world.name, signal=9)
    world.reactor.advance(1)
    assert (world.worker.phase, len(world.monitor.launches)) == (Phase.SPAWNING, 2)


def test_a_socket_that_cannot_be_adopted_ends_the_process(world: World) -> None:
    world.reactor.refusal = OSError(24, "Too many open files")
    world.spawn()
    assert (world.worker.phase, world.monitor.signals) == (Phase.KILLING, ["KILL"])
    world.monitor.end(world.name, signal=9)
    assert world.worker.status().reason == "its data socket can't be used: Too many open files"


def test_who_is_never_admitted_fails_for_want_of_room(world: World) -> None:
    world.worker.start()
    world.reactor.advance(24 * 3600)
    status = world.worker.status()
    assert (status.phase, status.failure) == (Phase.FAILED, FailureClass.RESOURCE)
    assert status.reason == "there was no room for it for 24 h"


def test_environment_is_passed_as_it_is(world: World) -> None:
    world.spawn()
    environment: Mapping[str, str] = world.monitor.launches[0].environment
    assert dict(environment) == {"PATH": "/bin"}


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_wall_clock_that_jumps_moves_no_timer(world: World, jump: float) -> None:
    world.ready()
    world.jump = jump
    for _ in range(24):
        world.reactor.advance(2.5)
        for frame in world.heard():
            if frame.kind == Kind.PING:
                world.say(Kind.PONG, b"", frame.id)
    assert world.observer.phases[-1:] == [Phase.READY]
    world.jump = 0.0
    assert world.monitor.end(world.name, signal=9) == 1.0
    world.jump = jump
    world.reactor.advance(0.9)
    assert world.observer.phases[-1:] == [Phase.BACKOFF]
    world.reactor.advance(0.2)
    assert world.observer.phases[-1:] == [Phase.QUEUED]


def test_a_daemon_that_stood_still_lets_a_worker_finish_its_hello(world: World) -> None:
    world.spawn()
    world.reactor.advance(60)
    assert world.observer.phases[-1:] == [Phase.SPAWNING]
    world.load()
    assert world.observer.phases[-1:] == [Phase.LOADING]


def test_a_hung_worker_is_examined_and_what_it_tells_is_kept(world: World) -> None:
    world.ready()
    session = world.worker._session
    assert session is not None
    for _ in range(10):
        world.reactor.advance(2.5)
    assert world.observer.phases[-1:] == [Phase.KILLING]
    assert world.monitor.signals == ["USR2"]
    world.monitor.launches[-1].log.feed(
        "err", b'Thread 0x01 (most recent call first):\n  File "x"\n'
    )
    world.reactor.advance(0.3)
    assert world.monitor.signals == ["USR2", "KILL"]
    world.monitor.end(world.name, signal=9)
    assert session.stacks == 'Thread 0x01 (most recent call first):\n  File "x"'
    assert world.worker.status().failure is FailureClass.HUNG


def test_it_remembers_how_it_failed_before(world: World) -> None:
    at = 1_000_000.0
    world.worker.remember(
        [
            WorkerLife(
                str(number), "echo", 1, 0, "boot", at - 9, ended_at=at - 8,
                failure=FailureClass.TRANSIENT,
            )
            for number in range(3)
        ]
    )  # fmt: skip
    world.ready()
    assert world.monitor.end(world.name, exit_status=0) == 8.0
    world.reactor.advance(8)
    world.worker.admit()
    assert world.monitor.end(world.name, exit_status=0) == 900.0
    assert world.observer.phases[-1:] == [Phase.QUARANTINED]


# -- limits ---------------------------------------------------------------------------


def use(world: World, *megabytes: int) -> None:
    """Processes below the keeper that use so much, in a folder like /proc."""
    pids = [101 + number for number in range(len(megabytes))]
    tasks = world.proc / "100/task/100"
    tasks.mkdir(parents=True, exist_ok=True)
    (tasks / "children").write_text(" ".join(map(str, pids)))
    for pid, size in zip(pids, megabytes, strict=True):
        folder = world.proc / str(pid)
        folder.mkdir(exist_ok=True)
        (folder / "stat").write_text(f"{pid} (python) S {'1 ' * 20}{size * 256} {'1 ' * 20}")
        (folder / "smaps_rollup").write_text(f"Rss: {size * 1024} kB\nPss: {size * 256} kB\n")
    world.reactor.advance(1)


def test_a_worker_is_watched_where_no_group_limits_it(tmp_path: Path) -> None:
    world = World(tmp_path, limits=Limits(memory=200 * 2**20))
    world.ready()
    use(world, 100)
    use(world, 190)
    use(world, 195)
    assert world.observer.warnings == [
        ("worker.memory", "replica 0 uses 190.0 MiB of the 200.0 MiB that it may have")
    ]
    assert world.worker.phase is Phase.READY
    use(world, 150, 150)  # that is 75 MiB, because they share the most of it
    assert world.worker.phase is Phase.READY
    use(world, 210)
    assert world.monitor.signals == ["KILL"]
    assert world.observer.phases[-1] is Phase.KILLING
    world.monitor.end(world.name, signal=9, peak_rss=100)
    (life,) = world.observer.lives.values()
    assert life.failure is FailureClass.OUT_OF_MEMORY
    assert life.reason == (
        "out of memory: it needs more than its limit of 200.0 MiB (peak 210.0 MiB)"
    )
    assert life.peak_rss == 210 * 2**20
    use(world, 300)
    assert world.monitor.signals == ["KILL"], "the watch ends with the life"


def test_a_group_says_what_the_kernel_killed(tmp_path: Path) -> None:
    base = Kernel(tmp_path / "group")
    base.mkdir()
    encloser = Encloser(groups=Groups(base, frozenset({"memory"})))
    world = World(tmp_path, limits=Limits(memory=200 * 2**20), encloser=encloser)
    world.ready()
    (launch,) = world.monitor.launches
    leaf = base / f"worker-{launch.uuid}"
    assert launch.confinement.group == str(leaf)
    use(world, 300)
    assert world.worker.phase is Phase.READY, "the kernel sees to the limit"
    # Somebody else on the machine was killed: that isn't what ended this one.
    (world.proc / "vmstat").write_text("oom_kill 5\n")
    (leaf / "memory.peak").write_text(str(205 * 2**20))
    world.monitor.end(world.name, signal=9, peak_rss=100)
    (life,) = world.observer.lives.values()
    assert life.failure is FailureClass.EXTERNAL_KILL
    assert life.peak_rss == 205 * 2**20
    assert not leaf.exists()


def test_a_kill_for_memory_in_a_group_names_the_limit(tmp_path: Path) -> None:
    base = Kernel(tmp_path / "group")
    base.mkdir()
    encloser = Encloser(groups=Groups(base, frozenset({"memory"})))
    world = World(tmp_path, limits=Limits(memory=200 * 2**20), encloser=encloser)
    world.ready()
    (leaf,) = base.glob("worker-*")
    (leaf / "memory.events").write_text("oom 1\noom_kill 1\n")
    (leaf / "memory.peak").write_text(str(200 * 2**20))
    world.monitor.end(world.name, signal=9, peak_rss=100)
    (life,) = world.observer.lives.values()
    assert life.failure is FailureClass.OUT_OF_MEMORY
    assert life.reason == (
        "out of memory: it needs more than its limit of 200.0 MiB (peak 200.0 MiB)"
    )


def test_a_group_that_cannot_be_made_is_a_spawn_that_failed(tmp_path: Path) -> None:
    encloser = Encloser(groups=Groups(tmp_path / "gone", frozenset({"memory"})))
    world = World(tmp_path, encloser=encloser)
    world.spawn()
    assert world.worker.phase is Phase.BACKOFF
    assert world.worker.status().failure is FailureClass.HOST
    assert "No such file" in (world.worker.status().reason or "")


def test_a_spawn_that_fails_leaves_no_group(tmp_path: Path) -> None:
    base = Kernel(tmp_path / "group")
    base.mkdir()
    world = World(tmp_path, encloser=Encloser(groups=Groups(base, frozenset({"memory"}))))
    world.monitor.refusal = OSError(24, "Too many open files")
    world.worker.start()
    world.worker.admit()
    assert world.worker.phase is Phase.BACKOFF
    assert not list(base.glob("worker-*"))
