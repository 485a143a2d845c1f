"""Which of the replicas that are ready gets the next request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tursi.canary import Share, Tally
from tursi.fleet.passage import Replica
from tursi.model import Deployment

GENERATION_HEADER = "x-tursi-generation"
"""Of answers, while a canary is tried: the generation that they come from."""


class Routing:
    """Orders replicas by what the deployment says of its generations.

    What has served before gets everything until the new generation has taken over; a
    canary gets its share. ``random`` gives numbers in [0, 1).
    """

    def __init__(self, deployment: Deployment, random: Callable[[], float]) -> None:
        self._random = random
        self._share: Share | None = None
        self._of = 0
        """The generation whose share it is."""
        self._both = False
        """Whether the request that is being sent could have gone to either."""
        self.canary, self.stable = Tally(), Tally()
        """What both have answered since the canary has its weight."""
        self.adopt(deployment)

    def adopt(self, deployment: Deployment) -> None:
        """Go by that from now on."""
        stable = deployment.stable.number if deployment.stable else None
        weight = deployment.canary if stable is not None else None
        self._stable, self._wanted = stable, deployment.generation.number
        if weight is None:
            self._share = None
        elif self._share is None or self._share.weight != weight or self._of != self._wanted:
            self._share = Share(weight, self._random)
            self._of = self._wanted
            self.canary, self.stable = Tally(), Tally()

    @property
    def mark(self) -> str | None:
        """The header that tells from which generation an answer comes, if that matters."""
        return None if self._share is None else GENERATION_HEADER

    def order(self, ready: Sequence[Replica], *, again: bool = False) -> Sequence[Replica]:
        """Those that may have the next request, whoever should have it first.

        What is sent ``again`` because a worker died with it doesn't go to a canary.
        """
        self._both = False
        if self._stable is None:
            return ready if len(ready) < 2 else _calmest(_newest(ready))
        old = [worker for worker in ready if worker.generation == self._stable]
        new = [worker for worker in ready if worker.generation == self._wanted]
        share = self._share
        if share is not None and not share.weight:
            new, ready = [], old
        if share is None or not (old and new):
            return _calmest(old or new or _newest(ready))
        self._both = True
        if share.turn and not again:
            return [*_calmest(new), *_calmest(old)]
        return _calmest(old)

    def sent(self, worker: Replica) -> None:
        """It has got the request that was asked for last."""
        if self._both and self._share is not None:
            self._share.deal(canary=worker.generation == self._wanted)

    def count(self, generation: int, seconds: float, *, failed: bool) -> None:
        """An answer of one of them is over."""
        if self._share is not None and generation in {self._stable, self._wanted}:
            tally = self.canary if generation == self._wanted else self.stable
            tally.add(seconds, failed=failed)


def _newest(workers: Sequence[Replica]) -> Sequence[Replica]:
    newest = max((worker.generation for worker in workers), default=0)
    return [worker for worker in workers if worker.generation == newest]


def _calmest(workers: Sequence[Replica]) -> Sequence[Replica]:
    return sorted(workers, key=_in_flight)


def _in_flight(worker: Replica) -> int:
    return worker.in_flight
