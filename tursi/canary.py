"""Which requests a canary gets: so many of a hundred, whatever happens, at moments nobody foresees.

The requests are cut into stretches of which each has one for the canary, at a place
that is drawn for it. So its share never strays by more than one or two requests, and
a client that asks in a rhythm is not always or never served by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_FEW = 20
"""Requests before anything is concluded from them."""
_SHARE = 0.05
_TIMES = 3.0
_SLOWER = 2.0


class Share:
    """Deals requests out; ``random`` gives numbers in [0, 1)."""

    def __init__(self, weight: int, random: Callable[[], float]) -> None:
        self.weight = weight
        self._random = random
        self._dealt = 0
        self._given = 0
        self._next = self._place()

    @property
    def turn(self) -> bool:
        """Whether the next request is the canary's."""
        return self.weight > 0 and self._dealt >= self._next

    def deal(self, *, canary: bool) -> None:
        """One more has gone to the canary, or to the other although it was its turn."""
        self._dealt += 1
        if canary:
            self._given += 1
            self._next = self._place()

    def _place(self) -> float:
        """Where in its stretch the canary's next request is."""
        if not self.weight:
            return 0.0
        return float(int((self._given + self._random()) * 100 / self.weight))


@dataclass(slots=True)
class Tally:
    """What a generation has answered."""

    requests: int = 0
    errors: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, *, failed: bool) -> None:
        """One more."""
        self.requests += 1
        self.errors += failed
        self.seconds += seconds


def worse(canary: Tally, stable: Tally) -> str | None:
    """What is far worse with the canary, in a sentence, or ``None``."""
    if min(canary.requests, stable.requests) < _FEW:
        return None
    failed, usual = canary.errors / canary.requests, stable.errors / stable.requests
    if failed >= _SHARE and failed >= _TIMES * usual:
        return f"{100 * failed:.0f} % of its requests fail, {100 * usual:.0f} % of the others."
    slow, before = canary.seconds / canary.requests, stable.seconds / stable.requests
    if slow >= _SLOWER * before:
        return f"Its requests take {slow:.3g} s, the others {before:.3g} s."
    return None
