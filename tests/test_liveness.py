from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twisted.internet.task import Clock

from tursi.config import Workers
from tursi.heartbeat import Beat, Operation
from tursi.lifecycle.liveness import Finding, Health, Liveness
from tursi.supervision.probe import Probe

SETTINGS = Workers()
WELL, SUSPECT, HUNG = Health.WELL, Health.SUSPECT, Health.HUNG


class Worker:
    """What a worker does each second, as its page shows it."""

    def __init__(self, operation: Operation = Operation.IDLE) -> None:
        self.beat: Beat | None = Beat(1, 0.0, operation, 0.0, 0)
        self.beats = self.computes = True
        self.advances = self.answers = True

    def second(self) -> None:
        beat = self.beat
        if beat is None:
            return
        if self.beats:
            used = 0.9 if self.computes and beat.operation is not Operation.IDLE else 0.0
            beat = replace(beat, count=beat.count + 1, processor=beat.processor + used)
        if self.advances and beat.operation is not Operation.IDLE:
            beat = replace(beat, progress=beat.progress + 1)
        self.beat = beat

    def does(self, operation: Operation) -> None:
        assert self.beat is not None
        self.beat = replace(self.beat, operation=operation, started=self.beat.started + 1)


class World:
    """A probe on a clock, and a worker that may fail in each of the ways."""

    def __init__(self, settings: Workers = SETTINGS, *, on_processor: bool = True) -> None:
        self.clock = Clock()
        self.worker = Worker()
        self.suspended = 100.0
        self.found: list[tuple[float, Finding]] = []
        self.probe = Probe(
            clock=self.clock,
            liveness=Liveness(settings, on_processor=on_processor),
            read=lambda: self.worker.beat,
            send=self.asked,
            found=lambda finding: self.found.append((self.clock.seconds(), finding)),
            suspended=lambda: self.suspended,
        )
        self.pings = 0
        self.probe.start()

    def asked(self) -> None:
        self.pings += 1
        if self.worker.answers:
            self.clock.callLater(0.01, self.probe.pong)

    def run(self, seconds: float) -> World:
        # Quarters are exact, so that times can be compared.
        for quarter in range(round(seconds * 4)):
            if quarter % 4 == 0:
                self.worker.second()
            self.clock.advance(0.25)
        return self

    def stand_still(self, seconds: float) -> None:
        """The daemon is stopped: its timers come late, all at once."""
        self.clock.advance(seconds)

    def after(self, health: Health, since: float) -> float:
        """Seconds from ``since`` until it was first found like that."""
        return next(at - since for at, each in self.found if each.health is health and at >= since)

    @property
    def worst(self) -> Health:
        return max(finding.health for _, finding in self.found)

    @property
    def reason(self) -> str:
        return self.found[-1][1].reason


def stop(world: World) -> None:
    """SIGSTOP: nothing happens any more."""
    world.worker.beats = world.worker.answers = world.worker.advances = False


def hold_the_interpreter(world: World) -> None:
    stop(world)
    world.worker.does(Operation.BATCH)


def block(world: World) -> None:
    """The compute thread waits for something that never comes; the others live."""
    world.worker.does(Operation.BATCH)
    world.worker.computes = world.worker.advances = False


def lose_the_main_thread(world: World) -> None:
    world.worker.answers = False


@pytest.mark.parametrize("moment", [30.0, 31.25, 32.0, 34.75])
@pytest.mark.parametrize(
    ("fail", "sentence"),
    [
        (stop, "its heartbeat has stood still for "),
        (hold_the_interpreter, "its heartbeat has stood still for "),
        (block, "its batch has neither come further nor used the processor for "),
    ],
)
def test_what_stands_still_is_suspect_in_10_seconds_and_hung_in_20(
    fail: Callable[[World], None], sentence: str, moment: float
) -> None:
    world = World().run(moment)
    assert world.worst is WELL
    fail(world)
    world.run(22)
    assert 5 <= world.after(SUSPECT, moment) <= 10
    assert 15 <= world.after(HUNG, moment) <= 20
    assert world.reason.startswith(sentence)


def test_a_lost_main_thread_is_found_by_pings() -> None:
    world = World().run(31)
    lose_the_main_thread(world)
    world.run(25)
    assert world.after(SUSPECT, 31) <= 15
    assert world.after(HUNG, 31) <= 25
    assert world.reason.startswith("it has left a PING unanswered for ")


@pytest.mark.parametrize(
    ("operation", "budget", "sentence"),
    [
        (Operation.BATCH, 120, "its batch has come no further for "),
        (Operation.PREFILL, 120, "its reading of a prompt has come no further for "),
        (Operation.DECODE, 30, "its decoding step has come no further for "),
    ],
)
@pytest.mark.parametrize("on_processor", [True, False])
def test_an_operation_that_computes_without_end_has_its_budget(
    operation: Operation, budget: float, sentence: str, on_processor: bool
) -> None:
    world = World(on_processor=on_processor).run(20)
    world.worker.does(operation)
    world.worker.advances = False
    # While an accelerator computes, the thread may sleep.
    world.worker.computes = on_processor
    world.run(budget + 10)
    assert budget <= world.after(SUSPECT, 20) <= budget + 2.5
    assert budget + 5 <= world.after(HUNG, 20) <= budget + 7.5
    assert world.reason.startswith(sentence)


def test_a_long_generation_with_progress_is_well() -> None:
    world = World()
    world.worker.does(Operation.DECODE)
    world.run(3600)
    assert world.worst is WELL


def test_slow_steps_and_batches_within_their_budget_are_well() -> None:
    world = World()
    for operation, seconds in (
        (Operation.BATCH, 119), (Operation.PREFILL, 119), (Operation.DECODE, 29),
    ):  # fmt: skip
        for _ in range(3):
            world.worker.does(operation)
            world.worker.advances = False
            world.run(seconds)
    assert world.worst is WELL


def test_idle_workers_are_well_for_ever_and_asked_every_10_seconds() -> None:
    world = World().run(600)
    assert world.worst is WELL
    assert 59 <= world.pings <= 60


def test_one_good_observation_saves_a_suspect_worker() -> None:
    world = World().run(30)
    stop(world)
    world.run(10)
    assert world.found[-1][1].health is SUSPECT
    world.worker.beats = world.worker.answers = world.worker.advances = True
    world.probe.pong()
    world.run(3)
    assert world.found[-1][1].health is WELL
    assert world.worst is SUSPECT


def test_without_a_page_pings_remain() -> None:
    world = World()
    world.worker.beat = None
    world.run(60)
    assert world.worst is WELL
    stop(world)
    world.run(30)
    assert world.after(HUNG, 60) <= 25
    assert world.probe.liveness.operation == ""


@pytest.mark.parametrize("seconds", [8, 60, 3600, 86_400])
def test_a_daemon_that_stood_still_blames_nobody(seconds: float) -> None:
    world = World().run(30)
    # The whole machine may have stood still: the worker hasn't beaten either.
    for _ in range(5):
        world.stand_still(seconds)
        world.run(2)
    assert world.worst is WELL


def test_after_it_stood_still_it_finds_a_stopped_worker_as_fast_as_ever() -> None:
    world = World().run(30)
    stop(world)
    world.run(14)
    world.stand_still(60)
    assert world.found[-1][1].health is WELL
    world.run(20)
    assert 15 <= world.after(HUNG, 104) <= 20


def test_a_resumed_machine_blames_nobody() -> None:
    world = World().run(30)
    stop(world)
    world.run(14)
    # CLOCK_MONOTONIC stands still while suspended, CLOCK_BOOTTIME doesn't.
    world.suspended += 3600
    world.run(3)
    assert world.worst is SUSPECT
    assert world.found[-1][1].health is WELL


def test_the_worker_cannot_lie_itself_into_age() -> None:
    world = World().run(20)
    world.worker.beat = Beat(2**63, -1e300, Operation.BATCH, -1e300, 2**63)
    world.run(4)
    assert world.worst is WELL


def test_a_probe_that_was_stopped_looks_no_more_and_may_begin_again() -> None:
    world = World().run(31)
    world.probe.start()
    assert len(world.clock.getDelayedCalls()) == 1
    world.probe.stop()
    world.probe.pong()
    seen = len(world.found)
    stop(world)
    world.run(3600)
    assert (len(world.found), world.clock.getDelayedCalls()) == (seen, [])
    world.probe.start()
    world.run(4)
    assert world.found[-1][1].health is WELL


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["works", "idles", "daemon stands still", "machine sleeps"]),
            st.integers(1, 90),
        ),
        max_size=20,
    )
)
def test_an_honest_worker_is_never_suspect_whatever_the_clocks_do(
    history: list[tuple[str, int]],
) -> None:
    world = World()
    for event, seconds in history:
        match event:
            case "daemon stands still":
                # Shorter is a slow turn, and within every limit.
                world.stand_still(8 + seconds)
            case "machine sleeps":
                world.suspended += seconds
                world.run(1)
            case _:
                world.worker.does(Operation.DECODE if event == "works" else Operation.IDLE)
                world.run(seconds)
    assert world.worst is WELL


@given(st.floats(0.1, 60), st.integers(2, 10), st.floats(0.1, 60))
def test_whatever_is_configured_what_stopped_is_found_in_time(
    beat: float, misses: int, timeout: float
) -> None:
    settings = Workers(beat_seconds=beat, beat_misses=misses, ping_timeout=timeout)
    liveness = Liveness(settings, on_processor=True)
    assert liveness.period <= beat / 2
    stopped = Beat(7, 1.0, Operation.IDLE, 0.0, 0)
    now, health = 0.0, WELL
    liveness.begin(now)
    while health is not HUNG:
        health = liveness.observe(now, 0.0, stopped).health
        now += liveness.period
        assert now <= beat * misses + 3 * liveness.period
