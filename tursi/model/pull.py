"""Models on the disk, and their way there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tursi.model.worker import Progress


class PullState(StrEnum):
    """How far a pull is."""

    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """A download of a model that somebody asked for, as the store has it."""

    id: int
    model: str
    """``org/name[@revision]``."""
    state: PullState
    asked_at: float
    asked_by: str
    ended_at: float | None = None
    error: str | None = None
    """Why it failed, or why it has to be tried again."""
    folder: str | None = None
    commit: str | None = None
    size: int | None = None
    """Bytes of the model, once it is there."""
    allow_pickle: bool = False
    """Whether pickle files are taken where there is nothing better."""
    trust_remote_code: bool = False
    """Whether Python code of the model is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullStatus(Pull):
    """The same with how it goes just now."""

    progress: Progress | None = None
    rate: float | None = None
    """Bytes per second, over the last seconds."""
    remaining_seconds: float | None = None
    next_try_at: float | None = None


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model on this machine's disk."""

    name: str
    folder: str
    size: int
    commit: str | None = None
    used_by: tuple[str, ...] = ()
    """Deployments."""
    used_at: float | None = None
    """When it was last loaded, or else downloaded."""
