"""Whether a worker in service is well, decided purely from its signs of life.

Each sign has a stopwatch that begins again whenever the sign is seen:

* the heartbeat, which stands still when the process is stopped, or when something
  holds the interpreter (SIGSTOP, a native call with the GIL, swapping to death);
* the processor time of the compute thread, which grows while it computes on the
  processor, and stands still when it is blocked in a call that never returns;
* the progress of the running operation, within a budget that an honest one keeps;
* the answer of the main thread to a PING.

All stopwatches begin again when the daemon itself stood still or the machine was
suspended: then nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from tursi.config import Workers
from tursi.heartbeat import Beat, Operation

LATE_PERIODS = 3
"""An observation that comes after that many periods says nothing: it is the daemon that stood."""
SUSPENDED_SECONDS = 1.0
"""A jump of the time spent suspended that counts; clocks are read one after the other."""
_USED = 0.001
"""Seconds of processor time between two observations that count as computing."""

_NAMES = {
    Operation.IDLE: "waiting",
    Operation.IMPORT: "import",
    Operation.LOAD: "loading",
    Operation.WARM: "first inference",
    Operation.PREPARE: "reading of a request",
    Operation.BATCH: "batch",
    Operation.PREFILL: "reading of a prompt",
    Operation.DECODE: "decoding step",
}


class Health(IntEnum):
    """The worst that any sign says."""

    WELL = 0
    SUSPECT = 1
    HUNG = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """How the worker is, and by which sign (one clause)."""

    health: Health
    reason: str = ""


WELL = Finding(Health.WELL, "it gives signs of life")


class Liveness:
    """The stopwatches of one life; all times in monotonic seconds.

    ``on_processor``: the model computes on the processor, so that an operation
    that uses none is blocked (a thread may rightly sleep while a GPU computes).
    """

    def __init__(self, settings: Workers, *, on_processor: bool) -> None:
        self.configure(settings)
        self._on_processor = on_processor
        self._observed: float | None = None
        self._suspended = 0.0
        self._beat: Beat | None = None
        self._beat_at = self._worked_at = self._came_further_at = 0.0
        self._asked_at: float | None = None
        self._ask_at = 0.0

    def configure(self, settings: Workers) -> None:
        """Go by these from now on."""
        self.period = min(settings.beat_seconds, settings.ping_timeout) / 2
        """Seconds between two observations."""
        self._settings = settings

    @property
    def operation(self) -> str:
        """What the compute thread was last seen at, for people; empty if not known."""
        return _NAMES[self._beat.operation] if self._beat else ""

    def begin(self, now: float) -> None:
        """Begin, or begin again after a pause."""
        self._observed = None
        self._asked_at = None
        self._ask_at = now + self._settings.ping_seconds

    def asks(self, now: float) -> bool:
        """Whether to send a PING now. One at a time: they can't overtake each other."""
        if self._asked_at is None and now >= self._ask_at:
            self._asked_at = now
            return True
        return False

    def answered(self, now: float) -> None:
        """A PONG has come, be it late."""
        if self._asked_at is not None:
            self._ask_at = max(now, self._asked_at + self._settings.ping_seconds)
            self._asked_at = None

    def observe(self, now: float, suspended: float, beat: Beat | None) -> Finding:
        """How it is; ``suspended`` is how long the machine has ever been (it only grows)."""
        if (
            self._observed is None
            or now - self._observed > LATE_PERIODS * self.period
            or abs(suspended - self._suspended) > SUSPENDED_SECONDS
        ):
            self._begin_again(now)
        self._observed, self._suspended = now, suspended
        self._see(now, beat)
        worst = WELL
        for seconds, suspect, hung, reason in self._signs(now):
            health = Health((seconds >= suspect) + (seconds >= hung))
            if health > worst.health:
                worst = Finding(health, f"{reason} for {round(seconds, 1):g} s")
        return worst

    def _begin_again(self, now: float) -> None:
        self._beat_at = self._worked_at = self._came_further_at = now
        if self._asked_at is not None:
            self._asked_at = now

    def _see(self, now: float, beat: Beat | None) -> None:
        last, self._beat = self._beat, beat
        if beat is None or last is None:
            self._beat_at = self._worked_at = self._came_further_at = now
            return
        if beat.count != last.count:
            self._beat_at = now
        # Compared, never measured: the worker's word can't make it look old.
        if beat.operation is Operation.IDLE or (
            (beat.operation, beat.started, beat.progress)
            != (last.operation, last.started, last.progress)
        ):
            self._worked_at = self._came_further_at = now
        elif not self._on_processor or abs(beat.processor - last.processor) > _USED:
            self._worked_at = now

    def _signs(self, now: float) -> Iterator[tuple[float, float, float, str]]:
        """How long each sign is missing, when that is suspect, when it is hung, and its name."""
        settings = self._settings
        one, all_ = settings.beat_seconds, settings.beat_seconds * settings.beat_misses
        yield now - self._beat_at, one, all_, "its heartbeat has stood still"
        yield (
            now - self._worked_at,
            one,
            all_,
            f"its {self.operation} has neither come further nor used the processor",
        )
        budget = self._budget()
        yield (
            now - self._came_further_at,
            budget,
            budget + one,
            f"its {self.operation} has come no further",
        )
        if self._asked_at is not None:
            yield (
                now - self._asked_at,
                settings.ping_timeout,
                settings.ping_timeout * settings.ping_misses,
                "it has left a PING unanswered",
            )

    def _budget(self) -> float:
        if self._beat is not None and self._beat.operation is Operation.DECODE:
            return self._settings.step_seconds
        return self._settings.first_seconds
