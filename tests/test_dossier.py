"""What a worker's life leaves when it ends unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import LoggedFailures
from fakes import RecordedSink, Recorder
from test_worker import ASK, ORDER, World

from tursi.model import Dossier, FailureClass, Loaded, Phase, Sample
from tursi.supervision.session import KEPT_CHARACTERS, KEPT_LINES
from tursi.wire import Kind, LastWords


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def lives(world: World, rss_pages: int = 5) -> None:
    """The kernel lists the worker."""
    folder = world.proc / "101"
    folder.mkdir(exist_ok=True)
    fields = " ".join(["0"] * 10 + ["100", "50"] + ["0"] * 8 + [str(rss_pages)])
    (folder / "stat").write_text(f"101 (a) b) S {fields}\n")


def write(world: World, data: bytes) -> None:
    log = world.worker.log
    assert log is not None
    log.feed("err", data)


def dossier(world: World) -> Dossier:
    [found] = world.observer.dossiers
    return found


def test_a_crash_in_service_leaves_everything(world: World) -> None:
    lives(world)
    world.spawn().load()
    world.say(Kind.READY, Loaded("fill-mask", "cpu", "float32", versions={"torch": "2"}))
    world.worker.submit(ASK, RecordedSink())
    world.reactor.advance(7)
    write(world, b"something is wrong\n")
    world.lose()
    assert world.observer.dossiers == []
    world.monitor.end(world.name, signal=11, peak_rss=9 * 2**20, cpu_seconds=0.5)
    found = dossier(world)
    assert (found.id, found.worker, found.replica, found.generation) == (0, world.worker.uuid, 0, 1)
    assert (found.failure, found.signal, found.phase) == (FailureClass.CRASH, 11, Phase.READY)
    assert (found.spawned_at, found.ready_at, found.at) == (1_000_000, 1_000_000, 1_000_007)
    assert found.reason == "crashed with signal 11 (SIGSEGV)"
    assert (found.requests, found.order, found.versions) == (("r1",), ORDER, {"torch": "2"})
    assert (found.traceback, found.stacks, found.error) == (None, None, None)
    assert found.usage[0] == Sample(1_000_000, 5 * 4096, 1.5)
    assert found.usage[-1].at == 1_000_007
    assert "something is wrong" in found.log[0]
    assert "the worker has ended" in found.log[-1]


def test_a_failed_load_leaves_its_last_words(world: World) -> None:
    world.spawn().load()
    words = LastWords("weights_corrupt", "The weights are damaged.", "Traceback:\nValueError: so\n")
    world.say(Kind.FAILED, words)
    world.monitor.end(world.name, exit_status=65)
    found = dossier(world)
    assert (found.failure, found.exit_status) == (FailureClass.WEIGHTS, 65)
    assert (found.phase, found.ready_at) == (Phase.LOADING, None)
    assert (found.error, found.traceback) == ("ValueError: so", words.traceback)


def test_it_is_told_before_the_new_phase_and_after_the_last_row(tmp_path: Path) -> None:
    class Ordered(Recorder):
        def crashed(self, dossier: Dossier) -> None:
            super().crashed(dossier)
            assert self.lives[dossier.worker].ended_at is not None
            assert self.phases[-1] is Phase.READY

    world = World(tmp_path, Ordered())
    world.ready()
    world.monitor.end(world.name, signal=9)
    assert dossier(world).failure is FailureClass.EXTERNAL_KILL
    assert world.worker.phase is Phase.BACKOFF


def test_a_defect_in_its_recording_costs_no_restart(
    tmp_path: Path, logged_failures: LoggedFailures
) -> None:
    class Broken(Recorder):
        def crashed(self, dossier: Dossier) -> None:
            raise ZeroDivisionError

    world = World(tmp_path, Broken())
    world.ready()
    world.monitor.end(world.name, signal=9)
    assert world.worker.phase is Phase.BACKOFF
    assert len(logged_failures.flush(ZeroDivisionError)) == 1


@pytest.mark.parametrize("ask", ["stop", "restart"])
def test_who_was_asked_to_end_leaves_none(world: World, ask: str) -> None:
    world.ready()
    assert not world.worker.asked
    getattr(world.worker, ask)()
    assert world.worker.asked
    world.monitor.end(world.name, signal=9)
    assert world.observer.dossiers == []


def test_only_the_last_lines_are_kept(world: World) -> None:
    world.ready()
    write(world, b"".join(b"line %d\n" % number for number in range(2 * KEPT_LINES)))
    world.monitor.end(world.name, signal=9)
    log = dossier(world).log
    assert len(log) == KEPT_LINES
    assert log[-2].endswith(f"line {2 * KEPT_LINES - 1}")


def test_long_lines_are_bounded_together(world: World) -> None:
    world.ready()
    for number in range(40):
        write(world, b"%d " % number + b"x" * 8000 + b"\n")
    world.monitor.end(world.name, signal=9)
    log = dossier(world).log
    assert 10 < len(log) < 20
    assert sum(map(len, log)) <= KEPT_CHARACTERS


def test_nothing_is_left_running_afterwards(world: World) -> None:
    world.ready()
    stopped: list[Any] = []
    world.worker.stop().addCallback(stopped.append)
    world.monitor.end(world.name, exit_status=0)
    assert stopped == [None]
    world.reactor.advance(0)
    assert world.reactor.getDelayedCalls() == []
