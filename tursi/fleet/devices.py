"""GPUs on which contexts are lost again and again: new loads go elsewhere, and it is said.

A worker that loses its context (an illegal address, a failed launch, a fault of the
memory) comes back in a new process and mostly serves. Where that happens often on
one device, the device itself may be failing. Pure: the clock comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

MAX_LOST = 3
WINDOW_SECONDS = 3600.0
"""That many lost contexts within that time make a device suspect, until they are past."""


class Devices:
    """Remembers lost contexts; ``present`` names the GPUs here, ``clock`` is monotonic."""

    def __init__(self, clock: Callable[[], float], present: Sequence[str] = ()) -> None:
        self._clock = clock
        self._present = tuple(present)
        self._lost: dict[str, list[float]] = {}

    def lost(self, device: str, ago: float = 0.0) -> bool:
        """A worker on ``device`` has lost its context; whether that makes the device suspect.

        That was ``ago`` seconds before now; the earlier ones are told of first.
        """
        name = _name(device)
        before = self._count(name)
        self._lost.setdefault(name, []).append(self._clock() - ago)
        del self._lost[name][:-MAX_LOST]
        return before < MAX_LOST <= self._count(name)

    def place(self, asked: str) -> str:
        """Where to load what shall run on ``asked``: past suspect devices, if there are others."""
        if asked not in {"auto", "cuda"} or not self.suspects:
            return asked
        if self._count(_name(asked)) < MAX_LOST:
            return asked
        others = (each for each in self._present if self._count(each) < MAX_LOST)
        return next(others, asked)

    @property
    def suspects(self) -> dict[str, str]:
        """The devices that are suspect, each with a sentence that says why."""
        return {
            device: (
                f"{device} is suspect: workers have lost their GPU context on it {count} times "
                f"within {WINDOW_SECONDS / 3600:.0f} h."
            )
            for device in sorted(self._lost)
            if (count := self._count(device)) >= MAX_LOST
        }

    def _count(self, device: str) -> int:
        since = self._clock() - WINDOW_SECONDS
        return sum(at > since for at in self._lost.get(device, ()))


def _name(device: str) -> str:
    """The one that a worker takes where nothing better is said."""
    return "cuda:0" if device in {"auto", "cuda"} else device
