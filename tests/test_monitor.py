from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import RecordedKeeper, SpawningReactor

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessTerminated
from twisted.runner.procmon import ProcessMonitor

from tursi.supervision.life import Keepers
from tursi.supervision.logs import LifeLog
from tursi.supervision.monitor import Exit, Launch, Life, WorkerMonitor

KILL_TIME = 10.0
LAST_RESORT = 5.0


class RecordingChild:
    """Agrees to everything, comes back after ``delay``, and remembers what it was told."""

    def __init__(self, name: str, folder: Path, clock: Callable[[], float]) -> None:
        self.name = name
        self.agrees = True
        self.delay: float | None = 1.0
        self.arguments: tuple[str, ...] = ("/bin/worker",)
        self.lives: list[Life] = []
        self.pids: list[int] = []
        self.exits: list[Exit] = []
        self.failures: list[Exception] = []
        self.on_exit: Callable[[], object] = lambda: None
        self.log_path = folder / f"{name}.log"
        self._clock = clock

    def may_spawn(self) -> bool:
        return self.agrees

    def launch(self) -> Launch:
        log = LifeLog(self.log_path, clock=self._clock, size=100_000, rate=100_000)
        return Launch(f"uuid-{len(self.lives)}", self.arguments, {"LANG": "C"}, log)

    def spawned(self, life: Life) -> None:
        self.lives.append(life)
        life.socket.close()

    def worker_started(self, pid: int) -> None:
        self.pids.append(pid)

    def spawn_failed(self, error: Exception) -> float | None:
        self.failures.append(error)
        return self.delay

    def exited(self, exit: Exit) -> float | None:  # noqa: A002 - the field's word
        self.exits.append(exit)
        self.on_exit()
        return self.delay


class House:
    """A running monitor on a reactor that only records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reactor = SpawningReactor()
        self.clearing: list[tuple[str, Deferred[int]]] = []
        keepers = Keepers(self.reactor, clear_orphans=self._clear, last_resort=LAST_RESORT)
        self.monitor = WorkerMonitor(self.reactor, keepers=keepers, kill_time=KILL_TIME)
        self.monitor.startService()

    def _clear(self, uuid: str) -> Deferred[int]:
        cleared: Deferred[int] = Deferred()
        self.clearing.append((uuid, cleared))
        return cleared

    def child(self, name: str = "mini/0") -> RecordingChild:
        return RecordingChild(name.replace("/", "-"), self.folder, self.reactor.seconds)

    def added(self, name: str = "mini/0") -> RecordingChild:
        child = self.child(name)
        self.monitor.addChild(child)
        return child

    @property
    def keeper(self) -> RecordedKeeper:
        return self.reactor.keepers[-1]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    if made.monitor.running:
        made.monitor.stopService()
    for keeper in made.reactor.keepers:
        if keeper.pid is not None:
            keeper.exit()
        keeper.protocol.processEnded(None)


def test_a_child_starts_when_the_service_does(house: House) -> None:
    house.monitor.stopService()
    child = house.added()
    assert not house.reactor.keepers
    house.monitor.startProcess(child.name)
    assert not house.reactor.keepers, "nothing may start while the service is stopped"
    house.monitor.startService()
    assert len(house.reactor.keepers) == 1


def test_the_keeper_gets_the_worker_and_its_environment(house: House) -> None:
    child = house.added()
    assert house.keeper.arguments[1:3] == ["-I", "-S"]
    assert house.keeper.arguments[-1] == "/bin/worker"
    assert house.keeper.environment == {"LANG": "C", "TURSI_WORKER": "uuid-0"}
    (life,) = child.lives
    assert life.uuid == "uuid-0"
    assert life.keeper_pid == house.keeper.pid
    assert life.keeper_start_time > 0
    house.keeper.report(event="started", pid=4711, start_time=1)
    assert child.pids == [4711]


def test_a_name_can_be_taken_once(house: House) -> None:
    house.added()
    with pytest.raises(KeyError):
        house.added()


def test_the_child_says_when_it_comes_back(house: House) -> None:
    child = house.added()
    for delay in (1.0, 40.0, 0.5):
        child.delay = delay
        before = len(house.reactor.keepers)
        house.keeper.exit(signal=9)
        house.reactor.advance(delay - 0.01)
        assert len(house.reactor.keepers) == before
        house.reactor.advance(0.02)
        assert len(house.reactor.keepers) == before + 1
    assert child.exits[0] == Exit(
        exit_status=None, signal=9, peak_rss=9_000_000, cpu_seconds=0.5, reported=True
    )


def test_the_child_may_stay_down_and_be_started_again(house: House) -> None:
    child = house.added()
    child.delay = None
    house.keeper.exit()
    house.reactor.advance(10_000)
    assert len(house.reactor.keepers) == 1
    assert not house.reactor.getDelayedCalls()
    house.monitor.startProcess(child.name)
    assert len(house.reactor.keepers) == 2


def test_a_child_that_waits_for_admission_starts_itself(house: House) -> None:
    child = house.child()
    child.agrees = False
    house.monitor.addChild(child)
    assert not house.reactor.keepers
    child.agrees = True
    house.monitor.startProcess(child.name)
    house.monitor.startProcess(child.name)
    assert len(house.reactor.keepers) == 1


def test_starting_by_hand_during_the_delay_leaves_no_timer(house: House) -> None:
    child = house.added()
    child.delay = 60.0
    house.keeper.exit()
    house.monitor.startProcess(child.name)
    assert len(house.reactor.keepers) == 2
    assert not house.reactor.getDelayedCalls()


def test_a_child_may_start_itself_while_it_is_asked(house: House) -> None:
    child = house.added()
    child.delay = 60.0
    child.on_exit = lambda: house.monitor.startProcess(child.name)
    house.keeper.exit()
    assert len(house.reactor.keepers) == 2
    assert not house.reactor.getDelayedCalls()


# T1: more than 16384 bytes without a newline closed the child's stdout


def test_output_without_a_newline_closes_nothing(house: House) -> None:
    child = house.added()
    for _ in range(10):
        house.keeper.write(1, b"\rprogress" * 1000)
    house.keeper.write(1, b"x" * 100_000)
    assert not house.keeper.closed
    house.keeper.exit()
    assert not [line for line in child.log_path.read_text().splitlines() if len(line) > 9000]


# T2: removal during the delay raised KeyError from the pending restart


def test_removal_during_the_delay_cancels_the_restart(house: House) -> None:
    child = house.added()
    house.keeper.exit()
    removed = house.monitor.removeProcess(child.name)
    assert removed.called
    house.reactor.advance(10_000)
    assert len(house.reactor.keepers) == 1
    with pytest.raises(KeyError):
        house.monitor.removeProcess(child.name)


def test_stock_monitor_has_that_defect() -> None:
    reactor: Any = SpawningReactor()
    stock = ProcessMonitor(reactor)
    stock.startService()
    stock.addProcess("one", ["/bin/worker"], env={})
    protocol = reactor.keepers[0].protocol
    stock._monitoredProcessExited("one")
    stock.removeProcess("one")
    assert protocol is not None
    with pytest.raises(KeyError):
        reactor.advance(10)


# T3: stopService returned before the children had ended


def test_stopping_the_service_waits_for_every_tree(house: House) -> None:
    children = [house.added(f"mini/{number}") for number in range(3)]
    stopped = house.monitor.stopService()
    for keeper in house.reactor.keepers:
        assert keeper.signals == ["TERM"]
        assert not stopped.called
        keeper.exit(signal=15)
    assert stopped.called
    assert [len(child.exits) for child in children] == [1, 1, 1]
    assert not house.reactor.getDelayedCalls()
    house.reactor.advance(10_000)
    assert len(house.reactor.keepers) == 3


def test_stopping_the_service_kills_what_ignores_it_and_waits_for_a_removed_one(
    house: House,
) -> None:
    house.added("mini/0")
    removed = house.monitor.removeProcess(house.added("mini/1").name)
    stopped = house.monitor.stopService()
    first, second = house.reactor.keepers
    first.exit()
    house.reactor.advance(KILL_TIME)
    assert second.closed == [4], "the lifeline ends, the keeper clears the tree"
    assert signal.SIGCONT in second.signals, "a stopped keeper would not see it"
    assert "KILL" not in second.signals
    assert not stopped.called
    second.exit(signal=9)
    assert stopped.called
    assert removed.called
    assert not house.reactor.getDelayedCalls()


def test_stopping_the_service_ends_even_if_something_cannot_be_killed(house: House) -> None:
    house.added()
    stopped = house.monitor.stopService()
    house.reactor.pump([1.0] * 25)
    assert stopped.called
    assert house.keeper.signals == ["TERM", signal.SIGCONT, "KILL"]


def test_stopping_an_empty_service(house: House) -> None:
    assert house.monitor.stopService().called
    assert not house.reactor.getDelayedCalls()


# T4: a spawn that failed otherwise than by OSError never came back and stopped the others


@pytest.mark.parametrize("error", [ValueError("embedded null byte"), OSError(24, "too many files")])
def test_a_failed_spawn_concerns_its_child_only(house: House, error: Exception) -> None:
    house.monitor.stopService()
    children = [house.added(f"mini/{number}") for number in range(3)]

    def fail() -> Launch:
        raise error

    good = children[1].launch
    children[1].launch = fail  # type: ignore[method-assign]  # the one that fails
    house.monitor.startService()
    assert len(house.reactor.keepers) == 2
    assert children[1].failures == [error]
    children[1].launch = good  # type: ignore[method-assign]  # and comes back
    house.reactor.advance(1.0)
    assert len(house.reactor.keepers) == 3
    assert not children[1].exits


def test_a_refused_spawn_leaves_nothing_open(house: House) -> None:
    house.reactor.refusal = ValueError("embedded null byte")
    child = house.added()
    child.delay = None
    house.reactor.advance(1.0)
    assert len(child.failures) == 2
    assert not child.lives
    assert not house.monitor.protocols
    assert not house.reactor.getDelayedCalls()


def test_stock_monitor_forgets_a_child_whose_spawn_failed() -> None:
    reactor: Any = SpawningReactor()
    reactor.refusal = ValueError("embedded null byte")
    stock = ProcessMonitor(reactor)
    stock.addProcess("one", ["/bin/worker"], env={})
    with pytest.raises(ValueError, match="null byte"):
        stock.startService()
    reactor.refusal = None
    stock.startProcess("one")
    assert not reactor.keepers


# T5: a blank line at every exit


def test_no_blank_line_at_the_exit(house: House) -> None:
    child = house.added()
    house.keeper.write(1, b"last words\n")
    house.keeper.exit()
    house.keeper.protocol.processEnded(None)
    assert [line.split(" ", 1)[1] for line in child.log_path.read_text().splitlines()] == [
        "out last words"
    ]


# T6: an end was seen only when nobody held a pipe any more


def test_the_end_is_the_keepers_not_that_of_the_pipes(house: House) -> None:
    child = house.added()
    house.keeper.exit()
    assert len(child.exits) == 1
    assert set(house.keeper.closed) == {1, 2, 4, 5}
    house.reactor.advance(child.delay or 0)
    assert len(house.reactor.keepers) == 2


# what the stock class means by its words


def test_a_stopped_process_comes_back_and_asking_twice_does_not_put_off_the_kill(
    house: House,
) -> None:
    child = house.added()
    house.monitor.stopProcess(child.name)
    house.reactor.advance(KILL_TIME - 1)
    house.monitor.stopProcess(child.name)
    assert house.keeper.signals == ["TERM", "TERM"]
    house.reactor.advance(1)
    assert house.keeper.closed == [4]
    house.keeper.exit(signal=9)
    house.reactor.advance(1)
    assert len(house.reactor.keepers) == 2
    with pytest.raises(KeyError):
        house.monitor.stopProcess("unknown")


def test_restart_all(house: House) -> None:
    for number in range(3):
        house.added(f"mini/{number}")
    house.monitor.restartAll()
    for keeper in list(house.reactor.keepers):
        keeper.exit(signal=15)
    house.reactor.advance(1.0)
    assert len(house.reactor.keepers) == 6


def test_terminate_and_kill(house: House) -> None:
    child = house.added()
    house.monitor.terminate(child.name)
    assert house.keeper.signals == ["TERM"]
    house.monitor.kill(child.name)
    house.monitor.kill(child.name)
    assert house.keeper.closed == [4]
    house.reactor.advance(LAST_RESORT)
    assert house.keeper.signals == ["TERM", signal.SIGCONT, "KILL"]
    house.keeper.exit(signal=9, killed=3)
    assert child.exits[0].tree == "killed 3"
    house.monitor.terminate("unknown")
    house.monitor.kill("unknown")


def test_a_killed_keeper_has_its_orphans_cleared_before_the_end_is_told(house: House) -> None:
    child = house.added()
    house.keeper.report(event="started", pid=4711, start_time=1)
    house.keeper.die(ProcessTerminated(signal=9))
    ((uuid, cleared),) = house.clearing
    assert uuid == "uuid-0"
    assert not child.exits
    house.monitor.kill(child.name)
    assert not house.reactor.getDelayedCalls(), "there is no keeper any more"
    cleared.callback(6)
    assert child.exits == [
        Exit(worker_pid=4711, reported=False, tree="killed 6 after the keeper had died")
    ]


def test_a_keeper_killed_while_it_clears_still_has_reported_the_worker(house: House) -> None:
    child = house.added()
    house.keeper.report(event="exited", exit_status=3, signal=None, peak_rss=1, cpu_seconds=0.0)
    house.keeper.die(ProcessTerminated(signal=9))
    house.clearing[0][1].callback(0)
    assert child.exits[0].reported
    assert child.exits[0].exit_status == 3


def test_orphans_that_cannot_be_cleared_do_not_hide_the_end(
    house: House, logged_failures: Any
) -> None:
    child = house.added()
    house.keeper.die(ProcessTerminated(signal=9))
    house.clearing[0][1].errback(OSError("no /proc"))
    assert len(child.exits) == 1
    assert logged_failures.flush(OSError)


def test_a_status_line_that_makes_no_sense_changes_nothing(
    house: House, logged_failures: Any
) -> None:
    child = house.added()
    for line in (b"{", b"[]", b'{"event": "exited", "surprise": 1}', b"\xff", b"x" * 100_000):
        house.keeper.write(5, line + b"\n")
    assert len(logged_failures.flush()) == 5
    house.keeper.exit()
    assert child.exits[0].exit_status == 0


def test_a_removed_name_can_be_added_again_before_the_old_process_is_gone(house: House) -> None:
    old = house.added()
    removed = house.monitor.removeProcess(old.name)
    new = house.added()
    assert len(house.reactor.keepers) == 1
    assert not removed.called
    house.keeper.exit(signal=15)
    assert removed.called
    house.reactor.advance(0)
    assert len(house.reactor.keepers) == 2
    assert (len(old.exits), len(new.exits), len(new.lives)) == (1, 0, 1)


def test_a_child_that_fails_costs_the_others_nothing(house: House, logged_failures: Any) -> None:
    child, other = house.added("mini/0"), house.added("mini/1")

    def fail() -> None:
        raise RuntimeError("a defect")

    child.on_exit = fail
    first, second = house.reactor.keepers
    first.exit()
    second.exit()
    assert len(logged_failures.flush(RuntimeError)) == 1
    assert len(other.exits) == 1


def test_a_child_that_cannot_take_its_life_has_it_ended(house: House, logged_failures: Any) -> None:
    child = house.child()

    def fail(life: Life) -> None:
        raise RuntimeError("a defect")

    child.spawned = fail  # type: ignore[method-assign]  # the one that fails
    house.monitor.addChild(child)
    assert logged_failures.flush(RuntimeError)
    assert house.keeper.closed == [4]
    house.keeper.exit(signal=9)
    assert len(child.exits) == 1
