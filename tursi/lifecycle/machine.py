"""What moves a worker from state to state.

Pure: the clock, randomness and everything that acts come in from outside. Every
input is legal in every state; where it means nothing it is ignored.
"""

from __future__ import annotations

from contextlib import suppress

from automat import TypeMachineBuilder

from tursi.lifecycle import states
from tursi.lifecycle.inputs import Clock, Effects, Lifecycle
from tursi.lifecycle.states import (
    EXAMINE_SECONDS,
    WEDGED_SECONDS,
    Core,
    kill_deadline,
    load_deadline,
)
from tursi.lifecycle.tally import GiveUp, Quarantine, Retry, Tally
from tursi.lifecycle.verdict import Intent, Policy
from tursi.model import FailureClass, Phase


def lifecycle(effects: Effects, clock: Clock, tally: Tally) -> Lifecycle:
    """A machine in STOPPED; its settings are those of ``tally``."""
    return machine(Core(effects, clock, tally))


_builder = TypeMachineBuilder(Lifecycle, Core)
# Automat's first state has no factory, so what leads here announces it: _rested.
stopped = _builder.state("stopped")
queued = _builder.state("queued", states.enter_queued)
spawning = _builder.state("spawning", states.enter_spawning)
loading = _builder.state("loading", states.enter_loading)
warming = _builder.state("warming", states.enter_warming)
ready = _builder.state("ready", states.enter_ready)
suspect = _builder.state("suspect", states.enter_suspect)
draining = _builder.state("draining", states.enter_draining)
stopping = _builder.state("stopping", states.enter_stopping)
killing = _builder.state("killing", states.enter_killing)
settling = _builder.state("settling", states.enter_settling)
backoff = _builder.state("backoff", states.enter_backoff)
quarantined = _builder.state("quarantined", states.enter_quarantined)
failed = _builder.state("failed", states.enter_failed)
wedged = _builder.state("wedged", states.enter_wedged)

_PROCESS = (spawning, loading, warming, ready, suspect, draining, stopping, killing, wedged)
"""There is a process, or may be."""
_ABORTABLE = (spawning, loading, warming, suspect)
_TALKING = (spawning, loading, warming, ready, suspect, draining)
"""The worker is expected to talk and to live."""
_WAITING = (queued, backoff, quarantined, failed)
"""There is no process, and nothing to wait for when it shall stop."""


# -- what leads to what -----------------------------------------------------------------


def _rested(_inputs: Lifecycle, core: Core, _phase: Phase, cause: str) -> None:
    core.wanted = False
    core.enter(Phase.STOPPED, cause)


def _want(_inputs: Lifecycle, core: Core, _phase: Phase, _cause: str) -> None:
    core.wanted = True


def _forget(_inputs: Lifecycle, core: Core, _phase: Phase, _cause: str) -> None:
    core.tally.clear()


def _unwant(_inputs: Lifecycle, core: Core, _phase: Phase, _cause: str) -> None:
    core.wanted = False


def _abort(_inputs: Lifecycle, core: Core, _phase: Phase, cause: str) -> None:
    core.wanted = False
    core.terminate("stop", cause)


def _abort_and_come_back(_inputs: Lifecycle, core: Core, _phase: Phase, cause: str) -> None:
    core.terminate("restart", cause)


def _expect_end(_inputs: Lifecycle, core: Core, _phase: Phase, _cause: str) -> None:
    core.overdue = None


def _expect_end_of_lost(_inputs: Lifecycle, core: Core, _phase: Phase, _cause: str) -> None:
    core.overdue = Intent(
        "lost", "the worker closed its data socket without ending", FailureClass.PROTOCOL
    )


def _break(_inputs: Lifecycle, core: Core, _phase: Phase, cause: str) -> None:
    core.kill(Intent("protocol", cause, FailureClass.PROTOCOL))


def _kill_greedy(_inputs: Lifecycle, core: Core, _phase: Phase, cause: str) -> None:
    core.kill(Intent("memory", cause, FailureClass.OUT_OF_MEMORY))


def _refuse(_inputs: Lifecycle, core: Core, _phase: Phase, cause: str) -> None:
    core.kill(Intent("incompatible", cause, FailureClass.PROTOCOL, permanent=True))


def _examine(inputs: Lifecycle, core: Core, intent: Intent) -> None:
    """Kill it soon: where its threads stand is only to be had while it lives."""
    core.effects.intend(intent)
    core.examining = True
    core.rearm(EXAMINE_SECONDS, inputs.examined, "the time to tell is over")
    core.effects.examine()


stopped.upon(Lifecycle.start).to(queued).returns(None)
stopped.upon(Lifecycle.reset).to(queued)(lambda _inputs, core, _cause: core.tally.clear())

queued.upon(Lifecycle.admit).to(spawning).returns(None)
queued.upon(Lifecycle.expired).to(failed).returns(None)
queued.upon(Lifecycle.reset).loop()(_forget)

spawning.upon(Lifecycle.hello).to(loading).returns(None)


@spawning.upon(Lifecycle.expired).to(killing)
def _never_said_hello(_inputs: Lifecycle, core: Core, _phase: Phase, cause: str) -> None:
    core.kill(Intent("spawn-deadline", cause, FailureClass.TRANSIENT))


@loading.upon(Lifecycle.advanced).loop()
def _advance(inputs: Lifecycle, core: Core, _phase: Phase, _cause: str) -> None:
    core.rearm(*load_deadline(inputs, core))


loading.upon(Lifecycle.warming).to(warming).returns(None)
loading.upon(Lifecycle.loaded).to(ready).returns(None)
warming.upon(Lifecycle.loaded).to(ready).returns(None)


def _load_too_slow(inputs: Lifecycle, core: Core, _phase: Phase, cause: str) -> None:
    _examine(inputs, core, Intent("load-deadline", cause, FailureClass.HUNG))


loading.upon(Lifecycle.expired).to(killing)(_load_too_slow)
warming.upon(Lifecycle.expired).to(killing)(_load_too_slow)


@ready.upon(Lifecycle.expired).loop()
def _be_good(_inputs: Lifecycle, core: Core, _phase: Phase, _cause: str) -> None:
    core.tally.good()


ready.upon(Lifecycle.missed).to(suspect).returns(None)
suspect.upon(Lifecycle.answered).to(ready).returns(None)


def _kill_hung(inputs: Lifecycle, core: Core, _phase: Phase, cause: str) -> None:
    _examine(inputs, core, Intent("hung", cause, FailureClass.HUNG))


ready.upon(Lifecycle.hung).to(killing)(_kill_hung)
suspect.upon(Lifecycle.hung).to(killing)(_kill_hung)


@killing.upon(Lifecycle.examined).loop()
def _kill_examined(inputs: Lifecycle, core: Core, _phase: Phase, _cause: str) -> None:
    if core.examining:
        core.examining = False
        core.effects.kill()
        core.rearm(*kill_deadline(inputs, core))


@ready.upon(Lifecycle.stop).to(draining)
def _drain_for_good(_inputs: Lifecycle, core: Core, _phase: Phase, cause: str) -> None:
    core.wanted = False
    core.effects.intend(Intent("stop", cause))


@ready.upon(Lifecycle.restart).to(draining)
def _drain_and_come_back(_inputs: Lifecycle, core: Core, _phase: Phase, cause: str) -> None:
    core.effects.intend(Intent("restart", cause))


def _drained(_inputs: Lifecycle, core: Core, _phase: Phase, _cause: str) -> None:
    # The intent was recorded when the draining began.
    core.overdue = None
    core.effects.terminate()


draining.upon(Lifecycle.drained).to(stopping)(_drained)
draining.upon(Lifecycle.expired).to(stopping)(_drained)


@stopping.upon(Lifecycle.expired).to(killing)
def _kill_slow(_inputs: Lifecycle, core: Core, _phase: Phase, _cause: str) -> None:
    core.kill(core.overdue)


killing.upon(Lifecycle.expired).to(wedged).returns(None)


@wedged.upon(Lifecycle.expired).loop()
def _kill_again(inputs: Lifecycle, core: Core, _phase: Phase, cause: str) -> None:
    core.effects.kill()
    core.rearm(WEDGED_SECONDS, inputs.expired, cause)


for _state in _ABORTABLE:
    _state.upon(Lifecycle.stop).to(stopping)(_abort)
    _state.upon(Lifecycle.restart).to(stopping)(_abort_and_come_back)
for _state in _TALKING:
    _state.upon(Lifecycle.failing).to(stopping)(_expect_end)
    _state.upon(Lifecycle.lost).to(stopping)(_expect_end_of_lost)
    _state.upon(Lifecycle.broke).to(killing)(_break)
    _state.upon(Lifecycle.exceeded).to(killing)(_kill_greedy)
    _state.upon(Lifecycle.incompatible).to(killing)(_refuse)
for _state in (draining, stopping, killing, wedged):
    # It ends in any case; what follows is decided when it has.
    _state.upon(Lifecycle.stop).loop()(_unwant)
    _state.upon(Lifecycle.start).loop()(_want)
for _state in _PROCESS:
    _state.upon(Lifecycle.exited).to(settling).returns(None)
    _state.upon(Lifecycle.reset).loop()(_forget)


def _decide(inputs: Lifecycle, core: Core, _phase: Phase, _cause: str) -> None:
    verdict = core.verdict
    if not core.wanted:
        inputs.rest(verdict.reason)
    elif verdict.policy is Policy.ASKED:
        inputs.requeue(verdict.reason)
    else:
        match core.tally.decide(verdict, core.clock.seconds()):
            case Retry(seconds):
                inputs.back_off(verdict.reason)
                core.effects.retry(seconds)
            case Quarantine(seconds, reason):
                inputs.quarantine(reason)
                core.effects.retry(seconds)
            case GiveUp(reason):
                inputs.give_up(reason)


settling.upon(Lifecycle.settled).loop()(_decide)
settling.upon(Lifecycle.expired).loop()(_decide)
settling.upon(Lifecycle.stop).loop()(_unwant)
settling.upon(Lifecycle.start).loop()(_want)
settling.upon(Lifecycle.reset).loop()(_forget)
settling.upon(Lifecycle.rest).to(stopped)(_rested)
settling.upon(Lifecycle.requeue).to(queued).returns(None)
settling.upon(Lifecycle.back_off).to(backoff).returns(None)
settling.upon(Lifecycle.quarantine).to(quarantined).returns(None)
settling.upon(Lifecycle.give_up).to(failed).returns(None)

backoff.upon(Lifecycle.retry).to(queued).returns(None)


def _half_open(_inputs: Lifecycle, core: Core, _phase: Phase, _cause: str) -> None:
    core.tally.half_open = True


quarantined.upon(Lifecycle.retry).to(queued)(_half_open)
quarantined.upon(Lifecycle.start).to(queued)(_half_open)
quarantined.upon(Lifecycle.restart).to(queued)(_half_open)
quarantined.upon(Lifecycle.reset).to(queued)(_forget)
for _state in (backoff, failed):
    _state.upon(Lifecycle.start).to(queued).returns(None)
    _state.upon(Lifecycle.restart).to(queued).returns(None)
    _state.upon(Lifecycle.reset).to(queued)(_forget)
for _state in _WAITING:
    _state.upon(Lifecycle.stop).to(stopped)(_rested)


_INPUTS = tuple(
    member for name, member in vars(Lifecycle).items() if callable(member) and name[0] != "_"
)
for _any in (stopped, *_WAITING, *_PROCESS, settling):
    for _input in _INPUTS:
        # Automat refuses what is declared already: that means something there.
        with suppress(ValueError):
            _any.upon(_input).loop().returns(None)

machine = _builder.build()
