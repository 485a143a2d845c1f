"""Whether a model would find room in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tursi.model.footprint import Footprint


class Verdict(StrEnum):
    """Whether a model would find room."""

    FITS = "fits"
    EVICTS = "evicts"
    """If others go, which only are loaded on demand."""
    IN_PLACE = "in_place"
    """Once the generation that it replaces has gone, and not beside it."""
    WAITS = "waits"
    """Not now, for what is there stays."""
    NEVER = "never"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as it is now; all sizes in bytes."""

    device: str
    """``cuda:0`` and so on, as workers count them."""
    name: str
    total: int
    free: int
    processes: Mapping[int, int] = field(default_factory=dict)
    """What each has of it, by pid, as far as the driver tells."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a device, or the host, has; all sizes in bytes."""

    device: str
    """``host``, or a GPU such as ``cuda:0``."""
    total: int | None = None
    free: int | None = None
    """That loads may still take."""
    name: str | None = None
    """What the GPU is called."""


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
    """That loads may still take: of the host, or of ``limit`` where that leaves less."""
    limit: int | None = None
    """That all models may take together."""
    evicts: tuple[str, ...] = ()
    """Deployments that would go."""
    gives_back: int = 0
    """Host memory that the generation which it replaces has now."""
    footprint: Footprint | None = None
    """What is known of each worker; ``None`` where the model's files aren't known."""
    rooms: tuple[Room, ...] = ()
    """Of the host and of each GPU, whatever ``limit`` is."""
