"""How far a model is that isn't there yet, and when it will be, as well as can be told."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping

from tursi.fleet.governor import Governor
from tursi.fleet.member import Member
from tursi.fleet.residence import LOAD_SECONDS, Residence
from tursi.loading import Loading
from tursi.model import Phase, Progress
from tursi.plan import LOAD_SLOTS, LOADING

FRESH_SECONDS = 0.25
"""For so long what was found out about a model is told again: many may ask at a time."""
_TELLING = 0.1
"""The share of a load from which on its pace tells how long the rest takes."""
_NEAREST = (Phase.WARMING, Phase.LOADING, Phase.SPAWNING, Phase.QUEUED, Phase.BACKOFF)


class Outlook:
    """Looks ahead; ``clock`` gives monotonic seconds, ``now`` UTC epoch seconds."""

    def __init__(
        self,
        *,
        members: Mapping[str, Member],
        residence: Residence,
        governor: Governor,
        clock: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        self._members = members
        self._residence = residence
        self._governor = governor
        self._clock = clock
        self._now = now
        self._told: dict[Member, tuple[float, Loading]] = {}

    def of(self, member: Member, position: int) -> Loading:
        """How it looks to the request at ``position`` of its queue."""
        at = self._clock()
        then, found = self._told.get(member, (0.0, None))
        if found is None or at - then > FRESH_SECONDS:
            if len(self._told) > len(self._members):
                self._told.clear()
            found = self._look(member)
            self._told[member] = at, found
        return Loading(found.stage, found.progress, found.eta_seconds, position)

    def _look(self, member: Member) -> Loading:
        expected = member.load_seconds or LOAD_SECONDS
        if member.paused:
            return _loading("memory", None, None, expected)
        phases = {worker.phase: worker for worker in member.serving()}
        phase = next((each for each in _NEAREST if each in phases), next(iter(phases), None))
        if phase is None:
            fetch = member.fetch
            if fetch is None:
                return _loading("queued", None, self._slot(self._before(member)), expected)
            if fetch.error is not None:
                return _loading("backoff", None, None, expected)
            return _loading(
                "fetching", share(fetch.progress), fetch.remaining(self._clock()), expected
            )
        status = phases[phase].status()
        if phase in LOADING:
            done = share(status.progress)
            return _loading(phase.value, done, self._left(member, done), 0.0)
        if phase is Phase.QUEUED and member.waits is not None:
            turn = self._residence.turn(member)
            if turn is None:
                return _loading("memory", None, None, expected)
            seconds, before = turn
            ahead = [self._members[name].load_seconds or LOAD_SECONDS for name in before]
            return _loading("memory", None, max(seconds, self._slot(ahead)), expected)
        if phase is Phase.QUEUED:
            return _loading("queued", None, self._slot(self._before(member)), expected)
        if status.next_try_at is not None:
            return _loading(phase.value, None, max(status.next_try_at - self._now(), 0.0), expected)
        return _loading(phase.value, None, None, expected)

    def _left(self, member: Member, done: float | None) -> float | None:
        began, now = member.spawned_at, self._clock()
        return left(member.load_seconds, 0.0 if began is None else now - began, done)

    def _before(self, member: Member) -> list[float]:
        """The load seconds of what is queued before it, and doesn't wait for memory."""
        found: list[float] = []
        for each in self._members.values():
            if each is member:
                break
            if each.waits is None:
                expected = each.load_seconds or LOAD_SECONDS
                found += [expected for one in each.serving() if one.phase is Phase.QUEUED]
        return found

    def _slot(self, before: Iterable[float]) -> float:
        """Seconds until it may begin to load."""
        loads = [
            self._left(member, share(worker.status().progress)) or 0.0
            for member in self._members.values()
            for worker in member.workers.values()
            if worker.phase in LOADING
        ]
        pause = self._governor.paused_seconds
        slots = max(self._governor.slots(LOAD_SLOTS), 1)
        return pause + wait(slots, loads, before)


def left(measured: float | None, elapsed: float, done: float | None) -> float | None:
    """Seconds that a load still takes; ``None`` if it takes longer than anybody knows."""
    if measured is not None and elapsed < measured:
        return measured - elapsed
    if done is not None and done >= _TELLING:
        return elapsed * (1 - done) / done
    return LOAD_SECONDS - elapsed if measured is None and elapsed < LOAD_SECONDS else None


def wait(slots: int, loads: Iterable[float], before: Iterable[float]) -> float:
    """Seconds until one of ``slots`` is free, after ``loads`` that run and all that are before."""
    free = sorted(loads)
    free = [0.0] * (slots - len(free)) + free
    heapq.heapify(free)
    for seconds in before:
        heapq.heapreplace(free, free[0] + seconds)
    # Where there are fewer slots than loads, all but the last of them have to be free.
    return sorted(free)[len(free) - slots]


def share(progress: Progress | None) -> float | None:
    """How far a step is, from 0 to 1."""
    if progress is None or progress.done is None or not progress.total:
        return None
    return min(max(progress.done / progress.total, 0.0), 1.0)


def _loading(stage: str, done: float | None, until: float | None, then: float) -> Loading:
    """``until`` are the seconds before the load, ``then`` what it takes."""
    return Loading(
        stage,
        None if done is None else round(done, 3),
        None if until is None else round(until + then, 1),
        0,
    )
