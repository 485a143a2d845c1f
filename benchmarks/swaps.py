"""Simulates one GPU that serves more models than it holds: our queue, FIFO and LRU.

A trace of requests (popularity by Zipf's law, in bursts, seeded) is played against
each policy on a fake clock. One model is loaded at a time; a loaded one answers up to
``BATCH`` requests at once. Prints swaps and waits, and the ratios to FIFO.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from tursi.residency import Decision, Resident, Rules, Uses, Waiting, decide, next_change

CAPACITY = 80 * 1024**3
BATCH = 8


@dataclass(frozen=True)
class Model:
    """What a request needs."""

    name: str
    size: int
    load_seconds: float
    answer_seconds: float


@dataclass(frozen=True)
class Arrival:
    """A request."""

    at: float
    model: Model


def trace(requests: int, models: int, seed: int, rate: float) -> list[Arrival]:
    """Requests in bursts; ``rate`` per second on average."""
    chance = random.Random(seed)
    known = []
    for number in range(models):
        size = int(chance.lognormvariate(1.1, 0.7) * 1024**3)
        load = 1.0 + size / (1.5 * 1024**3)
        known.append(Model(f"m{number}", size, load, chance.uniform(0.1, 1.0)))
    weights = [1 / (rank + 1) ** 0.9 for rank in range(models)]
    found: list[Arrival] = []
    now = 0.0
    while len(found) < requests:
        burst = 1 + int(chance.expovariate(1 / 4))
        now += chance.expovariate(rate / (1 + 4))
        [model] = chance.choices(known, weights)
        at = now
        for _ in range(burst):
            found.append(Arrival(at, model))
            at += chance.expovariate(0.1)
    return sorted(found[:requests], key=lambda arrival: arrival.at)


@dataclass
class Place:
    """A model as the GPU has it."""

    model: Model
    queue: deque[Arrival] = field(default_factory=deque)
    loaded_at: float | None = None
    loading: bool = False
    paused: bool = False
    """Whether it takes nothing new, so that it can go."""
    busy: int = 0
    last_used: float = 0.0
    uses: Uses = field(default_factory=Uses)

    @property
    def present(self) -> bool:
        return self.loading or self.loaded_at is not None


class Policy(Protocol):
    """Chooses what to load, and which requests may be answered."""

    def decide(self, places: dict[str, Place], room: int, now: float) -> Decision: ...

    def may_answer(self, arrival: Arrival, oldest: Arrival | None) -> bool: ...

    def wakes(self, places: dict[str, Place], now: float) -> float | None: ...


class Ours:
    """``tursi.residency``."""

    rules = Rules()

    def decide(self, places: dict[str, Place], room: int, now: float) -> Decision:
        return decide(*_seen(places, now), room=room, now=now, rules=self.rules)

    def may_answer(self, arrival: Arrival, oldest: Arrival | None) -> bool:
        return True

    def wakes(self, places: dict[str, Place], now: float) -> float | None:
        return next_change(*_seen(places, now), now, self.rules)


class Lru:
    """Loads for whoever has waited longest, in place of what was used longest ago."""

    keeps_waited_for = True

    def decide(self, places: dict[str, Place], room: int, now: float) -> Decision:
        absent = [each for each in places.values() if each.queue and not each.present]
        if not absent:
            return Decision()
        wanted = min(absent, key=lambda each: each.queue[0].at)
        going, lacking = [], wanted.model.size - room
        idle = [e for e in places.values() if e.loaded_at is not None and not e.busy]
        for each in sorted(idle, key=lambda each: each.last_used):
            if lacking <= 0:
                break
            if each.queue and self.keeps_waited_for:
                continue
            going.append(each.model.name)
            lacking -= each.model.size
        return Decision(wanted.model.name, tuple(going)) if lacking <= 0 else Decision()

    def may_answer(self, arrival: Arrival, oldest: Arrival | None) -> bool:
        return True

    def wakes(self, places: dict[str, Place], now: float) -> float | None:
        return None


class Fifo(Lru):
    """The same, but nobody overtakes who came before and whose model isn't there yet."""

    keeps_waited_for = False

    def may_answer(self, arrival: Arrival, oldest: Arrival | None) -> bool:
        return oldest is None or arrival.at <= oldest.at


def _seen(places: dict[str, Place], now: float) -> tuple[list[Waiting], list[Resident]]:
    waiting = [
        Waiting(e.model.name, e.model.size, e.queue[0].at, len(e.queue), e.model.load_seconds)
        for e in places.values()
        if e.queue and not e.present
    ]
    resident = [
        Resident(
            e.model.name,
            e.model.size,
            e.loaded_at or now,
            e.uses.value(now),
            e.model.load_seconds,
            held=e.loading,
            busy=e.busy > 0 or (bool(e.queue) and not e.paused),
        )
        for e in places.values()
        if e.present
    ]
    return waiting, resident


@dataclass(frozen=True)
class Result:
    """What came of a policy."""

    swaps: int
    waits: list[float]

    def percentile(self, share: float) -> float:
        return sorted(self.waits)[int(share * (len(self.waits) - 1))]


class Simulation:
    """Plays a trace against a policy, on a clock of its own."""

    def __init__(self, arrivals: list[Arrival], policy: Policy, capacity: int) -> None:
        self._policy = policy
        self._room = capacity
        self._places = {arrival.model.name: Place(arrival.model) for arrival in arrivals}
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self.waits: list[float] = []
        self.swaps = 0
        for arrival in arrivals:
            self._at(arrival.at, partial(self._arrive, arrival))

    def run(self) -> None:
        """To the end."""
        while self._events:
            now, _, what = heapq.heappop(self._events)
            what(now)
            self._answer(now)
            if not any(place.loading for place in self._places.values()):
                self._load(now)

    def _at(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def _arrive(self, arrival: Arrival, now: float) -> None:
        place = self._places[arrival.model.name]
        place.queue.append(arrival)
        place.uses.add(now)

    def _loaded(self, place: Place, now: float) -> None:
        place.loading, place.loaded_at, place.last_used = False, now, now

    def _answered(self, place: Place, now: float) -> None:
        place.busy -= 1
        place.last_used = now

    def _answer(self, now: float) -> None:
        absent = [e.queue[0] for e in self._places.values() if e.queue and e.loaded_at is None]
        oldest = min(absent, key=lambda arrival: arrival.at, default=None)
        for place in self._places.values():
            while (
                place.loaded_at is not None
                and not place.paused
                and place.queue
                and place.busy < BATCH
            ):
                if not self._policy.may_answer(place.queue[0], oldest):
                    break
                arrival = place.queue.popleft()
                self.waits.append(now - arrival.at)
                place.busy += 1
                self._at(now + place.model.answer_seconds, partial(self._answered, place))

    def _load(self, now: float) -> None:
        decision = self._policy.decide(self._places, self._room, now)
        for name, place in self._places.items():
            place.paused = name in decision.pause
        if decision.load is None:
            wait = self._policy.wakes(self._places, now)
            if wait is not None:
                self._at(now + wait, lambda _: None)
            return
        for name in decision.evict:
            self._places[name].loaded_at, self._places[name].paused = None, False
            self._room += self._places[name].model.size
        wanted = self._places[decision.load]
        wanted.loading = True
        self._room -= wanted.model.size
        assert self._room >= 0
        self.swaps += 1
        self._at(now + wanted.model.load_seconds, partial(self._loaded, wanted))


def simulate(arrivals: list[Arrival], policy: Policy, capacity: int = CAPACITY) -> Result:
    """Play the trace."""
    simulation = Simulation(arrivals, policy, capacity)
    simulation.run()
    assert len(simulation.waits) == len(arrivals), "somebody was forgotten"
    return Result(simulation.swaps, simulation.waits)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--requests", type=int, default=10_000)
    options.add_argument("--models", type=int, default=200)
    options.add_argument("--rate", type=float, nargs="*", default=[1.0, 2.0, 3.0, 4.0])
    options.add_argument("--seeds", type=int, default=3)
    asked = options.parse_args()
    print(f"{asked.requests} requests, {asked.models} models, {CAPACITY >> 30} GiB")
    print(f"{'rate':>5} {'policy':>7} {'swaps':>7} {'of FIFO':>8} {'p50':>8} {'p95':>8} {'p99':>8}")
    for rate in asked.rate:
        traces = [trace(asked.requests, asked.models, seed, rate) for seed in range(asked.seeds)]
        base = 0.0
        for name, policy in (("FIFO", Fifo()), ("LRU", Lru()), ("ours", Ours())):
            results = [simulate(arrivals, policy) for arrivals in traces]
            swaps = statistics.median(each.swaps for each in results)
            base = base or swaps
            waits = [
                statistics.median(each.percentile(share) for each in results)
                for share in (0.5, 0.95, 0.99)
            ]
            print(
                f"{rate:>5} {name:>7} {swaps:>7.0f} {swaps / base:>8.2f} "
                + " ".join(f"{wait:>7.1f}s" for wait in waits)
            )


if __name__ == "__main__":
    main()
