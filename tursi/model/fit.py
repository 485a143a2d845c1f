"""Whether a model would find room in memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """Whether a model would find room."""

    FITS = "fits"
    EVICTS = "evicts"
    """If others go, which only are loaded on demand."""
    WAITS = "waits"
    """Not now, for what is there stays."""
    NEVER = "never"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Fit:
    """What would become of a deployment as far as memory goes; all sizes in bytes."""

    verdict: Verdict
    message: str
    memory: int | None = None
    """That each worker is reckoned to need."""
    measured: bool = False
    """Whether that was measured, not estimated."""
    replicas: int = 1
    free: int | None = None
    """That loads may still take."""
    limit: int | None = None
    """That all models may take."""
    evicts: tuple[str, ...] = ()
    """Deployments that would go."""
