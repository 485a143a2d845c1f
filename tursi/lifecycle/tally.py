"""What the failures so far make of the next one: try again when, wait, or give up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tursi.config import Workers
from tursi.lifecycle.verdict import Policy, Verdict
from tursi.model import FailureClass, WorkerLife

MAX_OUT_OF_MEMORY = 2
"""Retries after the kernel has killed a worker for want of memory."""
MAX_CRASHES = 3
"""Retries after crashes in a row (SIGSEGV and the like)."""
MAX_HUNG = 3
HUNG_SECONDS = 1800.0
"""That many hung workers within that time end in quarantine."""
MAX_HALF_OPENS = 3
"""Single tries out of quarantine, before giving up."""


def backoff(attempt: int, settings: Workers, random: float) -> float:
    """Seconds before the ``attempt``-th try (from 1); ``random`` is in [0, 1)."""
    # 2**60 seconds are past every limit, and a float takes no 2**1024.
    doubled = settings.backoff_initial * 2.0 ** min(attempt - 1, 60)
    return jittered(min(settings.backoff_max, doubled), settings, random)


def jittered(seconds: float, settings: Workers, random: float) -> float:
    """``seconds``, moved by up to the jitter either way so that many don't retry at once."""
    return seconds * (1 + settings.backoff_jitter * (2 * random - 1))


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after ``seconds``."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Quarantine:
    """One try after ``seconds``, no more."""

    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Don't try again before somebody asks for it."""

    reason: str


Decision = Retry | Quarantine | GiveUp

_WAITING = {FailureClass.ENVIRONMENT, FailureClass.RESOURCE, FailureClass.HOST}
"""Classes that are no fault of the worker (``verdict.Policy.WAIT``)."""


@dataclass(slots=True)
class Tally:
    """Failures since the last good period."""

    settings: Workers
    random: Callable[[], float]
    attempts: int = 0
    """Tries in a row, for the back-off."""
    failures: int = 0
    """Those of them that count towards quarantine."""
    out_of_memory: int = 0
    crashes: int = 0
    hung: list[float] = field(default_factory=list)
    digest: str = ""
    half_open: bool = False
    """Whether the present try is the single one out of quarantine."""
    half_opens: int = 0

    def good(self) -> None:
        """Forget what counts in a row: it has been good for long enough."""
        self.attempts = self.failures = self.out_of_memory = self.crashes = self.half_opens = 0
        self.digest = ""
        self.half_open = False

    def clear(self) -> None:
        """Forget everything: somebody has mended it."""
        self.good()
        self.hung.clear()

    def restore(self, lives: Iterable[WorkerLife], now: float, wall_clock: float) -> None:
        """Count what earlier lives ended of, oldest first, as if it had been seen to happen.

        ``now`` is monotonic and ``wall_clock`` UTC, both of the same moment. The
        next try then is the single one that quarantine allows, if it was reached.
        """
        for life in lives:
            if life.ended_at is None:
                continue
            if life.ready_at and life.ended_at - life.ready_at >= self.settings.good_seconds:
                self.good()
            if life.failure is None:
                continue
            policy = Policy.WAIT if life.failure in _WAITING else Policy.COUNT
            verdict = Verdict(policy, life.reason or "", life.failure)
            # A clock that was set back must not put it into the future.
            decision = self.decide(verdict, now - max(wall_clock - life.ended_at, 0.0))
            self.half_open = isinstance(decision, Quarantine)

    def decide(self, verdict: Verdict, now: float) -> Decision:
        """Count ``verdict`` (at ``now``, monotonic seconds) and say what follows."""
        repeated = bool(verdict.digest) and verdict.digest == self.digest
        self.digest = verdict.digest
        if verdict.policy is Policy.GIVE_UP:
            return GiveUp(verdict.reason)
        if repeated:
            self.failures += 1
            return GiveUp(f"{verdict.reason} (the same error twice in a row)")
        self.attempts += 1
        if verdict.policy is Policy.WAIT:
            seconds = max(
                backoff(self.attempts, self.settings, self.random()),
                jittered(verdict.wait, self.settings, self.random()),
            )
            return Retry(seconds)
        return self._count(verdict, now)

    def _count(self, verdict: Verdict, now: float) -> Decision:
        self.failures += 1
        if verdict.failure is FailureClass.OUT_OF_MEMORY:
            self.out_of_memory += 1
            if self.out_of_memory > MAX_OUT_OF_MEMORY:
                return GiveUp(f"{verdict.reason} ({self.out_of_memory} times)")
        self.crashes = self.crashes + 1 if verdict.failure is FailureClass.CRASH else 0
        if verdict.failure is FailureClass.HUNG:
            self.hung = [at for at in self.hung if now - at < HUNG_SECONDS] + [now]
        if self.half_open:
            self.half_open = False
            self.half_opens += 1
            if self.half_opens >= MAX_HALF_OPENS:
                return GiveUp(f"{verdict.reason} (again, {self.half_opens} times after quarantine)")
            return self._quarantine(verdict, f"{self.failures} failures in a row")
        if self.failures >= self.settings.max_failures:
            return self._quarantine(verdict, f"{self.failures} failures in a row")
        if self.crashes > MAX_CRASHES:
            return self._quarantine(verdict, f"{self.crashes} crashes in a row")
        if len(self.hung) >= MAX_HUNG:
            return self._quarantine(verdict, f"it hung {len(self.hung)} times")
        return Retry(backoff(self.attempts, self.settings, self.random()))

    def _quarantine(self, verdict: Verdict, why: str) -> Quarantine:
        return Quarantine(self.settings.quarantine_seconds, f"{verdict.reason} ({why})")
