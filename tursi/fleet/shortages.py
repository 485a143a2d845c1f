"""Loads that ran out of memory: each is tried again when there is more, and not before.

Memory may vanish between the estimate and the load, when another process takes it. As
long as nothing has changed, trying again would end in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

from tursi.admission import Free
from tursi.model import Footprint, mebibytes

_MORE = 64 * 1024 * 1024
"""Bytes that count as more, at least."""
_PART = 0.05
"""The same as a part of what is needed."""
_BEYOND = 1.1
"""Times what a worker had when it was killed, it needs at least."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """One load that ran out of memory, and what was free right after its end."""

    generation: int
    free: Free
    enough: bool
    """Whether as much was free then as it is reckoned to need: it was taken and given back."""
    least: int = 0
    """Bytes of host memory that it has shown to need."""


class Shortages:
    """Remembers the last one of each deployment."""

    def __init__(self) -> None:
        self._found: dict[str, Shortage] = {}

    def add(
        self,
        name: str,
        generation: int,
        needs: Footprint,
        free: Free,
        *,
        fits: bool,
        killed_at: int | None,
    ) -> None:
        """A load has failed for want of memory; ``killed_at`` is what it had, if it was killed."""
        before = self.of(name, generation)
        least = max(int((killed_at or 0) * _BEYOND), before.least if before else 0)
        enough = fits and (free.host is None or free.host >= max(least, needs.host))
        self._found[name] = Shortage(generation, free, enough, least)

    def forget(self, name: str) -> None:
        """It is loaded, or somebody wants it tried whatever was."""
        self._found.pop(name, None)

    def of(self, name: str, generation: int) -> Shortage | None:
        """The last one of that generation, if it hasn't been loaded since."""
        found = self._found.get(name)
        return found if found is not None and found.generation == generation else None

    def least(self, name: str, generation: int) -> int:
        """What a load has shown to need."""
        found = self.of(name, generation)
        return found.least if found else 0

    def holds(self, name: str, generation: int, needs: Footprint, free: Free) -> bool:
        """Whether another try would only end in the same way."""
        found = self.of(name, generation)
        return found is not None and not found.enough and not more(found, needs, free)

    def relieved(self, name: str, generation: int, needs: Footprint, free: Free) -> bool:
        """Whether there was too little, and is more now."""
        found = self.of(name, generation)
        return found is not None and not found.enough and more(found, needs, free)

    def sentence(self, name: str, generation: int) -> str | None:
        """Why it isn't tried, for people."""
        found = self.of(name, generation)
        if found is None or found.free.host is None:
            return None
        return (
            "It ran out of memory while it was loaded, and right after that "
            f"{mebibytes(found.free.host)} were free; it is tried again when there is more."
        )


def more(found: Shortage, needs: Footprint, free: Free) -> bool:
    """Whether clearly more memory is free than after that failure, of the host or of a GPU."""
    if _grown(found.free.host, free.host, needs.host):
        return True
    return any(
        _grown(found.free.gpus.get(device, 0), size, needs.gpu)
        for device, size in free.gpus.items()
    )


def _grown(before: int | None, now: int | None, needed: int) -> bool:
    if before is None or now is None:
        return False
    return now >= before + max(_MORE, int(needed * _PART))
