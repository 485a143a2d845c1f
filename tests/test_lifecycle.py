from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from twisted.internet.task import Clock

from tursi.config import Workers
from tursi.lifecycle.inputs import Lifecycle
from tursi.lifecycle.machine import lifecycle
from tursi.lifecycle.tally import Tally, backoff
from tursi.lifecycle.verdict import (
    RESOURCE_SECONDS,
    Intent,
    Policy,
    Refusal,
    Verdict,
    classify,
    not_spawned,
    too_much,
)
from tursi.model import FailureClass, Phase, WorkerLife
from tursi.wire import LastWords

SETTINGS = Workers()
TIMED = {
    Phase.QUEUED, Phase.SPAWNING, Phase.LOADING, Phase.WARMING, Phase.READY,
    Phase.DRAINING, Phase.STOPPING, Phase.KILLING, Phase.SETTLING, Phase.WEDGED,
}  # fmt: skip
ALIVE = {
    Phase.SPAWNING, Phase.LOADING, Phase.WARMING, Phase.READY, Phase.SUSPECT,
    Phase.DRAINING, Phase.STOPPING, Phase.KILLING, Phase.WEDGED,
}  # fmt: skip
INPUTS = sorted(
    name for name in vars(Lifecycle) if name[0] != "_" and callable(getattr(Lifecycle, name))
)
CRASH = Verdict(Policy.COUNT, "crashed", FailureClass.CRASH)
TRANSIENT = Verdict(Policy.COUNT, "went away", FailureClass.TRANSIENT)


class World:
    """One machine and what its effects do: a process that is there or not."""

    def __init__(self, settings: Workers = SETTINGS, chance: float = 0.5) -> None:
        self.clock = Clock()
        self.chance = chance
        self.tally = Tally(settings, lambda: self.chance)
        self.machine = lifecycle(self, self.clock, self.tally)
        self.phases = [Phase.STOPPED]
        self.causes = [""]
        self.done: list[str] = []
        self.delays: list[float] = []
        self.intents: list[Intent] = []
        self.process = False
        self.words = False
        self.spawns = 0
        self.actions: deque[Callable[[], None]] = deque()

    @property
    def phase(self) -> Phase:
        return self.phases[-1]

    def give(self, name: str, argument: Any = "because") -> World:
        getattr(self.machine, name)(argument)
        self.act()
        return self

    def act(self) -> None:
        while self.actions:
            self.actions.popleft()()

    def advance(self, seconds: float) -> World:
        end = self.clock.seconds() + seconds
        while self.clock.getDelayedCalls():
            due = min(call.getTime() for call in self.clock.getDelayedCalls())
            if due > end:
                break
            self.clock.advance(due - self.clock.seconds())
            self.act()
        self.clock.advance(end - self.clock.seconds())
        return self

    def exit(self, verdict: Verdict = TRANSIENT) -> World:
        self.process = False
        return self.give("exited", verdict)

    # -- effects

    def announce(self, phase: Phase, cause: str) -> None:
        self.phases.append(phase)
        self.causes.append(cause)

    def spawn(self) -> None:
        def spawn() -> None:
            assert not self.process, "a second keeper"
            self.process, self.words, self.intents = True, False, []
            self.spawns += 1

        self.actions.append(spawn)

    def drain(self) -> None:
        self.done.append("drain")

    def terminate(self) -> None:
        assert self.intents
        self.done.append("terminate")

    def kill(self) -> None:
        assert self.intents or self.words, "killed for no reason"
        self.done.append("kill")

    def examine(self) -> None:
        assert self.intents, "examined for no reason"
        self.done.append("examine")

    def intend(self, intent: Intent) -> None:
        self.intents.append(intent)

    def settle(self) -> None:
        self.actions.append(lambda: self.machine.settled("free"))

    def retry(self, seconds: float) -> None:
        self.delays.append(seconds)


PATHS: dict[Phase, list[str]] = {
    Phase.STOPPED: [],
    Phase.QUEUED: ["start"],
    Phase.SPAWNING: ["start", "admit"],
    Phase.LOADING: ["start", "admit", "hello"],
    Phase.WARMING: ["start", "admit", "hello", "warming"],
    Phase.READY: ["start", "admit", "hello", "loaded"],
    Phase.SUSPECT: ["start", "admit", "hello", "loaded", "missed"],
    Phase.DRAINING: ["start", "admit", "hello", "loaded", "stop"],
    Phase.STOPPING: ["start", "admit", "hello", "stop"],
    Phase.KILLING: ["start", "admit", "broke"],
    Phase.BACKOFF: ["start", "admit", "EXIT"],
    Phase.QUARANTINED: ["start", *["admit", "EXIT", "retry"] * 4, "admit", "EXIT"],
    Phase.FAILED: ["start", "admit", "incompatible", "GIVE UP"],
    Phase.WEDGED: ["start", "admit", "broke", "KILL TIME"],
}


def world_in(phase: Phase, settings: Workers = SETTINGS) -> World:
    world = World(settings)
    for step in PATHS[phase]:
        if step == "EXIT":
            world.exit()
        elif step == "GIVE UP":
            world.exit(Verdict(Policy.GIVE_UP, "another version", FailureClass.PROTOCOL))
        elif step == "KILL TIME":
            world.advance(settings.kill_seconds)
        else:
            world.give(step)
    assert world.phase is phase
    return world


@pytest.mark.parametrize("phase", PATHS)
@pytest.mark.parametrize("name", INPUTS)
def test_every_input_is_legal_in_every_state(phase: Phase, name: str) -> None:
    world = world_in(phase)
    world.give(name, TRANSIENT if name == "exited" else "because")
    timers = world.clock.getDelayedCalls()
    assert len(timers) == (world.phase in TIMED)


@pytest.mark.parametrize(
    ("phase", "seconds", "then", "sentence"),
    [
        (Phase.QUEUED, 24 * 3600, Phase.FAILED, "there was no room for it for 24 h"),
        (Phase.SPAWNING, 15, Phase.KILLING, "the worker didn't say hello within 15 s"),
        (Phase.LOADING, 300, Phase.KILLING, "loading made no progress for 300 s"),
        (Phase.WARMING, 120, Phase.KILLING, "the first inference took longer than 120 s"),
        (Phase.DRAINING, 30, Phase.STOPPING, "requests were still in flight after 30 s"),
        (Phase.STOPPING, 10, Phase.KILLING, "the worker didn't end within 10 s"),
        (Phase.KILLING, 5, Phase.WEDGED, "the worker outlives SIGKILL since 5 s"),
    ],
)
def test_every_state_has_its_deadline(
    phase: Phase, seconds: float, then: Phase, sentence: str
) -> None:
    world = world_in(phase)
    world.advance(seconds - 0.01)
    assert world.phase is phase
    world.advance(0.02)
    assert (world.phase, world.causes[-1]) == (then, sentence)


def test_loading_may_take_long_with_progress_but_not_for_ever() -> None:
    world = world_in(Phase.LOADING)
    for _ in range(12):
        world.advance(299).give("advanced")
        assert world.phase is Phase.LOADING
    world.advance(3600 - 12 * 299 - 0.1).give("advanced")
    assert world.phase is Phase.LOADING
    world.advance(0.2)
    assert world.causes[-1] == "loading took longer than 3600 s"
    assert world.intents[-1].failure is FailureClass.HUNG


def test_a_suspect_worker_is_saved_by_signs_of_life_and_never_killed_by_a_timer() -> None:
    world = world_in(Phase.READY)
    world.give("missed").give("missed").give("answered")
    assert world.phases[-2:] == [Phase.SUSPECT, Phase.READY]
    world.give("missed").advance(1e6)
    assert world.phase is Phase.SUSPECT


@pytest.mark.parametrize("phase", [Phase.READY, Phase.SUSPECT])
def test_a_hung_worker_is_examined_and_then_killed(phase: Phase) -> None:
    world = world_in(phase)
    world.give("hung", "its heartbeat has stood still for 15 s")
    assert (world.phase, world.done) == (Phase.KILLING, ["examine"])
    assert world.intents == [
        Intent("hung", "its heartbeat has stood still for 15 s", FailureClass.HUNG)
    ]
    # It was continued for the examination, but nothing saves it any more.
    world.give("answered").give("examined").give("examined")
    assert (world.phase, world.done) == (Phase.KILLING, ["examine", "kill"])
    world.advance(4.9)
    assert world.phase is Phase.KILLING
    world.advance(0.2)
    assert world.phases[-1] is Phase.WEDGED


def test_an_examination_that_yields_nothing_takes_three_seconds() -> None:
    world = world_in(Phase.LOADING)
    world.advance(300)
    assert (world.phase, world.done) == (Phase.KILLING, ["examine"])
    world.advance(2.9)
    assert world.done == ["examine"]
    world.advance(0.2)
    assert world.done == ["examine", "kill"]
    world.advance(5)
    assert world.phase is Phase.WEDGED
    # The next life is examined anew.
    world.exit()
    assert world.phases[-1] is Phase.BACKOFF
    world.give("retry").give("admit").give("hello").give("loaded").give("hung")
    assert world.done[-1] == "examine"


def test_a_worker_that_ends_under_examination_has_hung() -> None:
    world = world_in(Phase.READY)
    world.give("hung").exit(Verdict(Policy.COUNT, "it hung", FailureClass.HUNG))
    assert world.phase is Phase.BACKOFF
    world.advance(0.5)
    assert world.done == ["examine"]


def test_a_wedged_worker_is_killed_again_and_again() -> None:
    world = world_in(Phase.WEDGED)
    world.done.clear()
    world.advance(95)
    assert world.done == ["kill"] * 3
    world.give("start")
    assert world.spawns == 1
    world.exit()
    assert world.phase is Phase.BACKOFF


def test_a_clean_stop_is_drained_then_terminated() -> None:
    world = world_in(Phase.READY)
    world.give("stop", "the operator")
    assert (world.phase, world.done) == (Phase.DRAINING, ["drain"])
    world.give("drained")
    assert (world.phase, world.done) == (Phase.STOPPING, ["drain", "terminate"])
    world.exit(Verdict(Policy.ASKED, "the operator"))
    assert world.phases[-3:] == [Phase.STOPPING, Phase.SETTLING, Phase.STOPPED]


def test_a_start_during_the_stop_brings_it_back() -> None:
    world = world_in(Phase.STOPPING)
    world.give("start").exit(Verdict(Policy.ASKED, "the operator"))
    assert world.phase is Phase.QUEUED


def test_a_stop_while_it_is_killed_keeps_it_down() -> None:
    world = world_in(Phase.KILLING)
    world.give("stop").exit()
    assert world.phase is Phase.STOPPED


@pytest.mark.parametrize("phase", [Phase.BACKOFF, Phase.QUARANTINED, Phase.FAILED, Phase.QUEUED])
def test_stopped_while_waiting_it_never_comes_back(phase: Phase) -> None:
    world = world_in(phase)
    spawns = world.spawns
    world.give("stop").give("retry").give("admit").advance(1e6)
    assert (world.phase, world.spawns) == (Phase.STOPPED, spawns)


def test_a_closed_socket_gets_time_to_end_and_is_killed_after() -> None:
    world = world_in(Phase.READY)
    world.give("lost")
    assert (world.phase, world.done) == (Phase.STOPPING, [])
    world.advance(10)
    assert (world.phase, world.done) == (Phase.KILLING, ["kill"])
    assert world.intents[-1].failure is FailureClass.PROTOCOL


def test_last_words_get_time_to_end_and_need_no_other_reason() -> None:
    world = world_in(Phase.LOADING)
    world.words = True
    world.give("failing", "no memory").advance(10)
    assert (world.phase, world.done, world.intents) == (Phase.KILLING, ["kill"], [])


def fail(world: World, verdict: Verdict = TRANSIENT) -> Phase:
    """One more life that ends so; the phase after it."""
    if world.phase is Phase.BACKOFF:
        world.give("retry")
    world.give("admit")
    world.exit(verdict)
    return world.phase


def test_delays_double_and_end_in_quarantine_then_in_failure() -> None:
    world = World().give("start")
    phases = [fail(world) for _ in range(5)]
    assert phases == [Phase.BACKOFF] * 4 + [Phase.QUARANTINED]
    assert world.delays == [1, 2, 4, 8, 900]
    assert world.causes[-1] == "went away (5 failures in a row)"
    for _ in range(2):
        world.give("retry")
        assert fail(world) is Phase.QUARANTINED
    world.give("retry")
    assert fail(world) is Phase.FAILED
    assert world.causes[-1] == "went away (again, 3 times after quarantine)"
    world.give("retry")
    world.give("reset")
    assert world.phases[-2:] == [Phase.FAILED, Phase.QUEUED]
    assert fail(world) is Phase.BACKOFF
    assert world.delays[-1] == 1


def test_a_thousand_crash_loop_cycles_follow_the_numbers() -> None:
    chance = random.Random(11)
    world = World().give("start")
    cycles = 0
    while cycles < 1000:
        for ideal in (1.0, 2.0, 4.0, 8.0):
            world.chance = chance.random()
            assert fail(world) is Phase.BACKOFF
            assert 0.8 * ideal <= world.delays[-1] <= 1.2 * ideal
            if chance.random() < 0.05:
                # Stopped while it waits it stays down, however late the timer.
                spawns = world.spawns
                world.give("stop").give("retry").advance(1e6).give("retry")
                assert (world.phase, world.spawns) == (Phase.STOPPED, spawns)
                # A start doesn't forget how often it has failed.
                world.give("start")
        assert fail(world) is Phase.QUARANTINED
        assert world.delays[-1] == 900
        for _ in range(2):
            assert world.give("retry").phase is Phase.QUEUED
            assert fail(world) is Phase.QUARANTINED
            assert world.delays[-1] == 900
        world.give("retry")
        assert fail(world) is Phase.FAILED
        spawns = world.spawns
        world.give("retry").advance(1e6)
        assert (world.phase, world.spawns) == (Phase.FAILED, spawns)
        assert world.clock.getDelayedCalls() == []
        world.give("reset")
        cycles += 8


def test_hangs_are_counted_by_the_half_hour_and_not_forgotten_in_ten_good_minutes() -> None:
    hung = Verdict(Policy.COUNT, "it hung", FailureClass.HUNG)
    world = World().give("start")
    for then in (Phase.BACKOFF, Phase.BACKOFF, Phase.QUARANTINED):
        if world.phase is Phase.BACKOFF:
            world.give("retry")
        world.give("admit").give("hello").give("loaded").advance(700)
        world.exit(hung)
        assert world.phases[-1] is then
    assert world.causes[-1] == "it hung (it hung 3 times)"


# -- after a new start of the daemon


def lived(failure: FailureClass | None, ended: float, *, good: float | None = None) -> WorkerLife:
    ready = None if good is None else ended - good
    return WorkerLife(
        "u", "echo", 1, 0, "boot", ended - 1000, ready_at=ready, ended_at=ended, failure=failure
    )


def restored(*lives: WorkerLife, wall_clock: float = 10_000.0) -> World:
    world = World()
    world.tally.restore(lives, world.clock.seconds(), wall_clock)
    return world.give("start")


def test_failures_go_on_counting_after_a_new_start_of_the_daemon() -> None:
    crash = [lived(FailureClass.TRANSIENT, 9000.0 + at) for at in range(4)]
    assert fail(restored(*crash[:3])) is Phase.BACKOFF
    assert fail(restored(*crash)) is Phase.QUARANTINED
    assert restored(*crash[:2]).tally.attempts == 2
    # What was asked to end, or ended with the daemon, is no failure.
    assert fail(restored(*crash[:3], lived(None, 9100.0), crash[3])) is Phase.QUARANTINED
    # A good period forgets.
    assert fail(restored(*crash, lived(FailureClass.TRANSIENT, 9999.0, good=601))) is Phase.BACKOFF


def test_what_was_quarantined_has_a_single_try() -> None:
    crash = [lived(FailureClass.TRANSIENT, 9000.0 + at) for at in range(7)]
    world = restored(*crash[:5])
    assert fail(world) is Phase.QUARANTINED
    assert world.causes[-1] == "went away (6 failures in a row)"
    assert fail(restored(*crash)) is Phase.FAILED


def test_hangs_and_memory_are_remembered_with_their_times() -> None:
    hung = [lived(FailureClass.HUNG, at, good=700) for at in (9000.0, 9500.0)]
    verdict = Verdict(Policy.COUNT, "it hung", FailureClass.HUNG)
    assert fail(restored(*hung), verdict) is Phase.QUARANTINED
    assert fail(restored(*hung, wall_clock=10_900.0), verdict) is Phase.BACKOFF
    # A clock that was set back makes them recent, not future.
    assert fail(restored(*hung, wall_clock=0.0), verdict) is Phase.QUARANTINED
    memory = [lived(FailureClass.OUT_OF_MEMORY, at) for at in (9000.0, 9500.0)]
    verdict = Verdict(Policy.COUNT, "out of memory", FailureClass.OUT_OF_MEMORY)
    assert fail(restored(*memory), verdict) is Phase.FAILED


def test_what_waited_for_the_world_is_not_held_against_it() -> None:
    waits = [lived(FailureClass.RESOURCE, 9000.0 + at) for at in range(50)]
    assert fail(restored(*waits)) is Phase.BACKOFF


def test_a_good_period_forgets_failures_and_a_short_one_does_not() -> None:
    world = World().give("start")
    fail(world)
    for seconds, delay in ((599, 2), (601, 1)):
        world.give("retry").give("admit").give("hello").give("loaded").advance(seconds)
        world.exit()
        assert world.delays[-1] == delay


def test_delays_stay_within_their_bounds_for_a_thousand_failures() -> None:
    settings = Workers(max_failures=10_000)
    chance = random.Random(7)
    for attempt in range(1, 1001):
        delay = backoff(attempt, settings, chance.random())
        ideal = min(300.0, 2.0 ** (attempt - 1)) if attempt < 20 else 300.0
        assert 0.8 * ideal <= delay <= 1.2 * ideal


def test_crashes_hangs_and_memory_have_limits_of_their_own() -> None:
    settings = Workers(max_failures=100)

    def phases(verdict: Verdict, count: int) -> list[Phase]:
        world = World(settings).give("start")
        return [fail(world, verdict) for _ in range(count)]

    waits = Phase.BACKOFF
    assert phases(CRASH, 4) == [waits, waits, waits, Phase.QUARANTINED]
    hung = Verdict(Policy.COUNT, "hung", FailureClass.HUNG)
    assert phases(hung, 3) == [waits, waits, Phase.QUARANTINED]
    memory = Verdict(Policy.COUNT, "out of memory", FailureClass.OUT_OF_MEMORY)
    assert phases(memory, 3) == [waits, waits, Phase.FAILED]
    twice = Verdict(Policy.COUNT, "KeyError", FailureClass.SOFTWARE, digest="abc")
    assert phases(twice, 2) == [waits, Phase.FAILED]
    tally = Tally(Workers(), lambda: 0.5)
    for _ in range(2):
        tally.decide(twice, 0.0)
    assert tally.failures == 2, "the second one counts too"


def test_hung_workers_long_apart_are_not_quarantined() -> None:
    tally = Tally(Workers(max_failures=100), lambda: 0.5)
    hung = Verdict(Policy.COUNT, "hung", FailureClass.HUNG)
    for at in (0.0, 1000.0, 2000.0, 3000.0):
        assert type(tally.decide(hung, at)).__name__ == "Retry"


@pytest.mark.parametrize(
    ("failure", "wait"),
    [(FailureClass.ENVIRONMENT, 300), (FailureClass.RESOURCE, 60), (FailureClass.HOST, 5)],
)
def test_what_waits_for_the_world_is_never_quarantined(failure: FailureClass, wait: float) -> None:
    world = World().give("start")
    for _ in range(50):
        assert fail(world, Verdict(Policy.WAIT, "not now", failure, wait)) is Phase.BACKOFF
        assert wait <= world.delays[-1] <= 300


# -- verdicts


@dataclass(frozen=True)
class Ending:
    exit_status: int | None = None
    signal: int | None = None
    peak_rss: int | None = None
    reported: bool = True
    refusal: Refusal | None = None


def words(code: str, traceback: str = "") -> LastWords:
    return LastWords(code, f"It says {code}.", traceback)


@pytest.mark.parametrize(
    ("ending", "policy", "failure", "reason"),
    [
        (Ending(0), Policy.COUNT, FailureClass.TRANSIENT, "ended by itself with exit status 0"),
        (Ending(1), Policy.COUNT, FailureClass.SOFTWARE, "ended by itself with exit status 1"),
        (Ending(64), Policy.GIVE_UP, FailureClass.CONFIGURATION, "status 64: it was started"),
        (Ending(65), Policy.GIVE_UP, FailureClass.WEIGHTS, "the weights are damaged"),
        (Ending(66), Policy.GIVE_UP, FailureClass.NOT_FOUND, "files of the model are missing"),
        (Ending(69), Policy.WAIT, FailureClass.ENVIRONMENT, "the device isn't there"),
        (Ending(70), Policy.COUNT, FailureClass.SOFTWARE, "an unexpected error"),
        (Ending(71), Policy.WAIT, FailureClass.RESOURCE, "there isn't enough memory"),
        (Ending(75), Policy.WAIT, FailureClass.TRANSIENT, "away for the moment"),
        (Ending(77), Policy.GIVE_UP, FailureClass.REFUSED, "the model isn't allowed"),
        (Ending(78), Policy.GIVE_UP, FailureClass.CONFIGURATION, "can't be served"),
        (Ending(86), Policy.COUNT, FailureClass.GPU_CONTEXT, "the GPU's context is lost"),
        (Ending(127), Policy.WAIT, FailureClass.HOST, "its program can't be run"),
        (Ending(signal=9), Policy.COUNT, FailureClass.EXTERNAL_KILL, "signal 9 (SIGKILL) from out"),
        (Ending(signal=15), Policy.COUNT, FailureClass.EXTERNAL_KILL, "15 (SIGTERM) from outside"),
        (Ending(signal=11), Policy.COUNT, FailureClass.CRASH, "crashed with signal 11 (SIGSEGV)"),
        (Ending(signal=7), Policy.COUNT, FailureClass.CRASH, "(SIGBUS): look for a full disk"),
        (Ending(signal=4), Policy.GIVE_UP, FailureClass.PERMANENT, "need another CPU"),
        (Ending(signal=40), Policy.COUNT, FailureClass.EXTERNAL_KILL, "killed by signal 40"),
        (Ending(reported=False), Policy.COUNT, FailureClass.EXTERNAL_KILL, "the keeper was killed"),
        (Ending(), Policy.COUNT, FailureClass.EXTERNAL_KILL, "isn't known"),
    ],
)
def test_an_end_that_nobody_wanted_has_a_class_and_a_reason(
    ending: Ending, policy: Policy, failure: FailureClass, reason: str
) -> None:
    verdict = classify(ending, None, None, loading=True)
    assert (verdict.policy, verdict.failure) == (policy, failure)
    assert reason in verdict.reason


def test_an_intent_counts_more_than_the_evidence() -> None:
    stop = Intent("stop", "the operator stopped it")
    assert classify(Ending(signal=11), stop, words("load_failed"), loading=True) == Verdict(
        Policy.ASKED, "the operator stopped it"
    )
    hung = Intent("hung", "it hung", FailureClass.HUNG)
    verdict = classify(Ending(signal=9), hung, None, loading=False, out_of_memory=True)
    assert (verdict.policy, verdict.failure) == (Policy.COUNT, FailureClass.HUNG)
    other = Intent("incompatible", "another version", FailureClass.PROTOCOL, permanent=True)
    assert classify(Ending(signal=9), other, None, loading=True).policy is Policy.GIVE_UP


@pytest.mark.parametrize("ending", [Ending(66), Ending(signal=9), Ending(reported=False)])
def test_last_words_are_the_reason(ending: Ending) -> None:
    verdict = classify(ending, None, words("model_files_missing"), loading=True)
    assert verdict == Verdict(
        Policy.GIVE_UP, "It says model_files_missing.", FailureClass.NOT_FOUND
    )


def test_the_same_traceback_has_the_same_digest_and_only_while_loading() -> None:
    said = words("load_failed", "Traceback\n  boom")
    first = classify(Ending(70), None, said, loading=True)
    assert first.digest
    assert classify(Ending(70), None, said, loading=True).digest == first.digest
    assert not classify(Ending(70), None, said, loading=False).digest
    assert not classify(Ending(71), None, words("out_of_memory", "x"), loading=True).digest


def test_sigkill_with_an_oom_kill_is_out_of_memory() -> None:
    verdict = classify(
        Ending(signal=9, peak_rss=3 * 2**30), None, None, loading=False, out_of_memory=True
    )
    assert verdict.failure is FailureClass.OUT_OF_MEMORY
    assert verdict.reason == (
        "out of memory: the kernel killed the worker; it had used up to 3.0 GiB"
    )


def test_a_load_that_the_kernel_has_killed_for_want_of_memory_waits_for_some() -> None:
    killed = Ending(signal=9, peak_rss=3 * 2**30)
    verdict = classify(killed, None, None, loading=True, out_of_memory=True)
    assert (verdict.policy, verdict.failure) == (Policy.WAIT, FailureClass.OUT_OF_MEMORY)
    assert verdict.wait == RESOURCE_SECONDS
    # A limit of its own doesn't grow by waiting.
    limited = classify(killed, None, None, loading=True, out_of_memory=True, limit=2**31)
    assert limited.policy is Policy.COUNT


def test_a_limit_is_named_with_the_peak() -> None:
    killed = Ending(signal=9, peak_rss=3 * 2**29)
    verdict = classify(killed, None, None, loading=False, out_of_memory=True, limit=2**30)
    assert verdict.failure is FailureClass.OUT_OF_MEMORY
    assert verdict.reason == "out of memory: it needs more than its limit of 1.0 GiB (peak 1.5 GiB)"
    assert too_much(2**29, None) == "out of memory: it needs more than its limit of 512.0 MiB"


@pytest.mark.parametrize("phase", [Phase.SPAWNING, Phase.LOADING, Phase.READY, Phase.DRAINING])
def test_who_takes_too_much_memory_is_killed_for_that(phase: Phase) -> None:
    world = world_in(phase).give("exceeded", "it needs more than it may have")
    assert world.phase is Phase.KILLING
    assert world.done[-1] == "kill"
    assert world.intents[-1] == Intent(
        "memory", "it needs more than it may have", FailureClass.OUT_OF_MEMORY
    )


def test_a_spawn_that_failed_says_what_the_system_said() -> None:
    verdict = not_spawned(OSError(24, "Too many open files"))
    assert verdict.reason == "the worker couldn't be started: Too many open files"
    assert (verdict.policy, verdict.failure) == (Policy.WAIT, FailureClass.HOST)


# -- random histories


class Histories(RuleBasedStateMachine):
    """Whatever happens in whatever order, the promises hold."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(Workers(max_failures=3))
        self.stopped_at: int | None = None
        """How many spawns there had been when it was last told to stop, and not to start."""

    @rule(name=st.sampled_from([name for name in INPUTS if name not in {"exited", "failing"}]))
    def anything(self, name: str) -> None:
        if name == "stop":
            self.stopped_at = self.world.spawns
        elif name in {"start", "reset", "restart"}:
            self.stopped_at = None
        self.world.give(name)

    @rule(steps=st.lists(st.sampled_from(["start", "admit", "hello", "loaded"]), max_size=4))
    def come_up(self, steps: list[str]) -> None:
        for step in steps:
            self.anything(step)

    @precondition(lambda self: self.world.process)
    @rule()
    def last_words(self) -> None:
        self.world.words = True
        self.world.give("failing")

    @precondition(lambda self: self.world.process)
    @rule(policy=st.sampled_from(Policy), failure=st.sampled_from(FailureClass))
    def ends(self, policy: Policy, failure: FailureClass) -> None:
        self.world.exit(Verdict(policy, "it ended", failure))

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0, 40.0, 1000.0]), chance=st.floats(0, 0.999))
    def time_passes(self, seconds: float, chance: float) -> None:
        self.world.chance = chance
        self.world.advance(seconds)

    @invariant()
    def a_process_is_there_exactly_in_the_states_that_have_one(self) -> None:
        assert self.world.process is (self.world.phase in ALIVE)

    @invariant()
    def no_timer_outlives_its_state(self) -> None:
        timers = len(self.world.clock.getDelayedCalls())
        # In READY it has nothing more to say after the good period.
        good = self.world.phase is Phase.READY and timers == 0
        assert good or timers == (self.world.phase in TIMED)

    @invariant()
    def nothing_settles_for_ever(self) -> None:
        assert self.world.phase is not Phase.SETTLING

    @invariant()
    def delays_are_within_their_bounds(self) -> None:
        assert all(0.8 <= delay <= 900 for delay in self.world.delays)

    @invariant()
    def what_was_stopped_does_not_come_back(self) -> None:
        assert self.stopped_at in {None, self.world.spawns}

    def teardown(self) -> None:
        # However it stands, a stop ends it within the deadlines.
        self.world.done.clear()
        self.world.give("stop")
        for _ in range(4):
            if self.world.process and "kill" in self.world.done:
                self.world.exit()
            self.world.advance(31)
        assert self.world.phase is Phase.STOPPED


Histories.TestCase.settings = hypothesis_settings(max_examples=250, stateful_step_count=50)
TestRandomHistories = Histories.TestCase
