"""Which models are in memory: what to load next and what makes room for it, decided purely.

Requests for a model that is loaded are never held up here. Models that are waited for
are loaded by how many requests wait and for how long, so that what waits for one model
is served together; nobody waits for ever, for whoever has waited ``max_wait`` comes
first. Room is made by whatever costs least: the seconds that it would take to load it
again, times how often it has been used lately, per byte. What is busy or pinned stays,
and what has just come stays for a while, lest two models chase each other out. What has
been in use for longer than ``max_wait``, without a pause in which it could have gone, takes no
new requests while somebody has waited for so long, until it is idle and can go.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

USE_SECONDS = 60.0
"""After this long a use counts for 1/e of a present one."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Durations in seconds."""

    max_wait: float = 30.0
    """Who has waited for so long comes first,"""
    min_residency: float = 10.0
    """and else a model that has come stays at least for so long."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that is in memory or on its way there; times on one monotonic clock."""

    name: str
    size: int
    """Bytes."""
    since: float
    """When it was loaded."""
    uses: float
    """Requests lately, as ``Uses`` counts them."""
    load_seconds: float
    """To load it again."""
    held: bool
    """Pinned, wanted always, or still loading: it stays."""
    busy: bool = False
    """Requests are with it: it stays until they have been answered."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A model that isn't there, and that requests wait for."""

    name: str
    size: int
    since: float
    """The arrival of the oldest of them."""
    count: int
    load_seconds: float


class Decision(NamedTuple):
    """What to do now."""

    load: str | None = None
    evict: tuple[str, ...] = ()
    """First, to make room for it."""
    pause: tuple[str, ...] = ()
    """What is to take no new requests, so that it can go soon."""


class Uses:
    """Requests of one model, each counting the less the longer it is ago."""

    def __init__(self) -> None:
        self._value = 0.0
        self._at = 0.0

    def add(self, now: float) -> None:
        """One more."""
        self._value = self.value(now) + 1.0
        self._at = now

    def value(self, now: float) -> float:
        """What they count for now."""
        return self._value * math.exp((self._at - now) / USE_SECONDS)


def decide(
    waiting: Collection[Waiting],
    resident: Sequence[Resident],
    *,
    room: int,
    now: float,
    rules: Rules = Rules(),
) -> Decision:
    """The next model to load, if there is one that can be, and what has to go for it.

    ``room`` is what is free, in bytes. Decide again when that is done.
    """
    pause: tuple[str, ...] | None = None
    for candidate in order(waiting, now, rules):
        urgent = now - candidate.since >= rules.max_wait
        allowed = [each for each in resident if not each.busy]
        going = _victims(candidate, allowed, room, now, rules, urgent=urgent)
        if going is not None:
            return Decision(candidate.name, going, pause or ())
        if urgent and pause is None:
            pause = _pausing(candidate, resident, room, now, rules)
    return Decision(pause=pause or ())


def _pausing(
    candidate: Waiting, resident: Sequence[Resident], room: int, now: float, rules: Rules
) -> tuple[str, ...]:
    """What is in the way of who comes first only because it is used all the time."""
    allowed = [each for each in resident if not each.busy or now - each.since >= rules.max_wait]
    going = _victims(candidate, allowed, room, now, rules, urgent=True) or ()
    return tuple(each.name for each in resident if each.busy and each.name in going)


def order(waiting: Collection[Waiting], now: float, rules: Rules) -> list[Waiting]:
    """Whose turn is first, as far as there is room for it."""
    return sorted(waiting, key=lambda each: _rank(each, now, rules))


def room_in(
    candidate: Waiting, resident: Sequence[Resident], *, room: int, now: float, rules: Rules
) -> float | None:
    """Seconds until time alone makes room for it; ``None`` if it doesn't."""
    moments = [now, candidate.since + rules.max_wait]
    moments += [each.since + rules.min_residency for each in resident if not each.held]
    resident = [each for each in resident if not each.busy]
    for moment in sorted(moments):
        urgent = moment - candidate.since >= rules.max_wait
        if moment >= now and (
            _victims(candidate, resident, room, moment, rules, urgent=urgent) is not None
        ):
            return moment - now
    return None


def next_change(
    waiting: Collection[Waiting], resident: Sequence[Resident], now: float, rules: Rules
) -> float | None:
    """Seconds until time alone may change the decision; ``None`` if it can't."""
    moments = [each.since + rules.max_wait for each in waiting]
    if waiting:
        moments += [
            each.since + (rules.max_wait if each.busy else rules.min_residency)
            for each in resident
            if not each.held
        ]
    ahead = [moment - now for moment in moments if moment > now]
    return min(ahead, default=None)


def _rank(candidate: Waiting, now: float, rules: Rules) -> tuple[bool, float]:
    """Who comes first sorts first."""
    waited = now - candidate.since
    if waited >= rules.max_wait:
        return (False, candidate.since)
    # The seconds that are waited for it, by the seconds that it takes.
    return (True, -candidate.count * (waited + 1.0) / max(candidate.load_seconds, 0.1))


def _victims(
    candidate: Waiting,
    resident: Sequence[Resident],
    room: int,
    now: float,
    rules: Rules,
    *,
    urgent: bool,
) -> tuple[str, ...] | None:
    """The cheapest models whose going makes room; ``None`` if nothing allowed does."""
    lacking = candidate.size - room
    if lacking <= 0:
        return ()
    allowed = [
        each
        for each in resident
        if not each.held and (urgent or now - each.since >= rules.min_residency)
    ]
    going: list[Resident] = []
    for each in sorted(allowed, key=_cost):
        going.append(each)
        lacking -= each.size
        if lacking <= 0:
            break
    if lacking > 0:
        return None
    # The last one may have made those before it needless.
    spare = -lacking
    for each in sorted(going[:-1], key=_cost, reverse=True):
        if each.size <= spare:
            going.remove(each)
            spare -= each.size
    return tuple(each.name for each in going)


def _cost(each: Resident) -> float:
    return each.load_seconds * each.uses / max(each.size, 1)
