"""The states' entry actions: each ends the timer of the state that was left and starts its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tursi.config import Workers
from tursi.lifecycle.inputs import Clock, Effects, Lifecycle, Timer
from tursi.lifecycle.tally import Tally
from tursi.lifecycle.verdict import Intent, Policy, Verdict
from tursi.model import Phase

QUEUE_SECONDS = 24 * 3600.0
"""How long a worker waits to be admitted."""
EXAMINE_SECONDS = 3.0
"""How long a hung worker has to tell where its threads stand, before it is killed."""
WEDGED_SECONDS = 30.0
"""Between two attempts to kill what can't be killed."""


@dataclass(slots=True)
class Core:
    """What a machine knows besides its state."""

    effects: Effects
    clock: Clock
    tally: Tally
    wanted: bool = False
    """Whether it shall run."""
    load_began: float = 0.0
    overdue: Intent | None = None
    """Why it will be killed if it doesn't end by itself in time; ``None``: it was asked to."""
    verdict: Verdict = field(default_factory=lambda: Verdict(Policy.ASKED, "not started"))
    examining: bool = False
    """Whether it is still to be killed once it has told where its threads stand."""
    timer: Timer | None = None

    @property
    def settings(self) -> Workers:
        """Those of now: they may change while a worker lives."""
        return self.tally.settings

    def enter(
        self,
        phase: Phase,
        cause: str,
        seconds: float | None = None,
        expired: Callable[[str], None] | None = None,
        sentence: str = "",
    ) -> Phase:
        """Begin a state: end the last one's timer, start this one's, announce the phase."""
        self.rearm(seconds, expired, sentence)
        self.effects.announce(phase, cause)
        return phase

    def rearm(
        self, seconds: float | None, expired: Callable[[str], None] | None, sentence: str
    ) -> None:
        """Replace the state's timer."""
        if self.timer is not None and self.timer.active():
            self.timer.cancel()
        self.timer = None
        if seconds is not None and expired is not None:
            self.timer = self.clock.callLater(max(seconds, 0.0), expired, sentence)

    def kill(self, intent: Intent | None) -> None:
        """Kill the tree; ``None`` where the reason is known already."""
        if intent is not None:
            self.effects.intend(intent)
        self.effects.kill()

    def terminate(self, name: str, cause: str) -> None:
        """Ask the worker to end, because somebody wants it so."""
        self.overdue = None
        self.effects.intend(Intent(name, cause))
        self.effects.terminate()


def enter_queued(inputs: Lifecycle, core: Core, cause: str) -> Phase:
    """Waits to be admitted."""
    core.wanted = True
    sentence = "there was no room for it for 24 h"
    return core.enter(Phase.QUEUED, cause, QUEUE_SECONDS, inputs.expired, sentence)


def enter_spawning(inputs: Lifecycle, core: Core, cause: str) -> Phase:
    """The process starts; it has to say hello."""
    seconds = core.settings.spawn_seconds
    sentence = f"the worker didn't say hello within {seconds:g} s"
    phase = core.enter(Phase.SPAWNING, cause, seconds, inputs.expired, sentence)
    core.effects.spawn()
    return phase


def enter_loading(inputs: Lifecycle, core: Core, cause: str) -> Phase:
    """The model is being read; there must be progress."""
    core.load_began = core.clock.seconds()
    return core.enter(Phase.LOADING, cause, *load_deadline(inputs, core))


def load_deadline(inputs: Lifecycle, core: Core) -> tuple[float, Callable[[str], None], str]:
    """Without progress, or in all, whichever comes first."""
    stall, most = core.settings.load_stall_seconds, core.settings.load_seconds
    left = core.load_began + most - core.clock.seconds()
    if left <= stall:
        return left, inputs.expired, f"loading took longer than {most:g} s"
    return stall, inputs.expired, f"loading made no progress for {stall:g} s"


def enter_warming(inputs: Lifecycle, core: Core, cause: str) -> Phase:
    """The model is being tried out."""
    seconds = core.settings.warm_seconds
    sentence = f"the first inference took longer than {seconds:g} s"
    return core.enter(Phase.WARMING, cause, seconds, inputs.expired, sentence)


def enter_ready(inputs: Lifecycle, core: Core, cause: str) -> Phase:
    """It serves."""
    seconds = core.settings.good_seconds
    return core.enter(Phase.READY, cause, seconds, inputs.expired, f"ready for {seconds:g} s")


def enter_suspect(_inputs: Lifecycle, core: Core, cause: str) -> Phase:
    """A sign of life is missing: it gets nothing new."""
    # Its deadline is that of the observations, which go on: a timer of its own
    # would kill the worker when it is the daemon that had stood still.
    return core.enter(Phase.SUSPECT, cause)


def enter_draining(inputs: Lifecycle, core: Core, cause: str) -> Phase:
    """It finishes what is in flight."""
    seconds = core.settings.drain_seconds
    sentence = f"requests were still in flight after {seconds:g} s"
    phase = core.enter(Phase.DRAINING, cause, seconds, inputs.expired, sentence)
    core.effects.drain()
    return phase


def enter_stopping(inputs: Lifecycle, core: Core, cause: str) -> Phase:
    """It has been asked to end, or is about to by itself."""
    seconds = core.settings.stop_seconds
    sentence = f"the worker didn't end within {seconds:g} s"
    return core.enter(Phase.STOPPING, cause, seconds, inputs.expired, sentence)


def enter_killing(inputs: Lifecycle, core: Core, cause: str) -> Phase:
    """Its tree has been killed, or will be once it has been examined."""
    core.examining = False
    return core.enter(Phase.KILLING, cause, *kill_deadline(inputs, core))


def kill_deadline(inputs: Lifecycle, core: Core) -> tuple[float, Callable[[str], None], str]:
    """From the SIGKILL on."""
    seconds = core.settings.kill_seconds
    return seconds, inputs.expired, f"the worker outlives SIGKILL since {seconds:g} s"


def enter_settling(inputs: Lifecycle, core: Core, verdict: Verdict) -> Phase:
    """It is gone; its memory may take a moment."""
    core.verdict = verdict
    seconds = core.settings.settle_seconds
    phase = core.enter(Phase.SETTLING, verdict.reason, seconds, inputs.expired, "time is up")
    core.effects.settle()
    return phase


def enter_backoff(_inputs: Lifecycle, core: Core, cause: str) -> Phase:
    """It comes back after a while."""
    # The timer is the monitor's, which owns restarts: see Effects.retry.
    return core.enter(Phase.BACKOFF, cause)


def enter_quarantined(_inputs: Lifecycle, core: Core, cause: str) -> Phase:
    """It has failed too often, and comes back for single tries."""
    return core.enter(Phase.QUARANTINED, cause)


def enter_failed(_inputs: Lifecycle, core: Core, cause: str) -> Phase:
    """It comes back when somebody has changed something."""
    return core.enter(Phase.FAILED, cause)


def enter_wedged(inputs: Lifecycle, core: Core, cause: str) -> Phase:
    """It can't be killed (a call into the kernel that doesn't return)."""
    return core.enter(Phase.WEDGED, cause, WEDGED_SECONDS, inputs.expired, "another attempt")
