"""How many replicas keep requests from waiting long, decided purely.

More at once while requests wait, and all that there are take them; fewer only after a
long calm. Whoever finds that one less was too few waits twice as long before the next
try, so that a steady load doesn't make the number swing.
"""

from __future__ import annotations

from dataclasses import dataclass

CALM = 0.25
"""Times the target: below this one replica less may do, too."""
_MAX_PATIENCE = 3600.0


@dataclass(frozen=True, slots=True)
class Rules:
    """Durations in seconds."""

    target: float = 0.5
    """Requests should not wait longer than this,"""
    up: float = 2.0
    """and if they do for so long there is one replica more."""
    down: float = 60.0
    """After a calm of this length there is one less."""
    held: float = 60.0
    """What found no room is asked for again after so long."""


class Scaler:
    """One deployment's number of replicas; times are on one monotonic clock."""

    def __init__(self, rules: Rules = Rules()) -> None:
        self.rules = rules
        self._waiting_since: float | None = None
        self._calm_since: float | None = None
        self._held_until = 0.0
        self._patience: dict[int, float] = {}
        """By number: how long a calm has to be before there are so few."""
        self._tried: int | None = None
        """The number that the last step down led to."""

    def decide(
        self, now: float, *, waited: float, replicas: int, ready: int, least: int, most: int
    ) -> int:
        """How many there should be; ``waited`` is what requests have waited lately."""
        if not least <= replicas <= most:
            self._restart()
            return min(max(replicas, least), most)
        if waited > self.rules.target:
            self._calm_since = None
            if self._waiting_since is None:
                self._waiting_since = now
        else:
            self._waiting_since = None
            if waited > CALM * self.rules.target:
                self._calm_since = None
            elif self._calm_since is None:
                self._calm_since = now
        if ready < replicas:
            # What is on its way may be enough.
            self._restart()
            return replicas
        if self._rises(now) and replicas < most:
            self._restart()
            if self._tried == replicas:
                patience = self._patience.get(replicas, self.rules.down)
                self._patience[replicas] = min(2 * patience, _MAX_PATIENCE)
            self._tried = None
            return replicas + 1
        if self._falls(now, replicas - 1) and replicas > least:
            self._restart()
            self._tried = replicas - 1
            return replicas - 1
        return replicas

    def hold(self, now: float) -> None:
        """There is no room for one more; don't ask again at once."""
        self._held_until = now + self.rules.held
        self._restart()

    def _rises(self, now: float) -> bool:
        since = self._waiting_since
        return since is not None and now - since >= self.rules.up and now >= self._held_until

    def _falls(self, now: float, fewer: int) -> bool:
        patience = self._patience.get(fewer, self.rules.down)
        return self._calm_since is not None and now - self._calm_since >= patience

    def _restart(self) -> None:
        self._waiting_since = self._calm_since = None
