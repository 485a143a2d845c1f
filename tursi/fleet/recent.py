"""What was done in the last minutes, kept in memory: for a look at what goes on, or at a canary."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TypeAlias

from tursi.rollup import Rollup

Series: TypeAlias = tuple[str, int, int]
"""A deployment's name, the number of its generation and a key's id."""

FINE_SECONDS = 10.0
"""So long every addition is kept by itself; older ones together with their neighbours,"""
COARSE_SECONDS = 10.0
"""of so long each,"""
KEPT_SECONDS = 300.0
"""and so long at all."""


class Recent:
    """Rollups by deployment and generation; times are monotonic seconds."""

    def __init__(self) -> None:
        self._fine: deque[tuple[float, Mapping[Series, Rollup]]] = deque()
        self._coarse: deque[tuple[float, dict[Series, Rollup]]] = deque()

    def add(self, at: float, counted: Mapping[Series, Rollup]) -> None:
        """Add what was done until ``at``, since the last time."""
        self._fine.append((at, counted))
        self._forget(at)

    def of(self, deployment: str, at: float, seconds: float) -> dict[int, Rollup]:
        """What each generation of the deployment did in the ``seconds`` before ``at``.

        More than ``FINE_SECONDS`` ago it is known in steps of ``COARSE_SECONDS``. Refused
        requests are of no generation, which is 0.
        """
        found: dict[int, Rollup] = {}
        for when, held in (*self._coarse, *self._fine):
            if when > at - seconds:
                for (name, generation, _), rollup in held.items():
                    if name == deployment:
                        found.setdefault(generation, Rollup()).merge(rollup)
        return found

    def all(self, at: float, seconds: float) -> dict[str, Rollup]:
        """What every deployment did in the ``seconds`` before ``at``."""
        found: dict[str, Rollup] = {}
        for when, held in (*self._coarse, *self._fine):
            if when > at - seconds:
                for (deployment, _, _), rollup in held.items():
                    found.setdefault(deployment, Rollup()).merge(rollup)
        return found

    def _forget(self, at: float) -> None:
        while self._fine and self._fine[0][0] <= at - FINE_SECONDS:
            when, old = self._fine.popleft()
            if not self._coarse or when - self._coarse[-1][0] >= COARSE_SECONDS:
                self._coarse.append((when, {}))
            coarse = self._coarse[-1][1]
            for (deployment, generation, _), rollup in old.items():
                coarse.setdefault((deployment, generation, 0), Rollup()).merge(rollup)
        while self._coarse and self._coarse[0][0] <= at - KEPT_SECONDS:
            self._coarse.popleft()
