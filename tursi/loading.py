"""How far a model is that isn't there yet, as whoever waits for it is told."""

from __future__ import annotations

from dataclasses import dataclass

POSITION_HEADER = "X-Queue-Position"
"""Tells whoever had to wait the place in the queue."""


@dataclass(frozen=True, slots=True)
class Loading:
    """What a request is told that waits for a model."""

    stage: str
    """``fetching``, ``memory`` (it waits for that), or a worker's phase."""
    progress: float | None
    """Of this stage, from 0 to 1, where that is known."""
    eta_seconds: float | None
    """Until it answers, as well as can be told."""
    position: int
    """Of the request among those that wait for the model; 1 is the next."""
