"""Requests that were in flight when workers died: which are suspect, and which are refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

MEMORY_SECONDS = 3600.0
"""How long a death is held against a request."""
MAX_SUSPECTS = 1024
"""Requests that are remembered; the longest unseen are forgotten first."""
DEATHS = 2
"""So many make a request poison."""


@dataclass(slots=True)
class Suspicion:
    """What is held against one request."""

    size: int
    until: float
    """When it is forgotten, in monotonic seconds."""
    deaths: dict[str, int | None] = field(default_factory=dict)
    """The lives that ended while they held it, each with the id of its crash once known."""

    @property
    def poison(self) -> bool:
        """Whether it is refused."""
        return len(self.deaths) >= DEATHS


class Suspects:
    """A memory of them by digest; ``clock`` gives monotonic seconds.

    Empty as long as no worker dies, and then it costs nothing to ask it.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._held: OrderedDict[bytes, Suspicion] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def died(self, digest: bytes, size: int, life: str) -> bool:
        """A worker has died while it held the request with this digest and size of body.

        Whether the request is poison since this very death.
        """
        self._expire()
        suspicion = self._held.setdefault(digest, Suspicion(size, 0.0))
        known = suspicion.poison
        suspicion.deaths.setdefault(life)
        if not known:
            suspicion.until = self._clock() + MEMORY_SECONDS
        self._held.move_to_end(digest)
        if len(self._held) > MAX_SUSPECTS:
            self._held.popitem(last=False)
        return suspicion.poison and not known

    def identified(self, life: str, crash: int) -> None:
        """The end of that life has been recorded as that crash."""
        for suspicion in self._held.values():
            if life in suspicion.deaths:
                suspicion.deaths[life] = crash

    def recognize(self, route: str, body: bytes) -> bytes | None:
        """The digest of a request that something is held against, else ``None``."""
        self._expire()
        # A digest of each body would cost too much; sizes mostly tell.
        if all(suspicion.size != len(body) for suspicion in self._held.values()):
            return None
        found = digest(route, body)
        return found if found in self._held else None

    def of(self, digest: bytes) -> Suspicion | None:
        """What is held against that request."""
        suspicion = self._held.get(digest)
        return suspicion if suspicion is not None and suspicion.until > self._clock() else None

    def clear(self, digest: bytes) -> None:
        """It has been answered, and nobody died of it."""
        self._held.pop(digest, None)

    def forgive(self) -> None:
        """Forget everything: it will meet something else."""
        self._held.clear()

    def _expire(self) -> None:
        now = self._clock()
        for found in [found for found, each in self._held.items() if each.until <= now]:
            del self._held[found]


def digest(route: str, body: bytes) -> bytes:
    """What tells one request from another, whoever sends it."""
    found = blake2b(route.encode() + b"\0", digest_size=16)
    found.update(body)
    return found.digest()
